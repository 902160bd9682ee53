"""From positions to batches: which rows a rank takes, and what a worker does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .collate import ClipCollator
from .dataset import ClipSource, PlannedClip
from .deaths import Banned
from .errors import FramestreamError
from .health import ClipReport
from .order import rank_rows
from .watch import Watch


class Rows(NamedTuple):
    """Neighbouring rows of a global batch: positions start..stop-1 of an epoch. `padding` marks a repeated sample on a
    rank that has no row of its own."""

    epoch: int
    start: int
    stop: int
    padding: bool = False

    @property
    def positions(self) -> range:
        return range(self.start, self.stop)


class RankBatches:
    """The batches of one rank in one epoch, from `start` samples on, as rows of each global batch.

    Every rank gets the same number of batches. A last partial global batch is spread over the ranks evenly; a
    rank that gets none of its rows repeats one.
    """

    def __init__(self, num_samples: int, global_batch: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.num_samples, self.global_batch = num_samples, global_batch
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = self.start = 0

    @property
    def most_rows(self) -> int:
        """Rows of a rank's largest batch."""
        return max(1, len(rank_rows(self.global_batch, self.rank, self.world_size)))

    def __len__(self) -> int:
        """Batches of a full epoch, whatever `start` is."""
        samples = self.num_samples + (0 if self.drop_last else self.global_batch - 1)
        return samples // self.global_batch

    def ends(self) -> Iterator[int]:
        """The samples consumed after each batch."""
        start = self.start
        while start < self.num_samples:
            end = min(start + self.global_batch, self.num_samples)
            if self.drop_last and end - start < self.global_batch:
                return
            yield end
            start = end

    def __iter__(self) -> Iterator[Rows]:
        epoch, start = self.epoch, self.start
        for end in self.ends():
            own = rank_rows(end - start, self.rank, self.world_size)
            if own:
                yield Rows(epoch, start + own.start, start + own.stop)
            else:
                repeated = min(start + own.start, end - 1)
                yield Rows(epoch, repeated, repeated + 1, padding=True)
            start = end


class Delivery(NamedTuple):
    """A finished batch, how its clips came about, and the milliseconds that putting it together took."""

    batch: dict[str, Any]
    reports: list[ClipReport]
    collate_ms: float


class Failure(NamedTuple):
    """An error on its way out of a worker, whose sentence says all: no traceback is wanted with it."""

    error: FramestreamError


def pinned(delivery: Delivery | Failure) -> Delivery | Failure:
    """Put the CPU tensors of a batch into page-locked memory."""
    if isinstance(delivery, Failure):
        return delivery
    batch = {
        name: value.pin_memory() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in delivery.batch.items()
    }
    return delivery._replace(batch=batch)


class Planned(NamedTuple):
    """A batch that is read and planned, to be decoded elsewhere."""

    clips: list[PlannedClip]
    padding: bool


class BatchMaker:
    """What a worker runs: rows to a batch, or only to plans when decoding happens elsewhere."""

    def __init__(self, source: ClipSource, collate: ClipCollator, *, decode: bool) -> None:
        self.source, self.collate, self.decode = source, collate, decode

    def __call__(self, rows: Rows) -> Delivery | Failure | Planned:
        try:
            if self.decode:
                clips = [self.source.clip(rows.epoch, position) for position in rows.positions]
                return self._collated(clips, rows.padding)
            return Planned([self.source.plan(rows.epoch, position) for position in rows.positions], rows.padding)
        except FramestreamError as error:
            return Failure(error)

    def gathered(self, clips: Iterable[dict[str, Any]], padding: bool) -> Delivery | Failure:
        """Collate the clips of a batch that was planned by a call and is decoded elsewhere. Taking a clip may raise."""
        try:
            return self._collated(list(clips), padding)
        except FramestreamError as error:
            return Failure(error)

    def learn(self, fact: Banned) -> None:
        """Leave a sample out from now on."""
        self.source.ban(fact)

    def watched(self, watch: Watch) -> None:
        """Tell `watch` which sample is being worked on."""
        self.source.watch = watch

    def _collated(self, clips: list[dict[str, Any]], padding: bool) -> Delivery:
        for clip in clips:
            if padding:
                clip["meta"]["padding"] = clip["report"].padding = True
        reports = [clip["report"] for clip in clips]
        started = perf_counter()
        batch = self.collate(clips)
        return Delivery(batch, reports, (perf_counter() - started) * 1e3)
