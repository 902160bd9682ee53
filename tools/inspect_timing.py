"""How long an epoch takes: the loader itself, run for some seconds on the shards that are looked at."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from framestream.pipeline.clip_loader import ClipLoader
from framestream.pipeline.errors import FramestreamError
from framestream.pipeline.loader import build_loader
from framestream.pipeline.shards import ShardSet

from .inspect_splits import Split

if TYPE_CHECKING:
    from .inspect_run import InspectOptions

MAX_WORKERS = 8  # that are started; more are taken to be as fast
BATCH = 8  # clips, less where there are few


@dataclass(frozen=True)
class Timing:
    """How fast the loader was.

    Attributes:
        clips: in the batches that came in `seconds`.
        rejected: clips that it left out.
        workers: that were at work.
        split: on which the loader was run.
    """

    clips: int
    seconds: float
    rejected: int
    workers: int
    split: str = ""

    @property
    def rate(self) -> float:
        """Clips per second."""
        return self.clips / self.seconds

    def epoch(self, samples: int, workers: int) -> float:
        """Seconds for `samples` clips with so many workers."""
        return samples / self.rate * self.workers / workers


def time_loader(
    splits: Sequence[Split], places: Sequence[Sequence[tuple[int, int]]], options: InspectOptions, workers: int
) -> Timing | None:
    """Run the loader on the training split, or on the largest one where none is called so; None where it gives nothing.

    What it had ready before the clock starts is not counted: workers start, and decoders are loaded.

    Args:
        places: (shard, sample) of each split that are looked at; of a remote split only these shards are read.
        workers: processes that the estimate is for.
    """
    number = max(range(len(splits)), key=lambda k: (splits[k].name == "train", len(splits[k].shards)))
    workers = min(workers, MAX_WORKERS)
    try:
        shards = _chosen(splits[number].shards, {shard for shard, _ in places[number]}, options.storage_options)
        loader = build_loader(
            shards,
            sampling=options.sampling,
            image_size=options.image_size,
            patches_per_frame=options.patches,
            mask=options.mask,
            window_size=options.window_size,
            batch_size=max(1, min(BATCH, len(shards) // workers)),
            num_workers=workers,
            drop_last=False,
            decoder="pyav",
            max_reject_share=1.0,
            device="cpu",
        )
    except FramestreamError:
        return None
    try:
        return _run(loader, workers, options.seconds, splits[number].name)
    except FramestreamError:  # of a set of which nothing can be used
        return None
    finally:
        loader.close()


def _chosen(shards: ShardSet, numbers: set[int], storage_options: dict[str, Any] | None) -> ShardSet:
    """The whole set; of a remote one those shards that are fetched anyway."""
    if not shards.remote_bytes or len(numbers) == len(shards.paths):
        return shards
    return ShardSet.open([shards.paths[number] for number in sorted(numbers)], storage_options=storage_options)


def _run(loader: ClipLoader, workers: int, seconds: float, split: str) -> Timing | None:
    begun, started = time.perf_counter(), None
    ready = clips = 0  # batches before the clock starts, clips after it
    while True:
        came = False
        for batch in loader:
            came, now = True, time.perf_counter()
            if started is None:
                ready += 1
                if ready >= 2 * workers or now - begun >= seconds:
                    started = now
                continue
            clips += len(batch["keys"])
            if now - started >= seconds:
                return Timing(clips, now - started, int(loader.stats()["rejects"]), workers, split)
        if not came:
            return None
