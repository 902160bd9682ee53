"""Encoding the frames of a clip: from the decoder to the encoder in Y'CbCr, through one filter graph of FFmpeg's.

Ordinary videos are scaled once, straight to yuv420p, and never seen as RGB or by numpy. Colours keep the matrix that
they are stored in, named in the result where the source left it to the player to guess; the range becomes limited,
which every player takes for granted. Pixels become square, as they are for everybody who looks at arrays: a picture
whose pixels are wide is made wider.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from framestream.pipeline.errors import SampleError
from framestream.pipeline.packet_table import MAX_SIDE
from framestream.pipeline.picture import HD_LINES, Orientation, check_matrix, fit_short_side
from framestream.pipeline.probe import VideoInfo

from .clip_file import ClipFile
from .encoders import ENCODERS, TAGS, options_of
from .opened_video import OpenedVideo
from .shard_options import Encoding

_CLOCK = Fraction(1, 90_000)  # of clips with a variable rate, s
_RGB, _BT709, _UNTAGGED, _RESERVED, _BT601 = (
    0,
    1,
    2,
    3,
    6,
)  # MatrixCoefficients of ITU-T H.273, which are FFmpeg's numbers
_LIMITED = 1  # AVCOL_RANGE_MPEG
_MATRIX_NAMES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}  # of FFmpeg's filter
_ODDEST_PIXEL = 10  # times as wide as high, or as high as wide; beyond, it is no shape but damage
_SCALING = "bicubic+accurate_rnd+bitexact"  # the same bits on every processor


class Timing(NamedTuple):
    """When a clip shows what.

    Attributes:
        indices: the source's frame for each frame of the clip; it may repeat.
        ticks: when each is shown, from 0.
        end: when the last one ends.
        rate: frames per second, nominally.
        clock: seconds per tick.
    """

    indices: list[int]
    ticks: list[int]
    end: int
    rate: Fraction
    clock: Fraction


def timing(info: VideoInfo, frames: tuple[int, int], fps: float | None) -> Timing:
    """A constant rate stays one, a variable rate keeps its times; `fps` takes for each tick of that rate the newest
    source frame. Raises SampleError where two frames are shown at the same time."""
    first, stop = frames
    times = info.times()[first:stop]
    after = float(info.times()[stop]) if stop < info.num_frames else info.duration
    if fps is not None:
        rate = _nominal(fps)
        count = max(1, round((after - times[0]) * fps))
        wanted = times[0] + np.arange(count) / float(rate)
        newest = np.searchsorted(times, wanted + 1e-6, side="right") - 1
        return Timing((first + newest).tolist(), list(range(count)), count, rate, 1 / rate)
    rate = _nominal(info.fps)
    if info.timestamps is None:
        return Timing(list(range(first, stop)), list(range(stop - first)), stop - first, rate, 1 / rate)
    ticks = np.rint((np.append(times, after) - times[0]) / float(_CLOCK)).astype(np.int64)
    if np.diff(ticks[:-1]).min(initial=1) < 1:
        raise SampleError("two frames of the source are shown at the same time; set fps to even it out")
    end = max(int(ticks[-1]), int(ticks[-2]) + 1)
    return Timing(list(range(first, stop)), ticks[:-1].tolist(), end, rate, _CLOCK)


def _nominal(fps: float) -> Fraction:
    """Rates as they are usual; very slow ones, such as a frame an hour, as exactly as encoders take them."""
    return Fraction(fps).limit_denominator(1001 if fps >= 1 else 1_000_000)


def encode(video: OpenedVideo, frames: tuple[int, int], encoding: Encoding, name: str, *, sound: bool) -> bytes:
    """Encode frames `frames[0]` to `frames[1]` - 1 into mp4: the same bytes on every run.

    Args:
        sound: with the sound of that stretch, where there is some.
    Raises:
        SampleError: a frame is not to be had, or the encoder fails.
    """
    import av

    try:
        when = timing(video.info, frames, encoding.fps)
    except SampleError as err:
        raise SampleError(f"{name}: {err}") from err
    try:
        with (
            ClipFile("mp4") as file,
            contextlib.closing(_pictures(video, sorted(set(when.indices)), encoding)) as shown,
        ):
            stream: Any = None
            at = 0
            for index, picture in shown:
                if stream is None:
                    stream = _stream(file, picture, when, encoding)
                    if sound:
                        file.add_sound(video.sound, _stretch(video.info, frames))
                while at < len(when.indices) and when.indices[at] == index:
                    picture.pts, picture.time_base = when.ticks[at], when.clock
                    file.mux(_lasting(stream.encode(picture), when))
                    at += 1
            file.mux(_lasting(stream.encode(None), when))
            return file.finish()
    except (av.error.FFmpegError, ValueError) as err:
        raise SampleError(f"{name} cannot be encoded ({err})") from err


def _stretch(info: VideoInfo, frames: tuple[int, int]) -> tuple[Fraction, Fraction]:
    """Where frames begin and end, in seconds from the first of the source."""
    times = info.times()
    end = float(times[frames[1]]) if frames[1] < info.num_frames else info.duration
    return Fraction(float(times[frames[0]])), Fraction(end)


def _lasting(packets: list[Any], when: Timing) -> Iterator[Any]:
    """Packets that say how long their frames are shown, the last one, too."""
    for packet in packets:
        after = bisect_right(when.ticks, packet.pts)
        packet.duration = (when.ticks[after] if after < len(when.ticks) else when.end) - packet.pts
        yield packet


def _pictures(video: OpenedVideo, indices: list[int], encoding: Encoding) -> Generator[tuple[int, Any], None, None]:
    """yuv420p frames of the clip's size, with nothing in them that the encoder would follow but the pixels."""
    graph: _Graph | None = None
    with contextlib.closing(video.decoder.pictures(indices)) as stored:
        for index, frame, laid in stored:
            if graph is None:
                graph = _Graph(frame, laid, encoding.short_side, video.stream.sample_aspect_ratio, video.name)
            picture = graph.filtered(frame)
            picture.pict_type = 0  # else x264 makes the same types of frames as the source has
            yield index, picture


