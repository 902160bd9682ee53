"""The sound of a stretch of a video: its packets as they are where mp4 can hold them, else encoded as AAC."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import Any

from framestream.pipeline.buffer_file import buffer_file
from framestream.pipeline.errors import SampleError
from framestream.pipeline.packet_table import reason_of
from framestream.pipeline.packets import CONTAINERS

IN_MP4 = ("aac", "mp3", "opus", "ac3", "eac3", "alac", "flac")  # what players expect in mp4
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
AAC_BITS = 64_000  # a second, per channel
_PREROLL_S = Fraction(1, 2)  # decoded before a stretch begins: coded sound builds on what was before


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What FFmpeg says of the sound as a SampleError that says whose it is. Raises that."""
    import av

    try:
        yield
    except (av.error.FFmpegError, ValueError) as err:
        raise SampleError(
            f"{name}: its sound cannot be read ({reason_of(err)}); leave it out with --audio drop"
        ) from err


class SoundReader:
    """The sound of a source; the stream that players choose.

    Args:
        data: the file.
        begin: when its first picture is shown, in seconds of the container's clock.
        name: how errors call it.
    """

    def __init__(self, data: memoryview, begin: Fraction, name: str) -> None:
        self._data, self._begin, self.name = data, begin, name
        self._open()

    def _open(self) -> None:
        import av

        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        with _readable(self.name):
            self._container: Any = av.open(buffer_file(self._data), options=options, metadata_errors="replace")
        self.stream: Any = self._container.streams.best("audio") or self._container.streams.audio[0]
        if self.stream.codec_context is None:
            raise SampleError(
                f"{self.name}: FFmpeg does not know the codec of its sound; leave it out with --audio drop"
            )

    @property
    def codec(self) -> str:
        """FFmpeg's name of it."""
        return str(self.stream.codec_context.codec.canonical_name)

    def packets(self, start: Fraction, end: Fraction) -> Iterator[tuple[Fraction, Any]]:
        """The packets that sound between `start` and `end`, seconds from the first picture: (its beginning, packet)."""
        with _readable(self.name):
            yield from self._packets(start, end)

    def _packets(self, start: Fraction, end: Fraction) -> Iterator[tuple[Fraction, Any]]:
        self._container.seek(max(0, int((start + self._begin) * 1_000_000)))
        timed = self._timed()
        first = next(timed, None)
        if first is None or first[0] > start:  # containers seek where they like; so from the beginning on
            self._container.close()
            self._open()
            timed = self._timed()
        else:
            timed = chain([first], timed)
        for at, packet in timed:
            if at >= end:
                return
            if at + packet.duration * packet.time_base > start:
                yield at, packet

    def frames(self, start: Fraction, end: Fraction) -> Iterator[tuple[Fraction, Any]]:
        """The same, decoded: (its beginning, frame)."""
        context: Any = None
        try:
            for _, packet in self.packets(start, end):
                if context is None:  # not before: `packets` may open the file anew
                    context = self.stream.codec_context
                    if not context.is_open:
                        context.thread_count = 1
                with _readable(self.name):
                    frames = context.decode(packet)
                for frame in frames:
                    if frame.pts is not None:
                        yield frame.pts * frame.time_base - self._begin, frame
        finally:
            if context is not None and context.is_open:
                context.flush_buffers()

    def _timed(self) -> Iterator[tuple[Fraction, Any]]:
        for packet in self._container.demux(self.stream):
            if packet.size and packet.pts is not None:
                yield packet.pts * packet.time_base - self._begin, packet

    def close(self) -> None:
        self._container.close()


class ClipSound:
    """The sound stream of a clip that is being written; `before` gives its packets as their time comes.

    Args:
        writer: PyAV's container, before anything was written to it.
        start, end: seconds of the source.
        copied: codecs whose packets are written as they are; others are encoded as AAC.
    """

    def __init__(
        self, writer: Any, reader: SoundReader, start: Fraction, end: Fraction, copied: tuple[str, ...] = IN_MP4
    ) -> None:
        self._waiting: deque[Any] = deque()
        if reader.codec in copied:
            self._stream = writer.add_stream_from_template(reader.stream)
            self._stream.codec_context.bit_rate = 0  # FFmpeg's guess so far, another one for each part that was read
            self._waiting.extend(_on_clock(reader.packets(start, end), start, Fraction(1, reader.stream.rate)))
            for packet in self._waiting:
                packet.stream = self._stream
        else:
            self._stream = writer.add_stream("aac", rate=_rate(reader.stream.rate), layout=_layout(reader.stream))
            self._stream.bit_rate = AAC_BITS * self._stream.codec_context.layout.nb_channels
            self._stream.codec_context.thread_count = 1
            for frame in _samples(reader, start, end, self._stream.codec_context):
                self._waiting.extend(self._stream.encode(frame))
            self._waiting.extend(self._stream.encode(None))

    def before(self, seconds: Fraction | None) -> Iterator[Any]:
        """The packets that come before a moment of the clip, and have not come yet; None for all that are left."""
        while self._waiting:
            packet = self._waiting[0]
            if seconds is not None and packet.pts * packet.time_base > seconds:
                return
            yield self._waiting.popleft()


def _on_clock(packets: Iterator[tuple[Fraction, Any]], start: Fraction, sample: Fraction) -> Iterator[Any]:
    """Packets whose times count from `start`, on a clock that tells single samples, and rise.

    AVI counts in packets, so the time to the first picture would be lost to rounding. Files that were joined without
    encoding may give a time twice, which containers refuse.
    """
    last: int | None = None
    for at, packet in packets:
        clock = min(packet.time_base, sample)
        pts = round((at - start) / clock)
        last = pts if last is None else max(pts, last + 1)
        duration = round(packet.duration * packet.time_base / clock)
        packet.pts = packet.dts = last
        packet.duration, packet.time_base = duration, clock
        yield packet


def _rate(rate: int) -> int:
    """The lowest rate of AAC that loses nothing of `rate`."""
    return min((fitting for fitting in AAC_RATES if fitting >= rate), default=AAC_RATES[0])


def _layout(stream: Any) -> str:
    return "mono" if stream.codec_context.layout.nb_channels == 1 else "stereo"


def _samples(reader: SoundReader, start: Fraction, end: Fraction, encoder: Any) -> Iterator[Any]:
    """Decoded sound from `start` to `end` as `encoder` wants it, its time counted from `start`."""
    import av

    graph: Any = None
    rate = encoder.sample_rate
    span = f"start_pts=0:end_pts={round((end - start) * rate)}"
    form = f"sample_fmts={encoder.format.name}:sample_rates={rate}:channel_layouts={encoder.layout.name}"
    for at, frame in reader.frames(max(Fraction(0), start - _PREROLL_S), end):
        frame.pts, frame.time_base = round((at - start) * rate), Fraction(1, rate)
        if graph is None:
            graph = av.filter.Graph()
            graph.threads = 1
            graph.link_nodes(
                graph.add_abuffer(
                    sample_rate=frame.sample_rate,
                    format=frame.format.name,
                    layout=frame.layout.name,
                    time_base=Fraction(1, rate),
                ),
                graph.add("aresample", f"{rate}:async=1"),  # gaps become silence
                graph.add("aformat", form),
                graph.add("atrim", span),
                graph.add("asetnsamples", f"n={encoder.frame_size or 1024}:p=0"),
                graph.add("abuffersink"),
            ).configure()
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    import av

    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
