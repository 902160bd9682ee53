"""Keys that stand in several places, found among any number of keys in little memory."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

TOLD = 20  # repeated keys that are told one by one


class Keys:
    """The keys of all samples, in an SQLite file of its own that vanishes when it is closed.

    Ten million keys take about half a gigabyte of the disk for temporary files, and a few megabytes of memory.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # a temporary file without a name
        self._db.execute("CREATE TABLE keys (folder INTEGER, key BLOB, shard TEXT)")

    def add(self, folder: int, shard: str, keys: Iterable[str]) -> None:
        """Take the keys of one shard of a folder."""
        rows = ((folder, key.encode("utf-8", "surrogateescape"), shard) for key in keys)
        self._db.executemany("INSERT INTO keys VALUES (?, ?, ?)", rows)

    def problems(self) -> dict[int, list[str]]:
        """By folder: a sentence for each of the first keys that are not unique in it, and one for all others."""
        repeated = self._db.execute(
            "SELECT folder, key, MIN(shard), MAX(shard) FROM keys GROUP BY folder, key HAVING COUNT(*) > 1"
        )
        problems: dict[int, list[str]] = {}
        more: Counter[int] = Counter()
        for folder, raw, first, last in repeated:
            told = problems.setdefault(folder, [])
            if len(told) == TOLD:
                more[folder] += 1
                continue
            key = raw.decode("utf-8", "surrogateescape")
            told.append(f"key {key!r} is in " + (f"{first} and {last}." if first != last else f"{first} twice."))
        for folder, number in more.items():
            problems[folder].append(f"{number} more keys are in several shards.")
        return problems

    def __enter__(self) -> Keys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
