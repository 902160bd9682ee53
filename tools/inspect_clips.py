"""A few clips as the model will see them, and how long making one takes; decoded in processes of their own."""

from __future__ import annotations

import base64
import io
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from framestream.pipeline.errors import ShardError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.probe import VideoInfo
from framestream.pipeline.shards import ShardSet
from framestream.pipeline.transforms import ClipTransform

from .inspect_splits import Split
from .inspect_text import shown
from .pool import Failure, WorkerPool

THUMB = 120  # pixels
CLIP_TIMEOUT_S = 120.0  # for one clip, fetching it included
MAX_TIMED = 200  # clips beside the sheets
MAX_TIMED_FAILURES = 10  # beside the sheets


@dataclass(frozen=True)
class ViewTask:
    """One clip to be made. `thumb` is the side of its pictures in pixels, 0 for none."""

    shards: ShardSet
    shard: int
    sample: int
    transform: ClipTransform
    thumb: int = 0


@dataclass(frozen=True)
class SeenClip:
    """A clip as the model sees it.

    Attributes:
        text: of the sample, shortened.
        info: of its video, without packets.
        frame_index, frame_time, stream, valid: of each frame of the sequence, as in a batch.
        thumbs: data URI of each frame's picture; () where none were asked for.
        seconds: that reading, decoding and transforming it took.
        process: the one that made it.
    """

    text: str
    info: VideoInfo
    frame_index: tuple[int, ...]
    frame_time: tuple[float, ...]
    stream: tuple[int, ...]
    valid: tuple[bool, ...]
    thumbs: tuple[str, ...]
    seconds: float
    process: int

    def layout(self, patches: int) -> FrameLayout:
        """What stands where in its sequence, with `patches` tokens per frame."""
        return FrameLayout.from_arrays(
            self.frame_index, self.stream, self.valid, patches=patches, frame_time=self.frame_time
        )


@dataclass(frozen=True)
class Sheet:
    """A clip of the page: where it is, and what came of making it."""

    split: str
    shard: str
    key: str
    clip: SeenClip | None
    fault: str = ""


@dataclass(frozen=True)
class Timing:
    """How long clips took.

    Attributes:
        clips: that were timed.
        failed: that could not be made, of `clips + failed + warm_up` tried.
        mean, deviation: seconds per clip, and the standard deviation of one.
        warm_up: clips that are not counted, the first of each process.
        processes: that were at work at the same time.
    """

    clips: int
    failed: int
    mean: float
    deviation: float
    warm_up: int
    processes: int

    def epoch(self, samples: int, workers: int) -> float:
        """Seconds for `samples` clips if `workers` processes share them evenly, as fast as those that were timed."""
        return self.mean * samples / workers


def view_clip(task: ViewTask) -> SeenClip:
    """Make one clip, in a worker process. Raises SampleError and ShardError where it cannot be made."""
    torch.set_num_threads(1)  # as in the worker of a loader
    task.shards.keys(task.shard)  # a loader has the shard's index in memory, too
    started = time.perf_counter()
    sample = task.shards.read(task.shard, task.sample, want=("video", "json", "txt"), defer_video=True)
    if not task.transform.reads_packets(sample):
        sample = sample.read()
    request = task.transform.request(sample)
    clip = task.transform.clip(request)
    seconds = time.perf_counter() - started
    return SeenClip(
        text=shown(request.text, 600),
        info=replace(request.info, packets=None),
        frame_index=tuple(clip["frame_index"].tolist()),
        frame_time=tuple(clip["frame_time"].tolist()),
        stream=tuple(clip["frame_stream"].tolist()),
        valid=tuple(clip["frame_valid"].tolist()),
        thumbs=tuple(thumbnail(frame, task.thumb) for frame in clip["frames"]) if task.thumb else (),
        seconds=seconds,
        process=os.getpid(),
    )


def thumbnail(frame: torch.Tensor, side: int) -> str:
    """uint8 `[3, S, S]` as a WebP of `side` x `side` pixels, in a data URI."""
    from PIL import Image

    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    image.resize((side, side), Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=72, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def view_sample(shards: ShardSet, shard: int, sample: int, transform: ClipTransform) -> SeenClip | str:
    """One clip without pictures, or why there is none."""
    with WorkerPool(view_clip, workers=1, timeout_s=CLIP_TIMEOUT_S) as pool:
        _, result = next(iter(pool.map([ViewTask(shards, shard, sample, transform)])))
    return result.reason if isinstance(result, Failure) else result


def view_clips(
    splits: Sequence[Split],
    sheets: Sequence[tuple[int, int, int]],
    timed: Sequence[tuple[int, int, int]],
    transform: ClipTransform,
    seconds: float,
    processes: int,
) -> tuple[list[Sheet], Timing | None]:
    """Make the clips of the sheets, and then others for so many seconds.

    Args:
        splits: what the places count in.
        sheets, timed: (split, shard, sample) of each clip.
        transform: makes the clips.
        seconds: no further clip of `timed` is begun so long after the first clip was ready.
        processes: at work at the same time, because cores share caches and memory, and may have other work.

    Returns:
        A sheet for each place of `sheets`, and the timing; None where no clip could be made.
    """
    durations: list[float] = []
    warm: set[int] = set()  # processes that have made a clip: the first one finds nothing loaded
    warm_up = 0.0
    results: list[Sheet] = []
    failed = failed_late = 0  # of all clips, of those beside the sheets
    ready = float("inf")

    def tasks() -> Iterator[ViewTask]:
        for split, shard, sample in sheets:
            yield ViewTask(splits[split].shards, shard, sample, transform, THUMB)
        for split, shard, sample in timed:
            if time.monotonic() - ready >= seconds or failed_late >= MAX_TIMED_FAILURES:
                return
            yield ViewTask(splits[split].shards, shard, sample, transform)

    with WorkerPool(view_clip, workers=processes, timeout_s=CLIP_TIMEOUT_S) as pool:
        for number, (task, result) in enumerate(pool.map(tasks())):
            ready = min(ready, time.monotonic())
            clip, fault = (None, shown(result.reason)) if isinstance(result, Failure) else (result, "")
            if clip is not None and clip.process in warm:
                durations.append(clip.seconds)
            elif clip is not None:
                warm.add(clip.process)
                warm_up = clip.seconds
            else:
                failed += 1
                failed_late += number >= len(sheets)
            if number < len(sheets):
                name = splits[sheets[number][0]].name
                results.append(Sheet(name, task.shards.names[task.shard], _key(task), clip, fault))
    if not warm:
        return results, None
    counted = durations or [warm_up]  # of so few clips that none was left, the last
    deviation = statistics.stdev(counted) if len(counted) > 1 else 0.0
    cold = len(warm) - (not durations)
    return results, Timing(len(counted), failed, statistics.mean(counted), deviation, cold, len(warm))


def _key(task: ViewTask) -> str:
    try:
        return shown(task.shards.keys(task.shard)[task.sample], 120)
    except ShardError:
        return f"sample {task.sample}"
