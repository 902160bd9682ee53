"""A sharding run in its three steps: plan everything, make the shards (all, or a part of them), finish the set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from framestream.pipeline.errors import ConfigError, StorageError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import FOLDER_INDEX

from .engines import Engine, NumberedProbe
from .inputs import Source, Unusable, list_inputs, nothing_found
from .making import encoder_version
from .output import Output, read_all
from .plan_listing import settings_difference
from .plan_place import PlanPlace
from .plan_schema import PlanError
from .plan_store import PlannedShard, PlanStore
from .pool import Failure
from .probing import probe_task
from .set_files import LISTS
from .shard_options import ShardOptions
from .shard_report import ShardReport, finish
from .units import Outcome, files_of, finished, in_split, our_files, unfinished, unit_name, units_of

PLAN_VERSION = 5  # to be raised where the same inputs would be planned otherwise
LOCK_FILE = ".lock"
# Of packets' places in a plan, about; files beyond that are looked at again when they are copied. A plan of a remote
# output is sent there, and to every part.
PACKETS_BYTES, REMOTE_PACKETS_BYTES = 4 << 30, 256 << 20
BYTES_PER_VIDEO, BYTES_PER_PACKET = 350, 10  # of these

Progress = Callable[[str, int, int | None, int], None]  # step, done, of (None: not known yet), rejects


def counted(items: Iterable[Source | Unusable], progress: Progress) -> Iterator[Source | Unusable]:
    """The inputs, each told as it has been taken; how many there are is not known yet."""
    for number, item in enumerate(items, start=1):
        yield item
        progress("listing", number, None, 0)


class Part(NamedTuple):
    """Every `of`-th shard, from the `number`-th (1 to `of`) on."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`3/8`. Raises ConfigError."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ConfigError(f"part is {text!r}, it has to be I/N with I from 1 to N, such as 3/8")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class Unfinished(NamedTuple):
    """A set of which so many shards are there, of how many; other parts make the rest."""

    num_finished: int
    num_shards: int


