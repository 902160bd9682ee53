"""Decoding in the process that trains, beside its steps: for GPU readers, which worker processes cannot share.

Three kinds of thread. One takes plans and submits their clips; several decode and transform, a clip each, across the
borders of batches; one puts batches together, in order. What comes is the same for any number of threads: a clip
follows from its plan alone, and of several errors the first in order counts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, NamedTuple

from .batches import BatchMaker, Delivery, Failure, Planned, pinned
from .cuda_lanes import Lanes
from .dataset import PlannedClip
from .decode_threads import DecodeThreads
from .prefetch import ReadAhead

#: Batches that the threads of the training process have ready or in hand.
READ_AHEAD = 2

_COLLATING = -1  # the lane of the thread that puts batches together; those that decode have 0, 1, ...


class Submitted(NamedTuple):
    """A batch whose clips are being decoded."""

    clips: list[Future[dict[str, Any]]]
    padding: bool


class TrainerSide:
    """Turns planned batches into batches.

    Args:
        maker: decodes clips and collates them.
        threads: that decode.
        lanes: the CUDA streams of all threads here.
        rows: of a batch.
        pin: put what is on the CPU into page-locked memory.
    """

    def __init__(self, maker: BatchMaker, threads: int, lanes: Lanes, rows: int, pin: bool) -> None:
        self.threads = threads
        self._maker, self._lanes, self._pin = maker, lanes, pin
        # A batch in the last thread, ready or in the making, and as many before it as give each thread a clip.
        self._before = max(READ_AHEAD - 1, -(-threads // rows))

    def deliveries(self, made: Iterator[Failure | Planned]) -> Generator[Delivery | Failure, None, None]:
        """The batches of what was planned, in order. All threads are gone when this has ended or is closed."""
        with ExitStack() as closing:
            threads = DecodeThreads(self._decode, self.threads, self._lanes.enter)
            closing.callback(threads.close)
            submitted = ReadAhead(_submitted(made, threads), self._before)
            closing.callback(submitted.close)
            ahead = ReadAhead(self._gathered(submitted), READ_AHEAD - 1)
            closing.callback(ahead.close)
            closing.callback(threads.stop)  # comes first, so that nobody waits for clips that nobody wants any more
            yield from ahead

    def _decode(self, planned: PlannedClip) -> dict[str, Any]:
        clip = self._maker.source.finish(planned)
        self._lanes.settle()  # so that it is all there when this returns, also on a GPU
        return clip

    def _gathered(self, submitted: Iterable[Failure | Submitted]) -> Iterator[Delivery | Failure]:
        self._lanes.enter(_COLLATING)
        for item in submitted:
            if isinstance(item, Failure):
                yield item
                continue
            delivery = self._maker.gathered((clip.result() for clip in item.clips), item.padding)
            if self._pin:
                delivery = pinned(delivery)
            self._lanes.settle()  # before the clips go, whose memory belongs to other streams, and is written over
            del item
            yield delivery


def _submitted(
    made: Iterator[Failure | Planned], threads: DecodeThreads[PlannedClip, dict[str, Any]]
) -> Iterator[Failure | Submitted]:
    for item in made:
        if isinstance(item, Planned):
            yield Submitted([threads.submit(clip) for clip in item.clips], item.padding)
        else:
            yield item
