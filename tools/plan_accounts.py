"""What became of every input and of every clip of a decided plan, once it is known which clips could not be made."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from framestream.pipeline.errors import ShardError

from .plan_schema import TEXT, readable, scratch


@dataclass(frozen=True)
class Accounts:
    """Every input and every clip, counted once.

    Attributes:
        found: inputs = sampled + rejected + filtered + duplicates.
        sampled: inputs with a clip that was written.
        rejected: inputs that cannot be used, those all of whose clips were lost included.
        filtered: inputs that are not wanted, by rule.
        with_text: of the inputs that clips are planned of, those with a text.
        duplicates: inputs that were named twice, or have the pictures of an earlier one, whatever is said of them.
        clips_planned: = clips_written + clips_rejected.
        clips_dropped: clips that are not worth making and were not planned, by rule.
    """

    found: int
    sampled: int
    with_text: int
    rejected: int
    filtered: dict[str, int]
    duplicates: int
    clips_planned: int
    clips_written: int
    clips_rejected: int
    clips_dropped: dict[str, int]


def accounts(db: sqlite3.Connection, lost: Iterable[tuple[str, str]]) -> Accounts:
    """Count; `lost` are key and reason of the clips that could not be made.

    Raises:
        ShardError: the plan has no such clip.
        sqlite3.DatabaseError: the plan does not add up.
    """
    num_lost = _keep_lost(db, lost)
    kinds = dict(db.execute("SELECT kind, count(*) FROM verdicts GROUP BY kind"))
    filtered = dict(
        db.execute("SELECT rule, count(*) FROM verdicts WHERE kind = 'filtered' GROUP BY rule ORDER BY rule")
    )
    planned = _add_up(db, sum(kinds.values()))
    ((with_text,),) = db.execute(
        "SELECT count(*) FROM verdicts AS v JOIN inputs AS i ON i.number = v.number JOIN probes AS p "
        f"ON p.number = i.probe WHERE v.kind = 'sampled' AND coalesce({TEXT}, '') != ''"
    )
    ((all_lost,),) = db.execute(
        "SELECT count(*) FROM (SELECT input, count(*) AS n FROM temp.lost_clips GROUP BY input) AS l "
        "JOIN verdicts AS v ON v.number = l.input WHERE v.num_clips = l.n"
    )
    return Accounts(
        found=sum(kinds.values()),
        sampled=kinds.get("sampled", 0) - all_lost,
        with_text=with_text,
        rejected=kinds.get("rejected", 0) + all_lost,
        filtered=filtered,
        duplicates=kinds.get("duplicate", 0),
        clips_planned=planned,
        clips_written=planned - num_lost,
        clips_rejected=num_lost,
        clips_dropped=dict(db.execute("SELECT rule, num_clips FROM dropped ORDER BY rule")),
    )


def _add_up(db: sqlite3.Connection, num_verdicts: int) -> int:
    """How many clips are planned. Every input has to have a verdict, and every clip a place in a shard."""
    ((num_inputs,),) = db.execute("SELECT count(*) FROM inputs")
    if num_verdicts != num_inputs:
        raise sqlite3.DatabaseError(f"it has {num_inputs} inputs and verdicts on {num_verdicts}")
    ((planned,),) = db.execute("SELECT coalesce(sum(num_clips), 0) FROM verdicts")
    ((in_shards,),) = db.execute("SELECT coalesce(sum(num_clips), 0) FROM shards")
    ((num_clips,),) = db.execute("SELECT count(*) FROM clips")
    if not planned == in_shards == num_clips:
        raise sqlite3.DatabaseError(
            f"its inputs have {planned} clips, its shards {in_shards}, and {num_clips} are there"
        )
    return int(planned)


def rejects(db: sqlite3.Connection, lost: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """In input order: source and reason of inputs, and key, start and end too of `lost` clips."""
    _keep_lost(db, lost)
    rows = db.execute(
        "SELECT i.source, v.reason, NULL, -1.0, NULL, v.number FROM verdicts AS v "
        "JOIN inputs AS i ON i.number = v.number WHERE v.kind = 'rejected' "
        "UNION ALL SELECT i.source, l.reason, l.key, l.start_s, l.end_s, l.input FROM temp.lost_clips AS l "
        "JOIN inputs AS i ON i.number = l.input ORDER BY 6, 4, 3"
    )
    for source, reason, key, start, end, _ in rows:
        clip = {} if key is None else {"key": key, "start": start, "end": end}
        yield {"source": source, "reason": reason, **clip}


def left_out(db: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    """In input order: source and rule of inputs that are filtered (reason: with the numbers) or duplicates (`of`)."""
    rows = db.execute(
        "SELECT i.source, v.rule, v.reason, f.source FROM verdicts AS v JOIN inputs AS i ON i.number = v.number "
        "LEFT JOIN inputs AS f ON f.number = v.first WHERE v.kind IN ('filtered', 'duplicate') ORDER BY v.number"
    )
    for source, rule, reason, of in rows:
        record = {"source": source, "rule": rule, "reason": reason, "of": of}
        yield {name: value for name, value in record.items() if value is not None}


def _keep_lost(db: sqlite3.Connection, lost: Iterable[tuple[str, str]]) -> int:
    """Fill the temporary table `lost_clips`; return how many there are."""
    with scratch(db):
        db.execute("CREATE TEMP TABLE IF NOT EXISTS lost (key TEXT PRIMARY KEY, reason TEXT) WITHOUT ROWID")
        db.execute("CREATE TEMP TABLE IF NOT EXISTS lost_clips (input INTEGER, key, start_s, end_s, reason)")
        for table in ("lost", "lost_clips"):
            db.execute(f"DELETE FROM temp.{table}")
        rows = ((key, readable(reason)) for key, reason in lost)
        db.executemany("INSERT OR IGNORE INTO temp.lost VALUES (?, ?)", rows)
        # One pass over the clips, in this order of tables: keys have no index.
        db.execute(
            "INSERT INTO temp.lost_clips SELECT c.input, c.key, c.start_s, c.end_s, l.reason "
            "FROM clips AS c CROSS JOIN temp.lost AS l ON l.key = c.key"
        )
        unknown = db.execute(
            "SELECT key FROM temp.lost WHERE key NOT IN (SELECT key FROM temp.lost_clips) ORDER BY key LIMIT 1"
        ).fetchone()
        if unknown:
            raise ShardError(f"clip {unknown[0]} is said to be lost, but the plan has no such clip: plan anew")
        ((num_lost,),) = db.execute("SELECT count(*) FROM temp.lost_clips")
    return int(num_lost)