@dataclass
class ShardJob:
    """One output, and how it is made. The steps can be run again at any time; what is done already is kept.

    Attributes:
        work: folder for the plan of a remote output while it is built; None for one in the cache.
        reject_unfetched: sources that the storage does not give are rejects; else the run ends with StorageError.
    """

    output: Output
    options: ShardOptions
    engine: Engine
    remote: Remote
    progress: Progress = lambda step, done, total, rejects: None
    work: str | Path | None = None
    reject_unfetched: bool = False
    place: PlanPlace = field(init=False)

    def __post_init__(self) -> None:
        self.place = PlanPlace(self.output, self.work)

    @contextmanager
    def alone(self, part: Part | None = None) -> Iterator[None]:
        """Hold the output for a whole run, or a part of it: parts of one division run at the same time, and no others.

        Raises:
            ConfigError: another run has it.
        """
        from filelock import FileLock, Timeout

        self.output.begin()
        self.place.prepare()
        own = None if part is None else f"{LOCK_FILE}-{part.number}-of-{part.of}"
        division = None if part is None else f"-of-{part.of}"
        try:
            with ExitStack() as held:
                whole = held.enter_context(ExitStack())
                whole.enter_context(FileLock(str(self.place.folder / LOCK_FILE), timeout=5 if part else 0))
                for name in sorted(os.listdir(self.place.folder)):
                    if name.startswith(LOCK_FILE + "-") and name != own and not (division and name.endswith(division)):
                        with FileLock(str(self.place.folder / name), timeout=0):
                            pass
                if own is not None:
                    held.enter_context(FileLock(str(self.place.folder / own), timeout=0))
                    whole.close()  # others may begin
                yield
        except Timeout as err:
            raise ConfigError(
                f"another run is writing to {self.output.place}: wait for it or name another folder"
            ) from err

    # --- the plan -------------------------------------------------------------------------------------------------

    def plan(self, inputs: Sequence[str], *, overwrite: bool = False) -> PlanStore:
        """The decided plan: the one that is there, where inputs and options are the same, or a new one.

        Raises:
            ConfigError: impossible options, no video in the inputs, or an output that belongs to another run.
            StorageError: sources could not be fetched.
        """
        settings = self._settings()
        with ExitStack() as stack:
            plan = self._begun(stack, settings, inputs, overwrite)
            if plan is None:
                plan = stack.enter_context(self._new(settings, inputs, overwrite))
            if plan.stage == "probing":
                self._probe(plan)
                plan.decide(self.options, lambda done, total: self.progress("deciding", done, total, plan.num_rejected))
        self.place.publish()
        return self.place.decided()

    def _begun(
        self, stack: ExitStack, settings: Mapping[str, Any], inputs: Sequence[str], overwrite: bool
    ) -> PlanStore | None:
        """The plan that is there, if it is the one that is asked for; None where there is none, or it may go."""
        try:
            plan = self.place.begun()
        except PlanError as err:
            if overwrite:
                return None
            raise ConfigError(f"{err}, or set overwrite") from err
        if plan is None:
            return None
        begun = stack.enter_context(plan)
        difference = begun.difference(settings, list_inputs(inputs, remote=self.remote))
        if not difference:
            return begun
        if not overwrite:
            raise ConfigError(
                f"{self.output.place} holds the shards of another run ({difference}): name another output folder, put "
                "things back as they were, or set overwrite to remove what is there"
            )
        stack.close()
        return None

    def _new(self, settings: Mapping[str, Any], inputs: Sequence[str], overwrite: bool) -> PlanStore:
        """A plan with all inputs. Only when these are known to make one, what is there is removed."""
        if not overwrite:
            self._clear([""])
        other_files: Counter[str] = Counter()
        items = list_inputs(inputs, remote=self.remote, other_files=other_files)
        with PlanStore.create(self.place.new(), settings) as plan:
            plan.add_inputs(counted(items, self.progress), other_files)
            self.progress("listing", plan.num_inputs, plan.num_inputs, plan.num_rejected)
            if not plan.num_inputs:
                raise ConfigError(nothing_found(inputs, other_files))
            splits = plan.check_splits(self.options)
        self._clear(splits)
        return self.place.take_new()

    def _clear(self, splits: Sequence[str]) -> None:
        """Remove what the run of the plan that is there wrote; without one, make sure that nobody's files are there.

        Raises:
            ConfigError: there are files of others that a new run would write over; nothing was removed.
        """
        folders, prefix, ours = {"", *splits}, "", False
        planned: set[str] | None = None  # where the plan can be read
        if self.place.path.exists():
            ours, prefix = True, self.options.prefix
            with suppress(PlanError), PlanStore.open(self.place.path) as before:
                prefix = str(before.settings["options"]["prefix"])
                shards, options = [], replace(self.options, prefix=prefix)
                if before.stage == "decided":
                    folders |= set(before.splits())
                    shards = list(before.shards())
                planned = {name for shard in shards for name in files_of(unit_name(options, shard))}
        doomed: list[str] = []
        for split in sorted(folders):
            names = self.output.sizes(split)
            lists = [name for name in names if name in (FOLDER_INDEX, *(() if split else LISTS))]
            written = [n for n in our_files(names, prefix) if planned is None or in_split(split, n) in planned]
            mine = [*lists, *written, *unfinished(names, prefix)] if ours else []
            doomed += [in_split(split, name) for name in mine]
            for name in sorted(set(names) - set(mine)):
                if name.endswith(".tar") or name in lists:
                    raise ConfigError(f"{self.output.place} has {name} from elsewhere: name an empty output folder")
        for name in sorted(doomed, key=lambda name: name.endswith((".tar", ".idx.json"))):  # what speaks of them first
            self.output.remove(name)
        if ours:
            self.place.remove()

    def check(self, plan: PlanStore) -> None:
        """Whether a plan that is there is of this job's options. Raises ConfigError."""
        if difference := settings_difference(plan.settings, self._settings()):
            raise ConfigError(
                f"the plan in {self.output.place} is of other options ({difference}): give those it was made with"
            )

    def _settings(self) -> dict[str, Any]:
        options = {**self.options.to_json(), "encoder": encoder_version(self.options)}
        return {"version": PLAN_VERSION, "options": options}

    def _probe(self, plan: PlanStore) -> None:
        probes = (
            NumberedProbe(number, probe_task(source, self.options, self.remote)) for number, source in plan.to_probe()
        )
        unfetched = _Unfetched("sources could not be fetched", in_a_row=32)
        room = (REMOTE_PACKETS_BYTES if is_url(self.output.place) else PACKETS_BYTES) - plan.packets_bytes()
        for number, outcome in self.engine.probe(probes):
            if not isinstance(outcome, Failure):
                packets = outcome.info.packets
                room -= 0 if packets is None else BYTES_PER_VIDEO + BYTES_PER_PACKET * len(packets)
                plan.record(number, outcome if room >= 0 else outcome.in_short())
            elif outcome.storage and not self.reject_unfetched:
                unfetched.add(outcome.reason)
                continue
            else:
                plan.record(number, outcome.reason)
            unfetched.interrupted()
            self.progress("probing", plan.num_probed, plan.num_to_probe, plan.num_rejected)
        unfetched.end()

    # --- the shards -----------------------------------------------------------------------------------------------

    def write(self, plan: PlanStore, part: Part | None = None) -> None:
        """Make the shards that are missing, of all or of one part."""
        if part is None:
            self._sweep(plan)
        todo, done, total, lost = [], 0, 0, 0
        for shard, outcome in self.outcomes(plan, part):
            total += shard.num_clips
            if outcome is None:
                todo.append(shard)
            else:
                done, lost = done + shard.num_clips, lost + len(outcome.lost)
        self.progress("writing", done, total, plan.num_rejected + lost)
        for split in {shard.split for shard in todo}:
            self.output.prepare(split)
        if not todo:
            return
        unfetched = _Unfetched("shards could not be made", in_a_row=8)
        for step in self.engine.write(units_of(plan, todo, self.options, self.remote), self.output):
            done, lost = done + step.clips, lost + step.lost
            if step.unfetched:
                unfetched.add(step.unfetched)
            elif step.outcome:
                unfetched.interrupted()
            self.progress("writing", done, total, plan.num_rejected + lost)
        unfetched.end()

    def _sweep(self, plan: PlanStore) -> None:
        """Remove what killed runs left unfinished. Raises ConfigError where there are shards that nobody planned."""
        for split in plan.splits():
            units = (unit_name(self.options, shard) for shard in plan.shards(split))
            planned = {name.rpartition("/")[2] for unit in units for name in files_of(unit)}
            names = self.output.sizes(split)
            for name in our_files(names, self.options.prefix):
                if name not in planned:
                    raise ConfigError(
                        f"{self.output.place} has {name}, which is not in its plan: move it elsewhere, or readers take "
                        "it for a part of the set"
                    )
            for name in unfinished(names, self.options.prefix):
                self.output.remove(in_split(split, name))

    def outcomes(self, plan: PlanStore, part: Part | None = None) -> Iterator[tuple[PlannedShard, Outcome | None]]:
        """All shards in order, or those of a part, with what became of them; None where that is still to come."""
        sizes: dict[str, int] = {}
        for split in plan.splits():
            sizes |= {in_split(split, name): n for name, n in self.output.sizes(split).items()}

        def wanted() -> Iterator[PlannedShard]:
            for number, shard in enumerate(plan.shards()):
                if part is None or number % part.of == part.number - 1:
                    yield shard

        def index_of(shard: PlannedShard) -> str | None:
            tar, index, lost = files_of(unit_name(self.options, shard))
            name = index if tar in sizes else lost
            return name if name in sizes else None

        files = read_all(self.output, map(index_of, wanted()))
        for shard, data in zip(wanted(), files, strict=True):
            name = unit_name(self.options, shard)
            yield shard, finished(shard, name, sizes.get(files_of(name)[0]), data)

    def finish(self, plan: PlanStore) -> ShardReport | Unfinished:
        """Write index and report, where all shards are there."""
        outcomes = [(shard.split, outcome) for shard, outcome in self.outcomes(plan)]
        whole = [(split, outcome) for split, outcome in outcomes if outcome is not None]
        if len(whole) < len(outcomes):
            return Unfinished(len(whole), len(outcomes))
        return finish(plan, whole, self.output)


class _Unfetched:
    """Counts what could not be had of the storage, and ends the run: when all else is done, or where nothing works."""

    def __init__(self, what: str, in_a_row: int) -> None:
        self._what, self._limit = what, in_a_row
        self._first, self._count, self._row = "", 0, 0

    def add(self, reason: str) -> None:
        self._first, self._count, self._row = self._first or reason, self._count + 1, self._row + 1
        if self._row >= self._limit:
            self.end()

    def interrupted(self) -> None:
        self._row = 0

    def end(self) -> None:
        """Raise StorageError, if there was anything."""
        if self._count:
            raise StorageError(
                f"{self._count} {self._what}; the first: {self._first}. The same command tries these again, and with "
                "reject_unfetched it counts what still cannot be had as rejected"
            )
