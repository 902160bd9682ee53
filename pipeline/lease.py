"""Open files that hold a lock: they say that somebody needs a cached shard.

A lock belongs to the open file, so it ends with its process, whatever ends that. A forked child inherits the open
file and with it a share in the lock; children therefore close what they have inherited at once, without unlocking.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_open: dict[int, None] = {}  # descriptors of this process's leases; a dict, whose steps are atomic, unlike a set's


class Lease:
    """A file, open and locked until `close()`, the end of the `with` block or of the process.

    Attributes:
        num_bytes, linked: size of the file, and whether it still had a name, when the lock was taken.
        hit: whether it was at hand when it was asked for; False where the asker waited for a download.
    """

    def __init__(self, path: Path, flags: int) -> None:
        """Open without locking; raises OSError."""
        self._pid = os.getpid()
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        _open[self.descriptor] = None
        self.num_bytes, self.linked = 0, False
        self.hit = True

    def lock(self) -> None:
        """Wait until nobody holds the exclusive lock, and take a shared one."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        stat = os.fstat(self.descriptor)
        self.num_bytes, self.linked = stat.st_size, stat.st_nlink > 0

    def try_lock(self) -> bool:
        """Take the exclusive lock if nobody else holds any."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: Path) -> bool:
        """Whether this is still the file of that name."""
        mine = os.fstat(self.descriptor)
        try:
            there = os.stat(path)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def touch(self) -> None:
        """Say that it is used now; what was used longest ago is evicted first."""
        now = time.time_ns()  # finer than the clock by which the kernel would mark it
        os.utime(self.descriptor, ns=(now, now))

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor < 0 or self._pid != os.getpid():
            return
        # Unlocking speaks for all copies of this open file, also for one that a child forked just now still has.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        _open.pop(descriptor, None)
        os.close(descriptor)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            self.close()


def _after_fork() -> None:
    for descriptor in list(_open):
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
