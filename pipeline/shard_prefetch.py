"""Fetch remote shards into the local cache before the order reaches them."""

from __future__ import annotations

import logging
import threading

from .errors import ShardError
from .order import SampleOrder
from .shard_paths import is_url
from .shards import ShardSet

log = logging.getLogger(__name__)


class ShardPrefetch:
    """Keeps the shards of the current and of the next window of an epoch at hand, in a background thread.

    It does nothing for local shards. A shard that cannot be fetched is no error here: whoever reads it gets one.
    """

    def __init__(self, shards: ShardSet, order: SampleOrder) -> None:
        self._shards, self._order = shards, order
        self._remote = any(map(is_url, shards.paths))
        self._reached: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def reach(self, epoch: int, position: int) -> None:
        """Tell how far the run is: `position` samples of `epoch` have been delivered. Returns at once."""
        if not self._remote or (self._thread is not None and self._thread.is_alive()):
            return
        if position >= len(self._order):
            epoch, position = epoch + 1, 0
        window = self._order.window(epoch, position)
        if self._reached == (epoch, window.number):
            return
        self._reached = epoch, window.number
        last = window.stop == len(self._order)
        following = self._order.window(epoch + 1, 0) if last else self._order.window(epoch, window.stop)
        wanted = dict.fromkeys(window.shards + following.shards)
        self._thread = threading.Thread(
            target=_fetch, args=(self._shards, tuple(wanted)), name="framestream-shards", daemon=True
        )
        self._thread.start()


def _fetch(shards: ShardSet, wanted: tuple[int, ...]) -> None:
    for shard in wanted:
        if shards.sizes[shard]:
            try:
                shards.read(shard, 0, want=())  # no member: only opens the shard, which fetches it
            except ShardError as err:
                log.info("prefetch: %s", err)
