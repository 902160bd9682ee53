"""The listing in a plan: inputs are written once, their keys made unique, and a later listing compared with it."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Any

from framestream.pipeline.shard_paths import is_url

from .inputs import Source, Unusable, slug
from .plan_schema import LISTED, listed_row, scratch
from .urls import absolute, path_in

_COLUMNS = ", ".join(LISTED)
_IN_WORDS = {"wanted_key": "key", "text_file": "text file", "start_s": "start", "end_s": "end", "user": "metadata",
             "version": "time or version"}  # fmt: skip
_SAME = "a.source = b.source AND a.nth = b.nth"  # the same input in two listings: the n-th of that name


def write_inputs(db: sqlite3.Connection, items: Iterable[Source | Unusable]) -> None:
    """Fill the table `inputs`, inside of a transaction."""
    tables = ("named", "videos", "probing")
    for table in tables:
        db.execute(f"CREATE TEMP TABLE {table} (place BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
    columns = f"number, {_COLUMNS}, key, first, video, probe"
    marks = ", ".join("?" * (len(LISTED) + 5))
    db.executemany(f"INSERT INTO inputs ({columns}) VALUES ({marks})", _rows(db, items))
    for table in tables:
        db.execute(f"DROP TABLE temp.{table}")
    _make_keys_unique(db)


def _rows(db: sqlite3.Connection, items: Iterable[Source | Unusable]) -> Iterator[tuple[Any, ...]]:
    folder = lru_cache(maxsize=1024)(absolute)  # links are followed once
    for number, item in enumerate(items):
        key = first = video = probe = None
        if isinstance(item, Source):
            path, text_file = _place(item.path, folder), _place(item.text_file, folder)
            part = [None if seconds is None else float(seconds) for seconds in (item.start, item.end)]
            told = [item.text, text_file, _given_key(item), dict(item.user)]  # not its split
            first = _first(db, "named", [path, *part, *told], number)
            video = _first(db, "videos", [path], number)
            if first == number:
                key, first = item.key, None
                probe = _first(db, "probing", [path, text_file, item.size, item.version], number)
        yield (number, *listed_row(item), key, first, video, probe)


def _place(path: str | None, folder: Callable[[str], str]) -> str | None:
    """A path however it is written; URLs as they are."""
    if path is None or is_url(path):
        return path
    head, name = os.path.split(path)
    return os.path.join(folder(head), name)


def _given_key(source: Source) -> str:
    """The key that a manifest gives a source, "" where it is only made of the name."""
    name = path_in(source.source) if is_url(source.source) else source.source
    stem = os.path.splitext(name)[0]
    return "" if source.key in (slug(stem), slug(stem.lstrip("/."))) else source.key


def _first(db: sqlite3.Connection, table: str, place: Sequence[Any], number: int) -> int:
    """The first input at a place. Places are named in 16 bytes, so that a million of them stay small."""
    name = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).digest()[:16]
    if db.execute(f"INSERT OR IGNORE INTO temp.{table} VALUES (?, ?)", (name, number)).rowcount:
        return number
    ((first,),) = db.execute(f"SELECT number FROM temp.{table} WHERE place = ?", (name,))
    return int(first)


def _make_keys_unique(db: sqlite3.Connection) -> None:
    """Keys that several sources would share get a hash of the whole name, and a number where even that is equal."""
    db.execute("CREATE INDEX inputs_key ON inputs (key)")
    db.execute(
        "CREATE TEMP TABLE sharing AS SELECT number, source, key FROM inputs WHERE key IN "
        "(SELECT key FROM inputs WHERE key IS NOT NULL GROUP BY key HAVING count(*) > 1) ORDER BY number"
    )
    db.execute("CREATE TEMP TABLE counts (base TEXT PRIMARY KEY, n INTEGER) WITHOUT ROWID")
    for number, source, key in db.execute("SELECT number, source, key FROM temp.sharing ORDER BY number"):
        base = f"{key}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        found = db.execute("SELECT n FROM temp.counts WHERE base = ?", (base,)).fetchone()
        n = found[0] + 1 if found else 1
        while db.execute("SELECT 1 FROM inputs WHERE key = ?", (_numbered(base, n),)).fetchone():
            n += 1
        db.execute("UPDATE inputs SET key = ? WHERE number = ?", (_numbered(base, n), number))
        db.execute("REPLACE INTO temp.counts VALUES (?, ?)", (base, n))
    for table in ("sharing", "counts"):
        db.execute(f"DROP TABLE temp.{table}")
    db.execute("DROP INDEX inputs_key")


def _numbered(base: str, n: int) -> str:
    return base if n == 1 else f"{base}-{n}"


def settings_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, in words; "" when none does."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))  # as it will be read: tuples are lists
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name[-1]} was {old.get(name)}, now it is {new.get(name)}"
    return ""


def _flat(settings: Mapping[str, Any], within: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, (*within, name)) if isinstance(value, Mapping) else {(*within, name): value})
    return flat


def inputs_difference(db: sqlite3.Connection, items: Iterable[Source | Unusable]) -> str:
    """The first input that differs, in words; "" when none does."""
    before = db.execute(f"SELECT {_COLUMNS} FROM inputs ORDER BY number")
    now = map(listed_row, items)
    for number, (old, new) in enumerate(zip_longest(before, now)):
        if old != new:
            return _in_words(db, number, now if new is None else chain([new], now))
    return ""


def _in_words(db: sqlite3.Connection, begin: int, now: Iterable[Sequence[Any]]) -> str:
    """How the inputs from number `begin` differ; all before it are equal."""
    marks = ", ".join("?" * len(LISTED))
    nth = "row_number() OVER (PARTITION BY source ORDER BY number)"
    with scratch(db):
        for table in ("raw", "was", "now"):
            db.execute(f"CREATE TEMP TABLE IF NOT EXISTS {table} (number INTEGER PRIMARY KEY, {_COLUMNS}, nth INTEGER)")
            db.execute(f"DELETE FROM temp.{table}")
        db.executemany(f"INSERT INTO temp.raw ({_COLUMNS}) VALUES ({marks})", now)
        for table, origin in (("was", f"inputs WHERE number >= {begin}"), ("now", "temp.raw")):
            db.execute(f"INSERT INTO temp.{table} SELECT number, {_COLUMNS}, {nth} FROM {origin}")
            db.execute(f"CREATE INDEX IF NOT EXISTS temp.by_{table} ON {table} (source, nth)")
    for one, other, what in (("was", "now", "gone"), ("now", "was", "new")):
        lonely = f"NOT EXISTS (SELECT 1 FROM temp.{other} AS b WHERE {_SAME})"
        query = f"SELECT source FROM temp.{one} AS a WHERE {lonely} ORDER BY number LIMIT 1"
        for (source,) in db.execute(query):
            return f"input {source} is {what}"
    columns = [f"{table}.{name}" for table in "ab" for name in LISTED]
    changed = " OR ".join(f"a.{name} IS NOT b.{name}" for name in LISTED)
    query = f"FROM temp.now AS b JOIN temp.was AS a ON {_SAME} WHERE {changed} ORDER BY b.number LIMIT 1"
    for row in db.execute(f"SELECT {', '.join(columns)} {query}"):
        return _change(dict(zip(LISTED, row, strict=False)), dict(zip(LISTED, row[len(LISTED) :], strict=True)))
    return "the inputs come in another order"


def _change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old["reason"] != new["reason"]:
        if new["reason"] is None:
            return f"input {new['source']} can be used now"
        return f"input {new['source']} cannot be used: {new['reason']}"
    name = next(name for name in LISTED if old[name] != new[name])
    return f"the {_IN_WORDS.get(name, name)} of input {new['source']} has changed"
