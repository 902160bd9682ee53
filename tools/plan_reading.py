"""What a decided plan says: its shards, and the clips of one of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace

from framestream.pipeline.errors import SampleError
from framestream.pipeline.probe import VideoInfo
from framestream.pipeline.video_index import VideoIndex

from .clips import Clip
from .inputs import Source
from .plan_schema import INFO, SOURCE, TEXT, info_of, source_of


@dataclass(frozen=True)
class PlannedShard:
    """One shard of a decided plan.

    Attributes:
        number: within its split, from 0.
        digest: names all that decides its bytes: the plan's settings, and its clips in their order.
    """

    split: str
    number: int
    num_clips: int
    digest: str


def shards(db: sqlite3.Connection, split: str | None) -> Iterator[PlannedShard]:
    """All shards, or those of one split, in order."""
    rows = db.execute(
        "SELECT p.name, s.number, s.num_clips, s.digest FROM splits AS p CROSS JOIN shards AS s ON s.split = p.id "
        "WHERE :name IS NULL OR p.name = :name ORDER BY s.split, s.number",
        {"name": split},
    )
    return (PlannedShard(*row) for row in rows)


def clips_of(db: sqlite3.Connection, split: str, number: int) -> list[tuple[Clip, VideoInfo]]:
    """The clips of one shard in their order, each with its video; clips of one video share it."""
    rows = db.execute(
        "SELECT c.input, i.probe, c.key, c.start_s, c.end_s, c.first, c.stop FROM splits AS p "
        "JOIN clips AS c ON c.split = p.id JOIN inputs AS i ON i.number = c.input "
        "WHERE p.name = ? AND c.shard = ? ORDER BY c.position",
        (split, number),
    ).fetchall()
    sources = {each: _source(db, each) for each in {row[0] for row in rows}}
    infos = {probe: _info(db, probe) for probe in {row[1] for row in rows}}
    return [
        (Clip(sources[each], key, start, end, None if first is None else (first, stop)), infos[probe])
        for each, probe, key, start, end, first, stop in rows
    ]


def _source(db: sqlite3.Connection, number: int) -> Source:
    query = f"SELECT {TEXT}, p.size, p.sha256, {SOURCE} FROM inputs AS i JOIN probes AS p ON p.number = i.probe"
    ((text, size, sha256, *row),) = db.execute(f"{query} WHERE i.number = ?", (number,))
    return replace(source_of(row), text=text, text_file=None, size=size, sha256=sha256 or "")


def _info(db: sqlite3.Connection, probe: int) -> VideoInfo:
    ((*row, packets),) = db.execute(f"SELECT {INFO}, p.packets FROM probes AS p WHERE p.number = ?", (probe,))
    info = info_of(row)
    if packets is None:
        return info
    try:
        return replace(info, packets=VideoIndex.from_json(json.loads(packets)))
    except (SampleError, ValueError) as err:
        raise sqlite3.DatabaseError("a list of packets in it cannot be read") from err
