"""The work on one clip, in a worker process: its bytes, copied or encoded anew, and what is to be said of them."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from framestream.pipeline.errors import ConfigError, SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.shard_writer import sample_members

from .clips import Clip
from .inputs import Source

if TYPE_CHECKING:
    from framestream.pipeline.decode import Decoder

CHUNK = 32  # decoded frames in memory at a time
DECODE_TIMEOUT_S = 3600.0  # for opening and per chunk; the limit that matters is that of the worker
_CLOCK = Fraction(1, 90_000)  # of clips with a variable rate, s
_HD_LINES = 576  # above this height colours are BT.709, below BT.601, as players expect


@dataclass(frozen=True)
class Encoding:
    """How clips are encoded. One thread, bit-exact, closed GOPs of fixed length, no B-frames, no sound."""

    short_side: int | None = None
    fps: float | None = None
    gop: int = 16
    crf: int = 20

    def __post_init__(self) -> None:
        if self.short_side is not None and (self.short_side < 16 or self.short_side % 2):
            raise ConfigError(f"short_side is {self.short_side}, it has to be even and at least 16")
        if self.fps is not None and not 0.0 < self.fps <= 1000.0:
            raise ConfigError(f"fps is {self.fps}, it has to be above 0 and at most 1000")
        if self.gop < 1 or not 0 <= self.crf <= 51:
            raise ConfigError(f"gop has to be at least 1 and crf 0 to 51, got {self.gop} and {self.crf}")


@dataclass(frozen=True)
class ClipTask:
    """One clip to be made; `encoding` None copies the file as it is."""

    clip: Clip
    info: VideoInfo
    encoding: Encoding | None


@dataclass(frozen=True)
class MadeClip:
    """A finished sample's members, and the seconds of video in it."""

    members: dict[str, bytes]
    seconds: float


def encoder_version() -> str:
    """What the bytes of an encoded clip depend on. Raises ConfigError when this PyAV cannot encode H.264."""
    import av

    if "libx264" not in av.codecs_available:
        raise ConfigError(f"PyAV {av.__version__} was built without libx264, so clips cannot be encoded: use its wheel")
    return f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


def probe_source(source: Source) -> VideoInfo:
    """What is in a source. Raises DecodeError when it is no usable video."""
    return probe_video(source.path, name=source.source)


def make_clip(task: ClipTask) -> MadeClip:
    """Make one sample. Raises SampleError when the source does not give every frame of it."""
    clip = task.clip
    name = clip.source.source if clip.frames is None else f"{clip.source.source} ({clip.start:g} to {clip.end:g} s)"
    if task.encoding is None:
        video, ext = _read(clip.source), Path(clip.source.path).suffix.lower().lstrip(".")
    else:
        decoder = _open(clip.source, task.info, task.encoding.short_side)
        video, ext = encode(decoder, task.info, clip.frames or (0, task.info.num_frames), task.encoding, name), "mp4"
    info = probe_video(video, name=name, packets=True)
    meta = {
        **info.to_json(),
        "source": clip.source.source,
        "clip_start": clip.start,
        "clip_end": clip.end,
        "text": clip.source.text or "",
        "user": dict(clip.source.user),
    }
    try:
        return MadeClip(sample_members(video, ext, meta, clip.source.text), info.duration)
    except ConfigError as err:  # what one row of a manifest brought is no reason to end the run
        raise SampleError(f"{name}: {err}") from err


def _read(source: Source) -> bytes:
    try:
        data = Path(source.path).read_bytes()
    except OSError as err:
        raise SampleError(f"{source.source} cannot be read ({err.strerror or err})") from err
    if len(data) != source.size:
        raise SampleError(f"{source.source} has {len(data)} bytes, it had {source.size} at the start: it was changed")
    return data


@functools.lru_cache(maxsize=1)  # clips of one source come one after the other: it is opened once per worker
def _open(source: Source, info: VideoInfo, short_side: int | None) -> Decoder:
    from framestream.pipeline.decode import open_decoder

    if short_side is not None:
        short_side = min(short_side, info.width, info.height)  # pixels are never invented
    return open_decoder(
        _read(source), backend="pyav", short_side=short_side, info=info, name=source.source, timeout_s=DECODE_TIMEOUT_S
    )


def encode(decoder: Decoder, info: VideoInfo, frames: tuple[int, int], encoding: Encoding, name: str) -> bytes:
    """Encode frames `frames[0]` to `frames[1]` - 1 as H.264 in mp4: the same bytes on every run.

    A constant rate stays one, a variable rate keeps its times; `encoding.fps` takes for each tick of that rate
    the newest source frame. Raises SampleError when a frame is not to be had or the encoder fails.
    """
    import av

    indices, ticks, rate, clock = _timing(info, frames, encoding.fps)
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream: Any = None
            for tick, picture in zip(ticks, _pictures(decoder, indices), strict=True):
                if stream is None:
                    stream = _stream(container, picture.shape[1], picture.shape[0], rate, clock, encoding)
                frame = _frame(picture)
                frame.pts, frame.time_base = tick, clock
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as err:
        raise SampleError(f"{name} cannot be encoded ({err})") from err
    return buffer.getvalue()


def _timing(
    info: VideoInfo, frames: tuple[int, int], fps: float | None
) -> tuple[list[int], list[int], Fraction, Fraction]:
    """Source indices to encode, their times in ticks, nominal rate, and seconds per tick."""
    first, stop = frames
    times = info.times()[first:stop]
    if fps is not None:
        rate = Fraction(fps).limit_denominator(1001)
        after = info.times()[stop] if stop < info.num_frames else info.duration
        count = max(1, round((float(after) - times[0]) * fps))
        wanted = times[0] + np.arange(count) / float(rate)
        newest = np.searchsorted(times, wanted + 1e-6, side="right") - 1
        return (first + newest).tolist(), list(range(count)), rate, 1 / rate
    rate = Fraction(info.fps).limit_denominator(1001)
    if info.timestamps is None:
        return list(range(first, stop)), list(range(stop - first)), rate, 1 / rate
    ticks = np.rint((times - times[0]) / float(_CLOCK)).astype(np.int64)
    if len(ticks) > 1 and np.diff(ticks).min() < 1:
        raise SampleError("two frames of the source are shown at the same time; set fps to even it out")
    return list(range(first, stop)), ticks.tolist(), rate, _CLOCK


def _pictures(decoder: Decoder, indices: list[int]) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3], H and W even, one per index."""
    for begin in range(0, len(indices), CHUNK):
        frames = decoder.frames_at(indices[begin : begin + CHUNK])
        height, width = (side // 2 * 2 for side in frames.shape[-2:])
        yield from np.ascontiguousarray(frames[..., :height, :width].permute(0, 2, 3, 1).numpy())


def _stream(container: Any, width: int, height: int, rate: Fraction, clock: Fraction, encoding: Encoding) -> Any:
    gop = encoding.gop
    # Without mbtree: with it this libx264 gave other bytes in 1 of 12 runs of the same process, even on one thread.
    options = {
        "preset": "fast",
        "crf": str(encoding.crf),
        "x264-params": f"threads=1:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=0:mbtree=0",
        "flags": "+bitexact",
    }
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count, context.time_base = 1, clock
    context.color_range = 1  # limited, as _frame makes it
    context.colorspace = context.color_primaries = context.color_trc = 1 if height > _HD_LINES else 6
    return stream


def _frame(picture: np.ndarray) -> Any:
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    matrix = Colorspace.ITU709 if picture.shape[0] > _HD_LINES else Colorspace.ITU601
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=matrix,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
        threads=1,
    )
