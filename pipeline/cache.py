"""Remote shards, kept in a local folder of bounded size.

A shard is downloaded once per machine and checked (size, and sha256 where the dataset's index has it) before it
takes its name. All agreement between threads, processes and ranks is by locks on open files, which end with
their process:

- `NAME.part`, locked exclusively, is a shard on its way. Whoever wants the same shard waits for that lock to go; one
  that is not locked was left by a process that died, and is taken over or swept.
- `NAME`, locked shared, is a shard that somebody needs: eviction passes it by. Of the others, what was used longest
  ago goes first.
- `eviction.lock` is held while somebody makes room. Shards on their way count with their full size.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .download import download
from .errors import ConfigError, ShardError
from .eviction import PART, evict, evicting
from .lease import Lease
from .remote import Remote, disk_full, missing

DEFAULT_CACHE_BYTES = 32 << 30

log = logging.getLogger(__name__)
P = TypeVar("P")
_random = random.SystemRandom()  # other in each fork, and the global random state is the user's
_warned: set[Path] = set()
_parts: dict[tuple[int, Path], None] = {}  # (process, shard on its way)


class _NoRoomError(Exception):
    """The shard does not fit beside those in use."""


def default_cache_dir() -> Path:
    """`$FRAMESTREAM_CACHE`, else `framestream` in the user's cache folder."""
    if own := os.environ.get("FRAMESTREAM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framestream"


@dataclass(frozen=True)
class ShardCache:
    """A bounded folder of downloaded shards. Holds settings only: cheap to pickle, safe under fork and spawn.

    Args:
        folder: where shards (`folder/shards`) and indexes (`folder/index`) are kept.
        limit_bytes: for all shards together; exceeded only when the shards in use are larger than that.
        storage_options, attempts, backoff_s, stall_s: as in `Remote`.
    """

    folder: Path
    limit_bytes: int = DEFAULT_CACHE_BYTES
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 4
    backoff_s: float = 0.5
    stall_s: float = 60.0

    def __post_init__(self) -> None:
        if self.limit_bytes < 1:
            raise ConfigError(f"the shard cache needs at least 1 byte, got {self.limit_bytes}")
        _ = self.remote  # checks the other settings

    @property
    def remote(self) -> Remote:
        """The storage that shards come from."""
        return Remote(self.storage_options, self.attempts, self.backoff_s, self.stall_s)

    def path(self, url: str, sha256: str | None = None) -> Path:
        """Where the version of `url` with this checksum is kept."""
        digest = hashlib.sha256(f"{url}\n{sha256 or ''}".encode()).hexdigest()[:24]
        return self._shards / digest / url.rstrip("/").rpartition("/")[2][-100:]

    def read_small(self, url: str, parse: Callable[[bytes], P]) -> P | None:
        """A small remote file, parsed and not kept; None when it does not exist."""
        return self.remote.read_small(url, parse)

    def size(self, url: str) -> int | None:
        """Bytes of a remote file; None where the server does not say. Raises ShardError when it is not there."""
        return self.remote.size(url)

    def open(self, url: str, *, num_bytes: int | None = None, sha256: str | None = None) -> Lease:
        """The cached shard, downloaded when needed, kept from eviction until the lease is closed.

        Raises:
            ShardError: it is not there, cannot be fetched or is another one than expected, or the disk is full.
        """
        lease = self._open(url, num_bytes, sha256, over_limit=True)
        assert lease is not None  # only without `over_limit`
        return lease

    def open_within_limit(self, url: str, *, num_bytes: int | None = None, sha256: str | None = None) -> Lease | None:
        """As `open`, but None where the shard is not cached and does not fit beside those in use."""
        return self._open(url, num_bytes, sha256, over_limit=False)

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    def _open(self, url: str, num_bytes: int | None, sha256: str | None, *, over_limit: bool) -> Lease | None:
        path = self.path(url, sha256)
        hit = True
        while True:
            try:
                lease = Lease(path, os.O_RDONLY)
            except FileNotFoundError:
                hit = False
                try:
                    fetched = self._fetch(url, path, num_bytes, sha256, over_limit)
                except _NoRoomError:
                    return None
                if fetched is None:
                    continue
                lease = fetched
            except OSError as err:
                raise self._unusable(err) from err
            else:
                lease.lock()
            if lease.linked and (num_bytes is None or lease.num_bytes == num_bytes):
                lease.touch()
                lease.hit = hit
                return lease
            if lease.linked:  # an older version of the shard
                path.unlink(missing_ok=True)
            lease.close()

    def _fetch(self, url: str, path: Path, num_bytes: int | None, sha256: str | None, over_limit: bool) -> Lease | None:
        """Download a shard; None when somebody else was first, so that one has to look again."""
        expected = self.size(url) if num_bytes is None else num_bytes
        part = path.with_name(path.name + PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Eviction may take the empty folder away in between, then the caller tries again.
            with suppress(FileNotFoundError), Lease(part, os.O_RDWR | os.O_CREAT) as mine:
                if not mine.try_lock():  # somebody fetches it: wait until they have it, or died
                    # Shared, because the lock of the finished shard is of the same file, and is shared and kept.
                    mine.lock()
                    died = mine.is_at(part)
                    mine.close()
                    if died:  # others may have waited as well: do not meet them every time
                        time.sleep(_random.uniform(0, 0.02))
                    return None
                if not mine.is_at(part):
                    return None
                return self._fetch_locked(url, path, part, mine, expected, sha256, over_limit)
        except OSError as err:
            if disk_full(err):
                raise self._full(url, expected, err) from err
            raise self._unusable(err) from err
        return None

    def _fetch_locked(
        self,
        url: str,
        path: Path,
        part: Path,
        mine: Lease,
        expected: int | None,
        sha256: str | None,
        over_limit: bool,
    ) -> Lease | None:
        _parts[os.getpid(), part] = None
        try:
            if path.exists():
                part.unlink()
                return None
            try:
                self._fill(url, part, mine, expected, sha256, over_limit)
            except OSError as err:
                if not disk_full(err):
                    raise
                os.ftruncate(mine.descriptor, 0)
                if not over_limit:
                    raise _NoRoomError from err
                log.warning("the disk of the shard cache %s is full (%s), emptying it", self.folder, err.strerror)
                with evicting(self._shards):
                    evict(self._shards, self.limit_bytes, None)
                self._fill(url, part, mine, expected, sha256, over_limit)
            with evicting(self._shards):  # nobody may take it away before the shared lock is held
                os.replace(part, path)
                mine.close()
                lease = Lease(path, os.O_RDONLY)
                lease.lock()
                return lease
        except BaseException:
            if mine.descriptor >= 0:  # still locked by us, so it is ours to remove
                part.unlink(missing_ok=True)
                with suppress(OSError):
                    part.parent.rmdir()
            raise
        finally:
            _parts.pop((os.getpid(), part), None)

    def _fill(
        self, url: str, part: Path, mine: Lease, expected: int | None, sha256: str | None, over_limit: bool
    ) -> None:
        with evicting(self._shards):
            os.ftruncate(mine.descriptor, 0)
            needed = expected or 0
            excess, disk_short = evict(self._shards, self.limit_bytes, needed)
            if not over_limit and (excess > 0 or disk_short):
                raise _NoRoomError
            if excess > 0 and self.folder not in _warned:
                _warned.add(self.folder)
                log.warning(
                    "the shard cache %s needs %d bytes for the shards in use, more than its limit of %d: raise "
                    "cache_bytes or use smaller shards", self.folder, self.limit_bytes + excess, self.limit_bytes,
                )  # fmt: skip
            os.ftruncate(mine.descriptor, needed)  # so that it counts for others from now on
        try:
            download(self.remote, url, part, expected, sha256)
        except FileNotFoundError as err:
            raise missing(url) from err

    def _unusable(self, err: OSError) -> ShardError:
        return ShardError(
            f"the shard cache {self.folder} cannot be used ({err}): give another cache_dir or set FRAMESTREAM_CACHE"
        )

    def _full(self, url: str, expected: int | None, err: OSError) -> ShardError:
        try:
            free = f"{shutil.disk_usage(self.folder).free} bytes"
        except OSError:
            free = "an unknown number of bytes"
        needed = "its bytes" if expected is None else f"{expected} bytes"
        return ShardError(
            f"{url} does not fit into the shard cache {self.folder} ({err.strerror}): it needs {needed}, {free} are "
            f"free, and every shard that nobody reads was evicted; put cache_dir on a larger disk, set cache_bytes "
            f"to what the disk holds, or use smaller shards"
        )


@atexit.register
def _abandon() -> None:
    """Remove what a thread is still fetching when the interpreter exits and takes the thread with it."""
    for pid, part in list(_parts):
        if pid == os.getpid():
            part.unlink(missing_ok=True)
