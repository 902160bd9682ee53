"""The tables of a plan, and how sources and videos are kept in them."""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framestream.pipeline.atomic import TEMP_SUFFIX, fsync
from framestream.pipeline.errors import ShardError
from framestream.pipeline.probe import VideoInfo

from .inputs import Source, Unusable

if TYPE_CHECKING:
    from .probing import Probed

APPLICATION_ID = 0x46535031  # "FSP1": says that an SQLite file is a plan
VERSION = 5
JOURNAL_SUFFIX = "-journal"  # of the file beside a plan in which SQLite keeps what a transaction overwrites
_CACHE_KIB = 64 << 10  # of pages, for the plan and for its temporary tables
LOCK_TIMEOUT_S = 10.0  # how long another process may be writing

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- As listed. `number` is the order, from 0; `reason` why an input cannot be used, then it has no path.
-- `key` is the unique one; inputs that are named twice have none, and the number of the first in `first`.
-- `video` is the number of the first input with the same video, named twice or not; `probe` that of the first one with
-- the same video and text file, too: it is probed for all of them.
CREATE TABLE inputs (
    number INTEGER PRIMARY KEY, source TEXT NOT NULL, path TEXT, wanted_key TEXT, text TEXT, text_file TEXT,
    split TEXT, start_s REAL, end_s REAL, user TEXT, size INTEGER, version TEXT, reason TEXT,
    key TEXT, first INTEGER, video INTEGER, probe INTEGER
);

-- What probing said: `reason` why an input is rejected, or all the rest. Lists are deflated JSON, NULL where they are
-- what VideoInfo takes by default. Of files that are copied whole `sha256` is that of their bytes, and `packets` the
-- JSON of a VideoIndex.
CREATE TABLE probes (
    number INTEGER PRIMARY KEY, reason TEXT, size INTEGER, content TEXT, text TEXT,
    num_frames INTEGER, fps REAL, duration REAL, width INTEGER, height INTEGER, codec TEXT, rotation INTEGER,
    has_audio INTEGER, pix_fmt TEXT, key_frames BLOB, timestamps BLOB, scenes BLOB, sha256 TEXT, packets TEXT
);