class _Graph:
    """Scales, crops to even sides, turns and converts frames that are alike.

    Args:
        frame: the first of them.
        laid: how a player turns it.
        short_side: as in `Encoding`.
        pixel: width of a stored pixel over its height; None or 0 where nothing is said.
    """

    def __init__(
        self, frame: Any, laid: Orientation, short_side: int | None, pixel: Fraction | None, name: str
    ) -> None:
        import av

        check_matrix(frame, name)
        self._name = name or "the video"
        self._matrix = int(frame.colorspace)
        if self._matrix == _UNTAGGED:
            self._matrix = _BT709 if frame.height > HD_LINES else _BT601
        elif self._matrix == _RESERVED:  # FFmpeg's choice
            self._matrix = _BT601
        graph: Any = av.filter.Graph()
        graph.threads = 1
        filters = [
            graph.add(
                "buffer",
                video_size=f"{frame.width}x{frame.height}",
                pix_fmt=frame.format.name,
                time_base="1/1",
                pixel_aspect="1/1",
                colorspace=str(int(frame.colorspace)),
                range=str(int(frame.color_range)),
            )
        ]
        filters += [graph.add(kind, args) for kind, args in self._steps(frame, laid, short_side, pixel)]
        filters.append(graph.add("buffersink"))
        graph.link_nodes(*filters).configure()
        self._source, self._sink = filters[0], filters[-1]
        self._graph = graph

    def _steps(
        self, frame: Any, laid: Orientation, short_side: int | None, pixel: Fraction | None
    ) -> Iterator[tuple[str, str | None]]:
        wide = _square(frame.width, pixel)
        shorter = min(wide, frame.height)
        width, height = fit_short_side(wide, frame.height, None if short_side is None else min(short_side, shorter))
        even_width, even_height = width // 2 * 2, height // 2 * 2
        if not even_width or not even_height:
            raise SampleError(
                f"{self._name} cannot be encoded: its picture is {width} x {height} pixels, and colours at half the "
                "resolution (yuv420p) need 2 on each side"
            )
        out_matrix = self._matrix if self._matrix != _RGB else (_BT709 if even_height > HD_LINES else _BT601)
        in_matrix = "" if self._matrix == _RGB else f":in_color_matrix={_MATRIX_NAMES[self._matrix]}"
        yield (
            "scale",
            f"{width}:{height}:flags={_SCALING}{in_matrix}:out_color_matrix={_MATRIX_NAMES[out_matrix]}:out_range=tv",
        )
        self.matrix = out_matrix
        yield "format", "yuv420p"
        if (even_width, even_height) != (width, height):
            yield "crop", f"{even_width}:{even_height}:0:0:exact=1"
        if laid.swap:
            yield "transpose", "cclock_flip"  # rows become columns
        if laid.mirror_x:
            yield "hflip", None
        if laid.mirror_y:
            yield "vflip", None

    def filtered(self, frame: Any) -> Any:
        frame.pts, frame.time_base = 0, Fraction(1)
        self._source.push(frame)
        picture = self._sink.pull()
        picture.colorspace, picture.color_range = self.matrix, _LIMITED
        return picture


def _square(width: int, pixel: Fraction | None) -> int:
    """Pixels of a row when they are made square, as players do it: the height stays."""
    if not pixel or not Fraction(1, _ODDEST_PIXEL) <= pixel <= _ODDEST_PIXEL:
        return width
    return max(2, min(MAX_SIDE, round(width * pixel)))


def _stream(file: ClipFile, picture: Any, when: Timing, encoding: Encoding) -> Any:
    stream = file.container.add_stream(ENCODERS[encoding.codec].name, rate=when.rate, options=options_of(encoding))
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    context = stream.codec_context
    context.thread_count, context.time_base = 1, when.clock
    if encoding.codec in TAGS:
        context.codec_tag = TAGS[encoding.codec]
    context.color_range, context.colorspace = picture.color_range, picture.colorspace
    for name in ("color_primaries", "color_trc"):
        told = int(getattr(picture, name))
        setattr(context, name, picture.colorspace if told == _UNTAGGED else told)
    return stream
