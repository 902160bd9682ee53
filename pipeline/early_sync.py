"""Having a file's bytes go to the disk while more are written."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

EVERY_BYTES, MOST_BYTES = 64 << 20, 512 << 20  # not yet synced: from which a sync begins, and at which it is waited for
_sync = getattr(os, "fdatasync", os.fsync)


class EarlySync:
    """Syncs a file in a thread of its own, every so many bytes: the fsync at its end then has little left to wait for,
    and a writer that is faster than the disk does not fill the memory with what is still to be stored.

    Args:
        descriptor: of the file, which stays open until `close`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._unsynced = 0

    def wrote(self, num_bytes: int) -> None:
        """Count them, and begin to sync where it is time. Raises OSError where the last sync failed: the system tells
        of an error once, so no later one would."""
        self._unsynced += num_bytes
        if self._unsynced < EVERY_BYTES:
            return
        if self._running is not None:
            if not self._running.done() and self._unsynced < MOST_BYTES:
                return
            self._running.result()
        self._running = self._thread.submit(_sync, self._descriptor)
        self._unsynced = 0

    def close(self) -> None:
        """Wait for the thread. Raises OSError as `wrote` does."""
        self._thread.shutdown()
        if self._running is not None:
            self._running.result()
