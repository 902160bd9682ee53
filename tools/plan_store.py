"""The plan of a shard set: one SQLite file that says what goes into which shard, and why all else does not.

It grows in three stages, each of which can be killed at any moment and begun again: `listing` (no inputs yet; they
come all at once), `probing` (outcomes come one by one), `decided` (verdicts, clips and shards, all at once). Memory
stays flat in the number of inputs. Between transactions the plan is a single file, without a journal beside it,
and can be copied elsewhere and read there.

    with PlanStore.create(path, settings) as plan:
        plan.add_inputs(list_inputs(...))
        for number, source in plan.to_probe():
            plan.record(number, probe_source(...))      # or why it is rejected
        plan.decide(options)
        for shard in plan.shards():
            for clip, info in plan.clips_of(shard.split, shard.number): ...
        plan.accounts(lost)

The tables are in `plan_schema.py`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from framestream.pipeline.errors import ShardError
from framestream.pipeline.probe import VideoInfo

from . import plan_accounts, plan_decide, plan_listing, plan_reading
from .clips import Clip
from .inputs import Source, Unusable
from .plan_accounts import Accounts
from .plan_decide import Progress
from .plan_reading import PlannedShard
from .plan_schema import (
    PROBED,
    PROBING,
    SOURCE,
    USABLE,
    connect,
    create,
    guarded,
    probed_row,
    source_of,
    transaction,
)
from .shard_options import ShardOptions

if TYPE_CHECKING:
    from .probing import Probed

Stage = Literal["listing", "probing", "decided"]
Lost = Iterable[tuple[str, str]]  # key and reason of clips that could not be made
COMMIT_RECORDS, COMMIT_S = 1000, 1.0  # what a kill can cost
_PAGE = 1000  # inputs in memory


class PlanStore:
    """A plan; made by `create` or `open`, and closed at the end of a `with`, which also names what goes wrong in it.

    Errors of SQLite leave the `with` as ShardError: a damaged file, a full disk, another process that writes.

    Attributes:
        settings: what decides the plan apart from its inputs, as it was given to `create`.
        num_inputs: all that were listed.
        num_usable: of these, neither unusable at listing nor named twice.
        num_to_probe: videos that are probed; parts of one video count once.
        num_probed: of these, those with an outcome.
        num_rejected: inputs that were unusable at listing, and videos that were at probing.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool) -> None:
        self.path, self._db, self.readonly = path, db, readonly
        self.settings: dict[str, Any] = json.loads(self._meta("settings"))
        self._pending, self._committed = 0, 0.0
        self._count()

    @classmethod
    def create(cls, path: str | Path, settings: Mapping[str, Any]) -> PlanStore:
        """A new plan; `settings` is all that decides it apart from its inputs, as JSON can hold it.

        Raises:
            ShardError: there is one, or it cannot be written.
        """
        create(Path(path), settings)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, readonly: bool = False) -> PlanStore:
        """A plan that was begun before, with all that was committed.

        Raises:
            ShardError: it is missing, damaged, no plan, of another version, or was left half written by a process that
                was killed where nothing can be written now.
        """
        path = Path(path)
        db = connect(path, readonly)
        try:
            with guarded(path):
                return cls(path, db, readonly)
        except BaseException:
            db.close()
            raise

    def __enter__(self) -> PlanStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with guarded(self.path):
            try:
                if isinstance(err, sqlite3.Error):
                    raise err
                self._commit()
            finally:
                self._db.close()

    @property
    def stage(self) -> Stage:
        return self._meta("stage")  # type: ignore[return-value]

    def _meta(self, name: str) -> str:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise sqlite3.DatabaseError(f"it has no {name}")
        return str(row[0])

    def _count(self) -> None:
        sums = f"coalesce(sum({USABLE}), 0), coalesce(sum({PROBING}), 0), count(i.reason)"
        ((self.num_inputs, self.num_usable, self.num_to_probe, unusable),) = self._db.execute(
            f"SELECT count(*), {sums} FROM inputs AS i"
        )
        ((self.num_probed, rejected),) = self._db.execute("SELECT count(*), count(reason) FROM probes")
        self.num_rejected = unusable + rejected

    def add_inputs(self, items: Iterable[Source | Unusable], other_files: Mapping[str, int] | None = None) -> None:
        """List all inputs, in one transaction: `items` is read to its end, or nothing is kept.

        An input is a duplicate of an earlier one with the same path (however it is written), start, end and text, and
        the same key where one is asked for that is not made of the name. Keys that several share get a hash of the
        source's name, and a number where even that is equal. `other_files` are kept beside them, as they are when the
        last item has come.

        Raises:
            ShardError: the inputs are listed already.
        """
        self._expect("listing")
        with transaction(self._db):
            plan_listing.write_inputs(self._db, items)
            passed_over = json.dumps(dict(sorted((other_files or {}).items())))
            self._db.execute("INSERT INTO meta (name, value) VALUES ('other_files', ?)", (passed_over,))
            self._db.execute("UPDATE meta SET value = 'probing' WHERE name = 'stage'")
        self._count()

    @property
    def other_files(self) -> dict[str, int]:
        """Files that listing passed over because they are no videos, by extension."""
        found: dict[str, int] = json.loads(self._meta("other_files"))
        return found

    def difference(self, settings: Mapping[str, Any], items: Iterable[Source | Unusable]) -> str:
        """The first thing in which this plan differs from new settings and a new listing, in words; "" for none."""
        return plan_listing.settings_difference(self.settings, settings) or plan_listing.inputs_difference(
            self._db, items
        )

    def to_probe(self) -> Iterator[tuple[int, Source]]:
        """Number and source of what is not probed yet, in order; outcomes can be recorded meanwhile.

        Of inputs that are parts of one video the first is probed for all of them.
        """
        last = -1
        query = (
            f"SELECT i.number, {SOURCE} FROM inputs AS i LEFT JOIN probes AS p ON p.number = i.number "
            f"WHERE i.number > ? AND {PROBING} AND p.number IS NULL ORDER BY i.number LIMIT {_PAGE}"
        )
        while page := self._db.execute(query, (last,)).fetchall():
            for number, *source in page:
                yield number, source_of(source)
            last = page[-1][0]

    def record(self, number: int, outcome: Probed | str) -> None:
        """Keep what probing an input gave, or why it is rejected; of two outcomes the first one stays.

        A kill loses what was recorded since the last commit: at most 1000 outcomes, or those of a second.
        """
        if not self._pending:
            self._db.execute("BEGIN IMMEDIATE")
        marks = ", ".join("?" * len(PROBED))
        query = f"INSERT OR IGNORE INTO probes ({', '.join(PROBED)}) VALUES ({marks})"
        if self._db.execute(query, probed_row(number, outcome)).rowcount:
            self.num_probed += 1
            self.num_rejected += isinstance(outcome, str)
        self._pending += 1
        if self._pending >= COMMIT_RECORDS or time.monotonic() - self._committed >= COMMIT_S:
            self._commit()

    def packets_bytes(self) -> int:
        """Bytes of packets' places in the outcomes so far."""
        ((num_bytes,),) = self._db.execute("SELECT coalesce(sum(length(packets)), 0) FROM probes")
        return int(num_bytes)

    def _commit(self) -> None:
        if self._pending:
            self._db.execute("COMMIT")
        self._pending, self._committed = 0, time.monotonic()

    def sample(self, n: int) -> list[tuple[int, Source]]:
        """Number and source of `n` inputs, spread evenly over all that can be used."""
        ranks = f"SELECT number, row_number() OVER (ORDER BY number) AS rank FROM inputs AS i WHERE {USABLE}"
        rows = self._db.execute(
            f"SELECT i.number, {SOURCE} FROM ({ranks}) AS r JOIN inputs AS i ON i.number = r.number "
            "WHERE r.rank * :n / :of > (r.rank - 1) * :n / :of ORDER BY i.number",
            {"n": n, "of": max(1, self.num_usable)},
        )
        return [(number, source_of(source)) for number, *source in rows]

    def check_splits(self, options: ShardOptions) -> list[str]:
        """The splits that deciding will make, sorted; [""] without any. Known as soon as the inputs are listed.

        Raises:
            ConfigError: the manifest names splits, and `val_tail` or `val_share` asks for others.
        """
        return plan_decide.split_names(self._db, options)

    def decide(self, options: ShardOptions, progress: Progress | None = None) -> None:
        """Give every input its verdict, cut the sources and fill the shards, in one transaction.

        Order of the rules: unusable or rejected, named twice, filtered, the same pictures as an input that came
        through so far, too short for a clip. Pictures are the same where the video's and the times asked for are,
        whatever is said of them: with `drop_duplicates` one of several texts of one part is kept, the first.

        With `val_share` all inputs of one video go the same way, by the name under which it came first. With `val_tail`
        they agree, too: the last share of the video is held out of all of them.

        Raises:
            ConfigError: see `check_splits`.
            ShardError: the inputs are not listed or not all probed, or the plan is decided already.
        """
        self._commit()
        self._expect("probing")
        with transaction(self._db):
            plan_decide.decide(self._db, self.settings, options, progress)
            self._db.execute("UPDATE meta SET value = 'decided' WHERE name = 'stage'")

    def splits(self) -> list[str]:
        """Names of the splits, those without a clip included; [""] without splits."""
        self._expect("decided")
        return [name for (name,) in self._db.execute("SELECT name FROM splits ORDER BY id")]

    def shards(self, split: str | None = None) -> Iterator[PlannedShard]:
        """All shards, or those of one split, in order."""
        self._expect("decided")
        return plan_reading.shards(self._db, split)

    def clips_of(self, split: str, number: int) -> list[tuple[Clip, VideoInfo]]:
        """The clips of one shard in their order, each with its video.

        Their sources have the text and the size that probing found, and no `text_file`.
        """
        self._expect("decided")
        return plan_reading.clips_of(self._db, split, number)

    def accounts(self, lost: Lost) -> Accounts:
        """What became of every input and clip; `lost` has key and reason of each clip that could not be made.

        Raises:
            ShardError: the plan has no such clip, or is damaged, so that its numbers do not add up.
        """
        self._expect("decided")
        with guarded(self.path):
            return plan_accounts.accounts(self._db, lost)

    def rejects(self, lost: Lost) -> Iterator[dict[str, Any]]:
        """In order of inputs: source and reason of those that cannot be used; of lost clips key, start and end, too."""
        self._expect("decided")
        return plan_accounts.rejects(self._db, lost)

    def left_out(self) -> Iterator[dict[str, Any]]:
        """In order of inputs: source and rule of those that are not wanted, with a `reason` where the rule is an
        option, and `of` where they are duplicates."""
        self._expect("decided")
        return plan_accounts.left_out(self._db)

    def _expect(self, stage: Stage) -> None:
        if self.stage != stage:
            raise ShardError(f"plan {self.path} is at the stage {self.stage!r}, this needs the stage {stage!r}")
