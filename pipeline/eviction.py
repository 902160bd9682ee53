"""Making room in a folder of cached shards: what was used longest ago goes first, what is in use stays."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .lease import Lease

PART = ".part"  # suffix of a shard on its way


@contextmanager
def evicting(shards: Path) -> Iterator[None]:
    """One process at a time makes room in `shards`, and one thread of it. Raises OSError."""
    with Lease(shards / "eviction.lock", os.O_RDWR | os.O_CREAT) as lock:
        fcntl.flock(lock.descriptor, fcntl.LOCK_EX)
        yield


def evict(shards: Path, limit_bytes: int, num_bytes: int | None) -> tuple[int, bool]:
    """Remove what nobody uses until `num_bytes` more fit into the limit and on the disk; with None, all of it.

    Sweeps what was left by processes that died. Returns the bytes that are over the limit then, and whether the disk
    has less than `num_bytes` free. To be called while `evicting`.
    """
    total, kept = _scan(shards)
    free = shutil.disk_usage(shards).free
    needed = num_bytes or 0
    for _, size, path in sorted(kept):
        if num_bytes is not None and total + needed <= limit_bytes and needed <= free:
            break
        if _remove(path):
            total, free = total - size, free + size
    return total + needed - limit_bytes, free < needed


def _scan(shards: Path) -> tuple[int, list[tuple[int, int, str]]]:
    """(bytes of all shards and of those on their way, [(last use, bytes, path)] of the former), swept."""
    total = 0
    kept: list[tuple[int, int, str]] = []
    with os.scandir(shards) as folders:
        for folder in folders:
            if not folder.is_dir(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError), os.scandir(folder) as files:
                for file in files:
                    with suppress(FileNotFoundError):
                        stat = file.stat(follow_symlinks=False)
                        if not file.name.endswith(PART):
                            kept.append((stat.st_mtime_ns, stat.st_size, file.path))
                        elif _remove(file.path):  # left by a process that died
                            continue
                        total += stat.st_size
    return total, kept


def _remove(path: str) -> bool:
    """Remove a file unless somebody holds a lock on it, and its folder when that is empty then."""
    try:
        lease = Lease(Path(path), os.O_RDWR)
    except FileNotFoundError:
        return True
    with lease:
        if not lease.try_lock():
            return False
        if lease.is_at(Path(path)):
            with suppress(FileNotFoundError):
                os.unlink(path)
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))
    return True
