"""Remote shards, kept in a local folder of bounded size.

A shard is downloaded once per machine: processes agree by file locks, a file is checked (size, and sha256 where
the dataset's index has it) before it takes its name, and what was used longest ago goes first. Whoever reads a
cached shard holds a shared lock on the open file, so eviction passes it by; the limit is exceeded only when the
shards in use are larger than it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, ShardError
from .shard_paths import filesystem

DEFAULT_CACHE_BYTES = 32 << 30
_MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # trying again is no use

log = logging.getLogger(__name__)
T = TypeVar("T")


def default_cache_dir() -> Path:
    """`$FRAMESTREAM_CACHE`, else `framestream` in the user's cache folder."""
    if own := os.environ.get("FRAMESTREAM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framestream"


@dataclass(frozen=True)
class ShardCache:
    """A bounded folder of downloaded shards. Holds settings only: cheap to pickle, safe under fork and spawn."""

    folder: Path
    limit_bytes: int = DEFAULT_CACHE_BYTES
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 4
    backoff_s: float = 0.5  # waited after the first failure, doubled after each further one

    def __post_init__(self) -> None:
        if self.limit_bytes < 1 or self.attempts < 1:
            raise ConfigError(
                f"the shard cache needs at least 1 byte and 1 attempt, got {self.limit_bytes} and {self.attempts}"
            )

    def path(self, url: str) -> Path:
        """Where `url` is kept."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:24]
        return self.folder / "shards" / digest / url.rstrip("/").rpartition("/")[2][-100:]

    def read_small(self, url: str) -> bytes | None:
        """A small file (an index) read whole and not kept; None when it does not exist."""
        fs, path = filesystem(url, self.storage_options)
        try:
            return self._retry(url, lambda: fs.cat_file(path))
        except FileNotFoundError:
            return None

    def size(self, url: str) -> int | None:
        """Bytes of a remote file; None where the server does not say. Raises ShardError when it is not there."""
        fs, path = filesystem(url, self.storage_options)
        try:
            return self._retry(url, lambda: fs.info(path)).get("size")
        except FileNotFoundError as err:
            raise ShardError(f"shard {url} does not exist: check the address") from err

    def open(self, url: str, *, num_bytes: int | None = None, sha256: str | None = None) -> int:
        """A read-only descriptor of the cached shard, downloaded when needed, with a shared lock while it is open."""
        path = self.path(url)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._download(url, path, num_bytes, sha256)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            stat = os.fstat(descriptor)
            if stat.st_nlink and (num_bytes is None or stat.st_size == num_bytes):
                os.utime(descriptor)  # the time of last use, which eviction goes by
                return descriptor
            os.close(descriptor)
            if stat.st_nlink:  # an older version of the shard
                path.unlink(missing_ok=True)

    def _download(self, url: str, path: Path, num_bytes: int | None, sha256: str | None) -> None:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():  # another process was first
                return
            expected = self.size(url) if num_bytes is None else num_bytes
            self._make_room(expected or 0)
            fs, remote = filesystem(url, self.storage_options)
            part = path.with_name(path.name + ".part")

            def fetch() -> None:
                part.unlink(missing_ok=True)
                fs.get_file(remote, str(part))
                got = part.stat().st_size
                if expected is not None and got != expected:
                    raise OSError(f"{got} of {expected} bytes arrived")
                with open(part, "rb") as file:
                    if sha256 is not None and _sha256(file.fileno()) != sha256:
                        raise OSError("its sha256 is not the one in index.json")
                    os.fsync(file.fileno())

            try:
                self._retry(url, fetch)
                os.replace(part, path)
            except FileNotFoundError as err:
                raise ShardError(f"shard {url} does not exist: check the address") from err
            finally:
                part.unlink(missing_ok=True)

    def _retry(self, url: str, action: Callable[[], T]) -> T:
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except _MISSING as err:
                raise ShardError(f"{url} cannot be read ({err}): check access rights") from err
            except Exception as err:  # each fsspec backend raises its own kinds
                if attempt == self.attempts:
                    raise ShardError(
                        f"{url} could not be fetched in {attempt} attempts ({type(err).__name__}: {err}): "
                        f"check the network, the storage and its index"
                    ) from err
                log.warning("fetching %s failed (%s: %s), trying again", url, type(err).__name__, err)
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _make_room(self, num_bytes: int) -> None:
        """Remove the shards used longest ago, but none that anybody reads, until `num_bytes` fit."""
        from filelock import FileLock

        folder = self.folder / "shards"
        with FileLock(str(folder / "eviction.lock")):
            kept = [
                (p.stat().st_mtime_ns, p.stat().st_size, p)
                for p in folder.glob("*/*")
                if p.suffix not in (".lock", ".part", ".json") and not p.name.startswith(".")
            ]
            total = sum(size for _, size, _ in kept)
            for _, size, path in sorted(kept):
                if total + num_bytes <= self.limit_bytes:
                    return
                with open(path, "rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    path.unlink(missing_ok=True)
                    total -= size
            if total + num_bytes > self.limit_bytes:
                log.warning(
                    "the shard cache %s needs %d bytes for the shards in use, more than its limit of %d: raise "
                    "cache_bytes or use smaller shards", folder, total + num_bytes, self.limit_bytes,
                )  # fmt: skip


def _sha256(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, 1 << 20, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
