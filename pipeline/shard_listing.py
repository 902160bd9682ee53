"""How many samples each shard has, found at the lowest price: the folder's index, a shard's own, or a walk over it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .atomic import atomic_write
from .cache import ShardCache
from .errors import ShardError
from .shard_index import ShardIndex, index_tar, load_index
from .shard_paths import Found, Resolved, is_url
from .shard_writer import FOLDER_INDEX, read_folder_index

REMOTE_READERS = 16  # indexes read at the same time; each waits for the network, not for a core
LOCAL_READERS = 4  # helps on network file systems, and costs nothing on a local disk

log = logging.getLogger(__name__)


class ListedShard(NamedTuple):
    """One shard of a set. `num_bytes` and `sha256` are what the index says, where it says so.

    `expected` is how many samples the folder's index or the one beside the shard lists, where the shard is cut and no
    longer fits them; `why` then says what is wrong. A whole tar in the place of another one has lost nothing.
    """

    path: str  # local path or URL
    num_samples: int
    num_bytes: int | None
    sha256: str | None
    expected: int | None = None
    why: str = ""

    @property
    def lost(self) -> int:
        """Samples that were in the shard by its index and cannot be had."""
        return max(0, (self.expected or 0) - self.num_samples)


class Listing:
    """Looks tars up in the `index.json` of their folder, and in their own index where that does not do."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.problems: list[str] = []  # of the folders; those of single shards come with `shards`
        self._folders: dict[str, dict[str, dict[str, Any]]] = {}

    def shards(self, found: Resolved) -> tuple[list[ListedShard], list[str]]:
        """Count the samples of all shards. What is wrong with them comes in their order.

        Those that the `index.json` of their folder knows cost nothing more. The others are read several at a time,
        and each index that had to be built is stored at once, so that an interrupted opening goes on where it was.
        """
        listed: list[ListedShard | None] = []
        notes: dict[int, list[str]] = {}
        expected: dict[int, int] = {}
        present: dict[str, set[str]] = {}
        for number, (path, num_bytes) in enumerate(found.tars):
            folder, name = split(path)
            known = self._folder(folder)
            present.setdefault(folder, set()).add(name)
            entry = known.get(name)
            if entry is not None and (num_bytes is None or num_bytes == entry["bytes"]):
                listed.append(ListedShard(path, entry["samples"], entry["bytes"], entry["sha256"]))
                continue
            listed.append(None)
            if entry is not None:
                notes[number] = [f"{name} has {num_bytes} bytes, {FOLDER_INDEX} says {entry['bytes']}"]
                expected[number] = entry["samples"]
            else:
                notes[number] = [f"{name} is not listed in {FOLDER_INDEX}"] if known else []
        for number, index in zip(notes, self._indexes([found.tars[number] for number in notes]), strict=True):
            notes[number] += index.problems
            shard = ListedShard(found.tars[number].path, len(index.samples), index.num_bytes, None)
            if index.cut:
                promised, why = expected.get(number, index.promised), "; ".join(notes[number][:3])
                shard = shard._replace(expected=promised, why=why)
            listed[number] = shard
        problems = self.problems + [note for each in notes.values() for note in each] + self._missing(present, found)
        return [shard for shard in listed if shard is not None], problems

    def index(self, path: str, num_bytes: int | None, sha256: str | None) -> ShardIndex:
        """Where the members of one shard lie. A remote shard's index is kept in the cache once it was read."""
        if not is_url(path):
            return load_index(path, self.cache.folder)
        if num_bytes is None:
            num_bytes = self.cache.size(path)
        kept = self._kept(path, sha256)
        promised: ShardIndex | None = None
        built: ShardIndex | None = None  # earlier, because the one beside the shard did not fit
        with suppress(OSError, ShardError):
            index = ShardIndex.from_bytes(kept.read_bytes(), str(kept))
            if index.num_bytes == num_bytes:
                if index.promised is None:
                    return index
                built = index  # unless the one beside it was repaired since then
        url = path.removesuffix(".tar") + ".idx.json"
        try:
            promised = self.cache.read_small(url, lambda data: ShardIndex.from_bytes(data, url))
        except ShardError as err:
            log.warning("%s", err)
        fits = promised is not None and promised.num_bytes == num_bytes
        if promised is not None and fits and not (sha256 and promised.sha256 and sha256 != promised.sha256):
            index = promised
        elif built is not None:
            return built
        else:
            with self.cache.open(path, num_bytes=num_bytes, sha256=sha256) as lease:
                name = split(path)[1]
                index = index_tar(self.cache.path(path, sha256), name=name, promised=promised)
                if promised is not None and not fits:
                    note = f"{name} has {lease.num_bytes} bytes, its index was made for {promised.num_bytes}"
                    problems = (note, *index.problems)
                    index = replace(index, problems=problems, promised=len(promised.samples))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(kept, index.to_bytes())
        except OSError as err:
            log.warning("the index of %s cannot be stored (%s); it is read again every time", path, err)
        return index

    def _folder(self, folder: str) -> dict[str, dict[str, Any]]:
        if folder not in self._folders:
            name = f"{folder}/{FOLDER_INDEX}"
            self._folders[folder] = {}
            try:
                if is_url(name):
                    known = self.cache.read_small(name, lambda data: read_folder_index(data, name))
                else:
                    data = _read_if_there(name)
                    known = None if data is None else read_folder_index(data, name)
                self._folders[folder] = known or {}
            except ShardError as err:
                self.problems.append(str(err))
        return self._folders[folder]

    def _kept(self, url: str, sha256: str | None) -> Path:
        digest = hashlib.sha256(f"{url}\n{sha256 or ''}".encode()).hexdigest()
        return self.cache.folder / "index" / f"{digest[:32]}.idx.json"

    def _indexes(self, tars: Sequence[Found]) -> list[ShardIndex]:
        if len(tars) > 100:
            log.info("indexing %d shards that no %s knows, once", len(tars), FOLDER_INDEX)
        readers = REMOTE_READERS if any(is_url(tar.path) for tar in tars) else LOCAL_READERS
        if len(tars) < 2:
            return [self.index(path, num_bytes, None) for path, num_bytes in tars]
        pool = ThreadPoolExecutor(min(readers, len(tars)), "framestream-index")
        try:
            return list(pool.map(lambda tar: self.index(tar.path, tar.num_bytes, None), tars))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest is not waited for

    def _missing(self, present: dict[str, set[str]], found: Resolved) -> list[str]:
        """Shards that an index.json lists and that are not there."""
        gone = []
        for folder, names in present.items():
            whole = folder in found.folders
            if is_url(folder) and not whole:
                continue
            for name in sorted(self._folder(folder).keys() - names):
                if whole or not os.path.exists(os.path.join(folder, name)):
                    gone.append(f"{name} is listed in {FOLDER_INDEX} and missing in {folder}")
        return gone


def split(path: str) -> tuple[str, str]:
    """(folder, file name) of a path or URL."""
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name


def _read_if_there(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise ShardError(f"{path} cannot be read ({err.strerror})") from err
