"""How many samples each shard has, found at the lowest price: one `stat`, its index file, or a walk over the tar."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import ShardCache
from .errors import ShardError
from .shard_index import ShardIndex, load_index
from .shard_paths import is_url
from .shard_writer import FOLDER_INDEX, read_folder_index

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListedShard:
    """One shard of a set. `num_bytes` and `sha256` are what the index says, where it says so."""

    path: str  # local path or URL
    num_samples: int
    num_bytes: int | None
    sha256: str | None


class Listing:
    """Looks tars up in the `index.json` of their folder, and in their own index where that does not do."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.problems: list[str] = []
        self._folders: dict[str, dict[str, dict[str, Any]]] = {}

    def _folder(self, folder: str) -> dict[str, dict[str, Any]]:
        if folder not in self._folders:
            name = f"{folder}/{FOLDER_INDEX}"
            self._folders[folder] = {}
            try:
                data = self.cache.read_small(name) if is_url(name) else _read_if_there(name)
                if data is not None:
                    self._folders[folder] = read_folder_index(data, name)
            except ShardError as err:
                self.problems.append(str(err))
        return self._folders[folder]

    def shard(self, path: str, problems: list[str]) -> ListedShard:
        """Count a shard's samples, at the price of one `stat` where the folder's index knows it."""
        folder, name = _split(path)
        listed = self._folder(folder).get(name)
        remote = is_url(path)
        if listed is not None:
            actual = listed["bytes"] if remote else _size(path)
            if actual == listed["bytes"]:
                return ListedShard(path, listed["samples"], listed["bytes"], listed["sha256"])
            problems.append(f"{name} has {actual} bytes, {FOLDER_INDEX} says {listed['bytes']}")
        elif self._folder(folder):
            problems.append(f"{name} is not listed in {FOLDER_INDEX}")
        index = self.index(path, None, None)
        problems += index.problems
        return ListedShard(path, len(index.samples), index.num_bytes, None)

    def index(self, path: str, num_bytes: int | None, sha256: str | None) -> ShardIndex:
        """Where the members of one shard lie."""
        if not is_url(path):
            return load_index(path, self.cache.folder)
        url = path.removesuffix(".tar") + ".idx.json"
        data = self.cache.read_small(url)
        if data is not None:
            try:
                index = ShardIndex.from_bytes(data, url)
                if index.num_bytes == (num_bytes if num_bytes is not None else self.cache.size(path)):
                    return index
            except ShardError as err:
                log.warning("%s", err)
        descriptor = self.cache.open(path, num_bytes=num_bytes, sha256=sha256)
        try:
            return load_index(self.cache.path(path), self.cache.folder)
        finally:
            os.close(descriptor)

    def missing(self, found: list[str]) -> list[str]:
        """Shards that an index.json lists and that are not there, where a whole folder was opened."""
        present: dict[str, set[str]] = {}
        for path in found:
            folder, name = _split(path)
            present.setdefault(folder, set()).add(name)
        gone = []
        for folder, names in present.items():
            if is_url(folder):
                continue
            for name in sorted(self._folder(folder).keys() - names):
                if not Path(folder, name).exists():
                    gone.append(f"{name} is listed in {FOLDER_INDEX} and missing in {folder}")
        return gone


def _split(path: str) -> tuple[str, str]:
    """(folder, file name) of a path or URL."""
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as err:
        raise ShardError(f"shard {path} cannot be read ({err.strerror})") from err


def _read_if_there(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise ShardError(f"{path} cannot be read ({err.strerror})") from err
