"""From positions to batches: which rows a rank takes, and what a DataLoader worker does with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from .collate import ClipCollator
from .dataset import ClipSource, PlannedClip
from .errors import FramestreamError
from .health import ClipReport
from .order import rank_rows


class Row(NamedTuple):
    """One row of a batch. `padding` marks a repeated sample on a rank that has no row of its own."""

    epoch: int
    position: int
    padding: bool = False


class RankBatches(Sampler[list[Row]]):
    """The batches of one rank in one epoch, from `start` samples on, as rows of each global batch.

    Every rank gets the same number of batches. A last partial global batch is spread over the ranks evenly; a
    rank that gets none of its rows repeats one.
    """

    def __init__(self, num_samples: int, global_batch: int, rank: int, world_size: int, drop_last: bool) -> None:
        self.num_samples, self.global_batch = num_samples, global_batch
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = self.start = 0

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

    def __iter__(self) -> Iterator[list[Row]]:
        epoch, start = self.epoch, self.start
        for end in self.ends():
            own = rank_rows(end - start, self.rank, self.world_size)
            if own:
                yield [Row(epoch, start + row) for row in own]
            else:
                yield [Row(epoch, min(start + own.start, end - 1), padding=True)]
            start = end


class Delivery(NamedTuple):
    """A finished batch and how its clips came about."""

    batch: dict[str, Any]
    reports: list[ClipReport]


class Failure(NamedTuple):
    """An error on its way out of a worker. Raised there, torch would bury its sentence in a traceback."""

    error: FramestreamError


class BatchMaker:
    """What a DataLoader worker runs: rows to a batch, or only to plans when decoding happens elsewhere."""

    def __init__(self, source: ClipSource, collate: ClipCollator, *, decode: bool) -> None:
        self.source, self.collate, self.decode = source, collate, decode

    def __getitem__(self, rows: Sequence[Row]) -> Delivery | Failure | list[tuple[Row, PlannedClip]]:
        try:
            if self.decode:
                return self._collated(rows, [self.source.clip(row.epoch, row.position) for row in rows])
            return [(row, self.source.plan(row.epoch, row.position)) for row in rows]
        except FramestreamError as error:
            return Failure(error)

    def finish(self, planned: Failure | list[tuple[Row, PlannedClip]]) -> Delivery | Failure:
        """Decode and collate what `__getitem__` planned."""
        if isinstance(planned, Failure):
            return planned
        try:
            return self._collated([row for row, _ in planned], [self.source.finish(clip) for _, clip in planned])
        except FramestreamError as error:
            return Failure(error)

    def _collated(self, rows: Sequence[Row], clips: list[dict[str, Any]]) -> Delivery:
        for row, clip in zip(rows, clips, strict=True):
            if row.padding:
                clip["meta"]["padding"] = clip["report"].padding = True
        return Delivery(self.collate(clips), [clip["report"] for clip in clips])


def as_is(item: Any) -> Any:
    """The collate function of a DataLoader whose dataset returns whole batches."""
    return item
