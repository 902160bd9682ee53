"""What a worker process is busy with, visible to the process that watches over it, also after the worker has died."""

from __future__ import annotations

import time
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A stored sample: which dataset of a mixture (0 where there is one), which shard of it, which sample of that."""

    part: int
    shard: int
    sample: int


_NOWHERE = (-1, -1, -1, 0)  # place and limit


class Watch:
    """A few numbers in shared memory; one process writes them, another reads them.

    `limit_s` starts a clock which both can read (`time.monotonic` is one for all processes of a machine).
    """

    def __init__(self, context: BaseContext) -> None:
        self._cells: Any = context.RawArray("q", (*_NOWHERE, -1))

    def take(self, ticket: int) -> None:
        """The worker takes up a request."""
        self._cells[4] = ticket

    def begin(self, place: Place) -> None:
        """The worker takes up a sample."""
        self._cells[:4] = (*place, 0)

    def limit(self, seconds: float) -> None:
        """The worker promises to be done with the sample within so many seconds."""
        self._cells[3] = time.monotonic_ns() + int(seconds * 1e9)

    def end(self) -> None:
        """The worker is done with the sample."""
        self._cells[:4] = _NOWHERE

    def place(self) -> Place | None:
        """The sample that the worker is at, or was at when it died."""
        part, shard, sample = self._cells[:3]
        return None if part < 0 else Place(part, shard, sample)

    def ticket(self) -> int:
        """The request that the worker took up last."""
        return int(self._cells[4])

    def overrun(self) -> int | None:
        """The limit that the worker has overrun, as a number by which it can be told from others; else None."""
        until = int(self._cells[3])
        return until if 0 < until < time.monotonic_ns() else None
