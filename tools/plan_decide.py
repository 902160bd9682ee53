"""The last stage of a plan: a verdict on every input, its clips, and the shards that they go to, in one pass."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.probe import VideoInfo

from .clips import Clip, cut, not_in
from .deciding import ShardFilling, clip_bytes, filtered, held_out
from .inputs import Source
from .plan_schema import INFO, PROBING, SOURCE, TEXT, USABLE, VERSION, info_of, source_of, unpacked
from .shard_options import Filters, ShardOptions

Progress = Callable[[int, int], None]  # inputs decided, of
NAMED_TWICE, SAME_PICTURES = "named twice", "same pictures"  # rules by which an input is a duplicate
_BATCH = 10_000  # rows in memory


def split_names(db: sqlite3.Connection, options: ShardOptions) -> list[str]:
    """The splits that there will be, sorted; [""] without any.

    Raises:
        ConfigError: the manifest names splits, and `val_tail` or `val_share` asks for others.
    """
    names = [name for (name,) in db.execute(f"SELECT DISTINCT split FROM inputs AS i WHERE {USABLE}")]
    named = sorted(name for name in names if name)
    option = "val_tail" if options.cutting.val_tail else "val_share" if options.val_share else ""
    if named and option:
        shown = ", ".join(named[:10])
        raise ConfigError(f"the manifest has splits ({shown}) and {option} makes others: use one of them")
    if option:
        return ["train", "val"]
    return sorted({name or "train" for name in names}) if named else [""]


def decide(
    db: sqlite3.Connection, settings: Mapping[str, Any], options: ShardOptions, progress: Progress | None
) -> None:
    """Fill `verdicts`, `splits`, `shards`, `clips` and `dropped`, inside of a transaction."""
    ((left,),) = db.execute(
        f"SELECT count(*) FROM inputs AS i WHERE {PROBING} AND i.number NOT IN (SELECT number FROM probes)"
    )
    if left:
        raise ShardError(f"{left} inputs of the plan are not probed yet: probe them before deciding")
    _Deciding(db, settings, options).run(progress)


class _Deciding:
    def __init__(self, db: sqlite3.Connection, settings: Mapping[str, Any], options: ShardOptions) -> None:
        self.db, self.options = db, options
        self.names = split_names(db, options)
        basis = json.dumps([VERSION, settings, options.to_json()], sort_keys=True)
        self.shards = {name: _Shards(number, basis, options) for number, name in enumerate(self.names)}
        self.video: _Video | None = None
        self.dropped: Counter[str] = Counter()
        self.verdicts: list[tuple[Any, ...]] = []
        self.clips: list[tuple[Any, ...]] = []

    def run(self, progress: Progress | None) -> None:
        db = self.db
        db.execute(
            "CREATE TEMP TABLE pictures (content TEXT, start_s REAL, end_s REAL, number INTEGER, "
            "PRIMARY KEY (content, start_s, end_s)) WITHOUT ROWID"
        )
        db.execute("CREATE TEMP TABLE in_parts (video INTEGER PRIMARY KEY)")  # videos of which rows take parts
        if self.options.cutting.val_tail:
            part = "start_s IS NOT NULL OR end_s IS NOT NULL"
            db.execute(f"INSERT OR IGNORE INTO temp.in_parts SELECT video FROM inputs AS i WHERE {USABLE} AND ({part})")
        ((total,),) = db.execute("SELECT count(*) FROM inputs")
        # Lists are long, and most decisions need none.
        info = INFO if self.options.transcode == "never" else INFO.replace("p.key_frames", "NULL")
        scenes = "p.scenes" if self.options.cutting.scene_threshold is not None else "NULL"
        name = "(SELECT source FROM inputs WHERE number = i.video)" if self.options.val_share else "NULL"
        rows = db.execute(
            f"SELECT i.number, i.reason, i.first, p.reason, p.size, p.content, {TEXT}, p.number, {name}, "
            f"i.video IN (SELECT video FROM temp.in_parts), {SOURCE}, {scenes}, {info} "
            "FROM inputs AS i LEFT JOIN probes AS p ON p.number = i.probe ORDER BY i.number"
        )
        for row in rows:
            self.verdicts.append((row[0], *self._verdict(row)))
            if len(self.verdicts) >= _BATCH or len(self.clips) >= _BATCH:
                self._flush()
                if progress:
                    progress(row[0] + 1, total)
        self._flush()
        db.executemany("INSERT INTO splits VALUES (?, ?)", enumerate(self.names))
        for shards in self.shards.values():
            shards.finish()
        self._flush()
        db.executemany("INSERT INTO dropped VALUES (?, ?)", sorted(self.dropped.items()))
        for table in ("pictures", "in_parts"):
            db.execute(f"DROP TABLE temp.{table}")
        if progress:
            progress(total, total)

    def _flush(self) -> None:
        self.db.executemany("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", self.verdicts)
        self.db.executemany("INSERT INTO clips VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", self.clips)
        self.verdicts.clear()
        self.clips.clear()
        for shards in self.shards.values():
            self.db.executemany("INSERT INTO shards VALUES (?, ?, ?, ?)", shards.finished)
            shards.finished.clear()

    def _verdict(self, row: tuple[Any, ...]) -> tuple[str, str | None, str | None, int | None, int | None]:
        """kind, rule, reason, first, num_clips of one input, whose clips are placed on the way."""
        number, unusable, first, rejected, size, content, text, probe, name, in_parts = row[:10]
        if first is not None:
            return "duplicate", NAMED_TWICE, None, first, None
        if unusable is not None or rejected is not None:
            return "rejected", None, unusable or rejected, None, None
        if self.video is None or self.video.number != probe:
            self.video = _Video(probe, info_of(row[22:]), unpacked(row[21]) if row[21] else ())
        source, video, info = source_of(row[10:21]), self.video, self.video.info
        if reason := not_in(source, info):
            return "rejected", None, reason, None, None
        filters = self.options.filters
        if filters != _NO_FILTERS and (found := filtered(info, source, filters)):
            return "filtered", found.rule, found.reason, None, None
        if self.options.drop_duplicates and (same := self._same(number, content, source)) is not None:
            return "duplicate", SAME_PICTURES, None, same, None
        result = cut(source, info, video.scenes, self.options, self._split(source, name), video.times, bool(in_parts))
        if result.dropped:
            self.dropped.update(result.dropped)
        if not result.clips:
            return "filtered", result.left_out, None, None, None
        identity = json.dumps([source.source, size, content, text, row[18]]).encode()  # 18: the other columns, as JSON
        for split, clip in result.clips:
            self._place(split, clip, number, info, size, identity)
        return "sampled", None, None, None, len(result.clips)

    def _same(self, number: int, content: str, source: Source) -> int | None:
        """The earlier input with the same pictures, None for the first."""
        part = (content, source.start or 0.0, -1.0 if source.end is None else source.end)
        if self.db.execute("INSERT OR IGNORE INTO temp.pictures VALUES (?, ?, ?, ?)", (*part, number)).rowcount:
            return None
        ((same,),) = self.db.execute(
            "SELECT number FROM temp.pictures WHERE (content, start_s, end_s) = (?, ?, ?)", part
        )
        return int(same)

    def _split(self, source: Source, name: str) -> str:
        """The split of all clips of a source; `name` is that under which its video came first."""
        if self.options.val_share:
            return "val" if held_out(name, self.options.val_share) else "train"
        return source.split or ("" if self.names == [""] else "train")

    def _place(self, split: str, clip: Clip, number: int, info: VideoInfo, size: int, identity: bytes) -> None:
        first, stop = clip.frames or (None, None)
        own = f"{clip.key}\0{clip.start!r}\0{clip.end!r}\0{first}\0{stop}\0"
        place = self.shards[split].add(clip_bytes(clip, info, size), own.encode() + identity)
        self.clips.append((*place, number, clip.key, clip.start, clip.end, first, stop))


_NO_FILTERS = Filters()


class _Video:
    """What was probed, kept for the parts of it that follow one another."""

    def __init__(self, number: int, info: VideoInfo, scenes: tuple[int, ...]) -> None:
        self.number, self.info, self.scenes = number, info, scenes
        self._times: np.ndarray | None = None

    def times(self) -> np.ndarray:
        if self._times is None:
            self._times = self.info.times()
        return self._times


class _Shards:
    """The shards of one split, filled one after the other."""

    def __init__(self, split: int, basis: str, options: ShardOptions) -> None:
        self.split, self.basis = split, hashlib.sha256(basis.encode())
        self.filling = ShardFilling(options.samples_per_shard, options.bytes_per_shard)
        self.finished: list[tuple[int, int, int, str]] = []  # split, number, num_clips, digest
        self.number, self.num_clips = 0, 0
        self.hash = self.basis.copy()

    def add(self, num_bytes: int, identity: bytes) -> tuple[int, int, int]:
        """Split, shard and position of the next clip."""
        number = self.filling.place(num_bytes)
        if number != self.number:
            self.finish()
            self.number, self.num_clips, self.hash = number, 0, self.basis.copy()
        self.hash.update(identity)
        self.num_clips += 1
        return self.split, number, self.num_clips - 1

    def finish(self) -> None:
        if self.num_clips:
            self.finished.append((self.split, self.number, self.num_clips, self.hash.hexdigest()[:32]))
