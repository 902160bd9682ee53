"""A few clips as the model will see them; decoded in processes of their own."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
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
    """

    text: str
    info: VideoInfo
    frame_index: tuple[int, ...]
    frame_time: tuple[float, ...]
    stream: tuple[int, ...]
    valid: tuple[bool, ...]
    thumbs: tuple[str, ...]
    seconds: float

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
    splits: Sequence[Split], places: Sequence[tuple[int, int, int]], transform: ClipTransform, processes: int
) -> list[Sheet]:
    """Make the clips of the sheets, one for each place.

    Args:
        splits: what the places count in.
        places: (split, shard, sample) of each clip.
        transform: makes the clips.
        processes: at work at the same time.
    """
    tasks = [ViewTask(splits[split].shards, shard, sample, transform, THUMB) for split, shard, sample in places]
    sheets: list[Sheet] = []
    with WorkerPool(view_clip, workers=processes, timeout_s=CLIP_TIMEOUT_S) as pool:
        for (split, _, _), (task, result) in zip(places, pool.map(tasks), strict=True):
            clip, fault = (None, shown(result.reason)) if isinstance(result, Failure) else (result, "")
            sheets.append(Sheet(splits[split].name, task.shards.names[task.shard], _key(task), clip, fault))
    return sheets


def _key(task: ViewTask) -> str:
    try:
        return shown(task.shards.keys(task.shard)[task.sample], 120)
    except ShardError:
        return f"sample {task.sample}"