-- What became of every input: `sampled` (num_clips), `rejected` (reason), `filtered` (rule, and reason where there is
-- more to say), `duplicate` (of input `first`).
CREATE TABLE verdicts (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, rule TEXT, reason TEXT, first INTEGER, num_clips INTEGER
);
CREATE TABLE splits (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE shards (
    split INTEGER, number INTEGER, num_clips INTEGER NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (split, number)
) WITHOUT ROWID;

-- `input` is the number of its source; `first` to before `stop` are its frames, NULL for the whole file.
CREATE TABLE clips (
    split INTEGER, shard INTEGER, position INTEGER, input INTEGER NOT NULL, key TEXT NOT NULL,
    start_s REAL NOT NULL, end_s REAL NOT NULL, first INTEGER, stop INTEGER, PRIMARY KEY (split, shard, position)
) WITHOUT ROWID;
CREATE TABLE dropped (rule TEXT PRIMARY KEY, num_clips INTEGER NOT NULL) WITHOUT ROWID;
"""

# The columns of `inputs` that come from the listing, and all of `probes`.
LISTED = (
    "source", "path", "wanted_key", "text", "text_file", "split", "start_s", "end_s", "user", "size", "version",
    "reason",
)  # fmt: skip
PROBED = (
    "number", "reason", "size", "content", "text", "num_frames", "fps", "duration", "width", "height", "codec",
    "rotation", "has_audio", "pix_fmt", "key_frames", "timestamps", "scenes", "sha256", "packets",
)  # fmt: skip
INFO = (
    "p.num_frames, p.fps, p.duration, p.width, p.height, p.codec, p.rotation, p.has_audio, p.pix_fmt, p.key_frames, "
    "p.timestamps"
)
SOURCE = "i.path, i.source, i.key, i.text, i.text_file, i.split, i.start_s, i.end_s, i.user, i.size, i.version"
# An input's text, where p is its probe: what was found beside the video holds for all parts of it.
TEXT = "CASE WHEN i.number = p.number OR i.text_file IS NOT NULL THEN p.text ELSE i.text END"
USABLE = "i.path IS NOT NULL AND i.first IS NULL"  # of `inputs` as i
PROBING = "i.probe = i.number"  # those of them that are probed, for themselves and others


def create(path: Path, settings: Mapping[str, Any]) -> None:
    """A new plan of no inputs, whole or not at all. Raises ShardError where there is one."""
    if path.exists():
        raise ShardError(f"plan {path} exists already: go on with it, or remove it to begin anew")
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    temporary.unlink(missing_ok=True)
    try:
        with guarded(path):
            db = _connect(temporary, "rwc")
            try:
                db.executescript(SCHEMA)
                rows = [("settings", json.dumps(settings)), ("stage", "listing")]
                db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            finally:
                db.close()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """An existing plan. Raises ShardError, in words, where it is missing, damaged, foreign or of another version."""
    if not path.is_file():
        raise ShardError(f"plan {path} does not exist: check the path")
    if readonly:
        _roll_back(path)
    with guarded(path):
        db = _connect(path, "ro" if readonly else "rw")
        try:
            ((application,),) = db.execute("PRAGMA application_id")
            ((version,),) = db.execute("PRAGMA user_version")
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error:
            db.close()
            raise
    if (application, version) == (APPLICATION_ID, VERSION):
        return db
    db.close()
    if application != APPLICATION_ID:
        raise PlanError(f"{path} is no plan of framestream: name another file, or remove it to begin anew")
    raise PlanError(
        f"plan {path} has version {version}, this framestream reads version {VERSION}: go on with the framestream that "
        "made it, or remove it to begin anew"
    )


def _roll_back(path: Path) -> None:
    """Undo what a killed process had half written: a connection that only reads must not, and so cannot read."""
    journal = path.with_name(path.name + JOURNAL_SUFFIX)
    try:
        if not journal.stat().st_size:
            return
    except FileNotFoundError:
        return
    with guarded(path):
        try:
            _connect(path, "rw").close()  # it looks into the file, and that is enough
        except sqlite3.OperationalError as err:
            if "locked" in str(err):  # by a run that is at work
                raise
            raise ShardError(
                f"plan {path} was left half written by a killed process, and cannot be put right here ({err}): "
                f"run the same `framestream shard INPUTS --output OUTPUT` again where {path.parent} can be written; it "
                "goes on from here"
            ) from err


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=LOCK_TIMEOUT_S
    )
    # With a rollback journal, and not a log: tables are filled and hardly ever changed, so little is written twice.
    db.execute("PRAGMA temp_store = FILE")
    for schema in ("main", "temp"):
        db.execute(f"PRAGMA {schema}.cache_size = -{_CACHE_KIB}")
    return db


class PlanError(ShardError):
    """A file that is no plan of this version, or damaged: going on from it is not possible."""


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Errors of SQLite as ShardErrors that say what to do."""
    try:
        yield
    except sqlite3.OperationalError as err:  # the surroundings: a full disk, a lock, no right to write
        raise ShardError(f"plan {path} cannot be used now ({err}); run again to go on from here") from err
    except sqlite3.DatabaseError as err:
        raise PlanError(f"plan {path} is damaged ({err}): remove it to begin anew") from err


@contextmanager
def transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All of the block is written, or nothing."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has ended it already
            db.execute("ROLLBACK")
        raise


def scratch(db: sqlite3.Connection) -> AbstractContextManager[None]:
    """A transaction on temporary tables alone, which a plan that is only read allows, too."""
    return transaction(db, "DEFERRED")


def listed_row(item: Source | Unusable) -> tuple[Any, ...]:
    """The `LISTED` columns of an input."""
    if isinstance(item, Unusable):
        return (item.source, None, None, None, None, "", None, None, None, -1, "", readable(item.reason))
    user = json.dumps(dict(item.user)) if item.user else None
    return (
        item.source, _path(item.path), item.key, item.text, _path(item.text_file), item.split, item.start, item.end,
        user, item.size, item.version, None,
    )  # fmt: skip


def _path(name: str | None) -> str | bytes | None:
    """A path as SQLite can hold it: bytes where it is no Unicode."""
    if name is None:
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def readable(reason: str) -> str:
    """A sentence that may name a path which is no Unicode."""
    return reason.encode("utf-8", "backslashreplace").decode()


def source_of(row: Sequence[Any]) -> Source:
    """The source of the `SOURCE` columns."""
    path, source, key, text, text_file, split, start, end, user, size, version = row
    path, text_file = (os.fsdecode(name) if isinstance(name, bytes) else name for name in (path, text_file))
    return Source(
        path, source, key, text, text_file, split, start, end, json.loads(user) if user else {}, size, version
    )


def probed_row(number: int, outcome: Probed | str) -> tuple[Any, ...]:
    """The `PROBED` columns of an outcome."""
    if isinstance(outcome, str):
        return (number, readable(outcome), *[None] * (len(PROBED) - 2))
    info = outcome.info
    return (
        number, None, outcome.size, outcome.content, outcome.text, info.num_frames, info.fps, info.duration,
        info.width, info.height, info.codec, info.rotation, info.has_audio, info.pix_fmt,
        None if info.key_frames == (0,) else _packed(info.key_frames),
        None if info.timestamps is None else _packed(info.timestamps),
        _packed(outcome.scenes) if outcome.scenes else None,
        outcome.sha256 or None,
        None if info.packets is None else json.dumps(info.packets.to_json()),
    )  # fmt: skip


def info_of(row: Sequence[Any]) -> VideoInfo:
    """The video of the columns from `num_frames` to `timestamps`."""
    num_frames, fps, duration, width, height, codec, rotation, has_audio, pix_fmt, key_frames, timestamps = row
    return VideoInfo(
        num_frames, fps, duration, width, height, codec, rotation,
        (0,) if key_frames is None else unpacked(key_frames),
        None if timestamps is None else unpacked(timestamps),
        bool(has_audio), pix_fmt,
    )  # fmt: skip


def _packed(numbers: Sequence[float]) -> bytes:
    return zlib.compress(json.dumps(numbers).encode())


def unpacked(blob: bytes) -> tuple[Any, ...]:
    """The numbers of a deflated list."""
    try:
        return tuple(json.loads(zlib.decompress(blob)))
    except (zlib.error, ValueError) as err:
        raise sqlite3.DatabaseError("a list in it cannot be read") from err
