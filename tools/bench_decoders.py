"""Ways to get the same frames of one video: ours, and what others would write, each as well as it can be written.

Everybody gets the bytes of the file, the sorted frames wanted and one thread, and opens the file anew each time. Who
can resize while decoding does so; nobody keeps more frames than are wanted.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from framestream.pipeline.decode import available_backends, fit_short_side, open_decoder
from framestream.pipeline.probe import VideoInfo

from .bench_limit import LeastWork, least_work

OURS, LIMIT, UNKNOWN, SNAP = "framestream", "lower limit", "framestream, unknown file", "framestream, slow_snap"
DECORD, DECORD_ALL = "Decord get_batch", "Decord, everything"
PYAV, PYAV_ALL, TORCHCODEC = "PyAV, seek", "PyAV, everything", "TorchCodec"
EVERYTHING = (DECORD_ALL, PYAV_ALL)
LIMIT_NO_SKIP = "lower limit, every picture"

_CHUNK = 32  # decoded frames in memory at a time


@dataclass(frozen=True)
class Task:
    """One video and what is wanted of it.

    Attributes:
        name, data: the video file.
        info: what its shard would say about it.
        wanted: sorted, distinct frames.
        snapped: the same with slow frames moved to key frames.
        short_side: of the frames, in pixels.
    """

    name: str
    data: bytes
    info: VideoInfo
    wanted: list[int]
    snapped: list[int]
    short_side: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the frames, as shown."""
        return fit_short_side(self.info.width, self.info.height, self.short_side)


def candidates(task: Task) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What can run on a task, and why the others cannot.

    A candidate returns uint8 frames, `[n, 3, H, W]` or `[n, H, W, 3]`, or a list of them; it may raise anything.
    """
    import av

    runs: dict[str, Callable[[], Any]] = {OURS: functools.partial(_ours, task, task.info, task.wanted)}
    missing: dict[str, str] = {}
    try:
        work = least_work(task.data, task.wanted)
    except (av.error.FFmpegError, ValueError) as err:
        missing[LIMIT] = str(err)
    else:
        runs[LIMIT] = functools.partial(_limit, task, work, True)
        runs[LIMIT_NO_SKIP] = functools.partial(_limit, task, work, False)
    runs[UNKNOWN] = functools.partial(_ours, task, None, task.wanted)
    runs[SNAP] = functools.partial(_ours, task, task.info, task.snapped)
    usable = available_backends()
    others: dict[str, dict[str, Callable[[Task], Any]]] = {
        "decord": {DECORD: _decord, DECORD_ALL: _decord_all},
        "pyav": {PYAV: _pyav, PYAV_ALL: _pyav_all},
        "torchcodec": {TORCHCODEC: _torchcodec},
    }
    for backend, names in others.items():
        for name, run in names.items():
            if usable[backend]:
                missing[name] = usable[backend]
            else:
                runs[name] = functools.partial(run, task)
    return runs, missing


def _ours(task: Task, info: VideoInfo | None, wanted: list[int]) -> Any:
    with open_decoder(task.data, backend="pyav", short_side=task.short_side, info=info, timeout_s=600.0) as decoder:
        return decoder.frames_at(wanted)


def _limit(task: Task, work: LeastWork, skip: bool) -> list[np.ndarray]:
    turned = task.info.rotation in (90, 270)
    pictures = work.decode(task.size[::-1] if turned else task.size, skip=skip)
    if not task.info.rotation:
        return pictures
    return [np.rot90(picture, -task.info.rotation // 90, (1, 2)) for picture in pictures]  # views, which cost nothing


def _decord_reader(task: Task) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    width, height = task.size
    return decord.VideoReader(io.BytesIO(task.data), ctx=decord.cpu(0), width=width, height=height, num_threads=1)


def _decord(task: Task) -> np.ndarray:
    return _decord_reader(task).get_batch(task.wanted).asnumpy()


def _decord_all(task: Task) -> np.ndarray:
    reader, wanted = _decord_reader(task), np.array(task.wanted)
    kept = []
    for begin in range(0, len(reader), _CHUNK):
        end = min(begin + _CHUNK, len(reader))
        frames = reader.get_batch(range(begin, end)).asnumpy()
        kept.append(frames[wanted[(wanted >= begin) & (wanted < end)] - begin])
    return np.concatenate(kept)


def _pyav_open(task: Task) -> tuple[Any, Any]:
    import av

    container = av.open(io.BytesIO(task.data))
    stream: Any = container.streams.best("video")
    stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
    return container, stream


def _pyav_pixels(task: Task, frame: Any) -> np.ndarray:
    turns = frame.rotation // 90
    width, height = task.size[::-1] if turns % 2 else task.size
    picture = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.rot90(picture, turns) if turns else picture


def _pyav_all(task: Task) -> list[np.ndarray]:
    wanted = set(task.wanted)
    container, stream = _pyav_open(task)
    with container:
        return [_pyav_pixels(task, f) for number, f in enumerate(container.decode(stream)) if number in wanted]


def _pyav(task: Task) -> list[np.ndarray]:
    """Seek to the key frame before each wanted frame and decode up to it; go on instead where that is near."""
    container, stream = _pyav_open(task)
    with container:
        rate, first = Fraction(stream.average_rate), stream.start_time or 0
        pictures: list[np.ndarray] = []
        at, frames = -1, container.decode(stream)
        for index in task.wanted:
            time = first + round(index / rate / stream.time_base)
            if index - at > rate:  # more than a second away: a key frame may be nearer
                container.seek(time, stream=stream)
                frames = container.decode(stream)
            frame = next(f for f in frames if f.pts is not None and f.pts >= time)
            pictures.append(_pyav_pixels(task, frame))
            at = index
        return pictures


def _torchcodec(task: Task) -> Any:
    from torchcodec.decoders import VideoDecoder
    from torchvision.transforms.v2.functional import resize

    decoder = VideoDecoder(task.data, seek_mode="exact", num_ffmpeg_threads=1)
    frames = decoder.get_frames_at(task.wanted).data
    return resize(frames, list(task.size[::-1]), antialias=True)
