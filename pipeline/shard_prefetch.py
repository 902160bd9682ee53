"""Fetch remote shards into the local cache before the order reaches them, and let go of those it has passed.

The unit is the window: samples are mixed within a window of shards, so the shards of the current window are needed
until its last sample and those of the next one from the sample after that. `ShardPrefetch` holds leases on both, and
drops them window by window; a cached shard without a lease is free for eviction. Leases of different ranks on one
machine add up by themselves, and end with their process.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref

from .errors import FramestreamError
from .lease import Lease
from .order import SampleOrder
from .shards import ShardSet

MAX_LEASES = 256  # per dataset: each is an open file of the training process

log = logging.getLogger(__name__)


class _State:
    """What the thread shares with its `ShardPrefetch`, to which it holds no reference, so that one can be dropped."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.window: tuple[int, int] | None = None  # (epoch, number) of the current one
        self.wanted: dict[int, bool] = {}  # shard -> whether it is needed now, the current window's first
        self.leases: dict[int, Lease] = {}
        self.failed: set[int] = set()  # not tried again before the window changes
        self.asked = self.closed = False
        self.thread: threading.Thread | None = None
        self.fetched_shards = self.fetched_bytes = 0

    def close(self) -> None:
        if self.pid != os.getpid():  # a fork's copy: thread and leases are the parent's, and so may the lock be
            return
        with self.changed:
            self.closed, self.window, self.wanted = True, None, {}
            self.drop_passed()
            self.changed.notify()

    def drop_passed(self) -> None:
        for shard in self.leases.keys() - self.wanted.keys():
            self.leases.pop(shard).close()


class ShardPrefetch:
    """Keeps the shards of the current and of the next window of an epoch at hand, in a background thread.

    It does nothing for local shards. A shard that cannot be fetched is no error here: whoever reads it gets one. The
    shards of the next window are only fetched as far as they fit into the cache beside the current one's.
    """

    def __init__(self, shards: ShardSet, order: SampleOrder) -> None:
        self._shards, self._order = shards, order
        sizes = shards.remote_bytes
        self._remote = bool(sizes)
        most = sum(sorted(sizes)[-2 * order.window_shards :])
        if most > shards.cache_bytes:
            log.warning(
                "two windows of %d shards need up to %d bytes, and the shard cache is limited to %d: shards cannot all "
                "be fetched ahead of need, so the run will wait for them; raise cache_bytes or lower window_shards",
                order.window_shards, most, shards.cache_bytes,
            )  # fmt: skip
        self._use(_State())

    def _use(self, state: _State) -> None:
        self._state = state
        self._finalizer = weakref.finalize(self, state.close)

    @property
    def fetched_shards(self) -> int:
        """Shards that this object has downloaded; those that others had brought already are not among them."""
        return self._state.fetched_shards

    @property
    def fetched_bytes(self) -> int:
        """Their bytes."""
        return self._state.fetched_bytes

    def reach(self, epoch: int, position: int) -> None:
        """Tell how far the run is: `position` samples of `epoch` have been delivered. Returns at once."""
        if not self._remote:
            return
        if self._state.pid != os.getpid():  # after a fork: thread and leases are the parent's
            self._finalizer.detach()
            self._use(_State())
        if position >= len(self._order):
            epoch, position = epoch + 1, 0
        window = self._order.window(epoch, position)
        state = self._state
        with state.changed:
            state.closed = False
            if state.window != (epoch, window.number):
                last = window.stop == len(self._order)
                following = self._order.window(epoch + 1, 0) if last else self._order.window(epoch, window.stop)
                state.window = epoch, window.number
                wanted = dict.fromkeys(following.shards, False) | dict.fromkeys(window.shards, True)
                state.wanted = {s: wanted[s] for s in window.shards + following.shards if self._shards.sizes[s]}
                state.failed.clear()
                state.drop_passed()
            elif len(state.leases) + len(state.failed) >= min(len(state.wanted), MAX_LEASES):
                return
            state.asked = True
            state.changed.notify()
            if state.thread is None or not state.thread.is_alive():
                state.thread = threading.Thread(
                    target=_work, args=(state, self._shards), name="framestream-shards", daemon=True
                )
                state.thread.start()

    def close(self) -> None:
        """Drop the leases and let the thread end after the download at hand. `reach` begins anew."""
        self._state.close()


def _work(state: _State, shards: ShardSet) -> None:
    while True:
        with state.changed:
            while not state.asked and not state.closed:
                state.changed.wait()
            if state.closed:
                state.thread = None
                return
            state.asked = False
            wanted = state.wanted
        for shard, needed in wanted.items():
            if not _fetch(state, shards, wanted, shard, needed):
                break


def _fetch(state: _State, shards: ShardSet, wanted: dict[int, bool], shard: int, needed: bool) -> bool:
    """Take a lease on one wanted shard; False where the rest has to wait: others are wanted now, or no room is left."""
    with state.changed:
        if state.wanted is not wanted:
            return False
        if lease := state.leases.get(shard):
            lease.touch()  # in the order of need, so that what is needed last is evicted last when leases are gone
            return True
        if shard in state.failed:
            return True
    try:
        # The current window is in use, whatever the limit says; the next one is not yet.
        lease = shards.lease(shard, over_limit=needed)
    except (FramestreamError, OSError) as err:
        log.info("prefetch: %s", err)
        with state.changed:
            state.failed.add(shard)
        return True
    if lease is None:
        return False
    with state.changed:
        if not lease.hit:
            state.fetched_shards += 1
            state.fetched_bytes += lease.num_bytes
        if shard in state.wanted and len(state.leases) < MAX_LEASES:
            state.leases[shard] = lease
        else:
            lease.close()
    return True
