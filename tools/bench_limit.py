"""The least that any decoder on libavcodec has to do: exactly the packets needed, and one conversion per wanted frame.

It is written without `framestream.pipeline`'s own reading of containers, so that it cannot share its mistakes; only
the conversion is the same. What is known beforehand here (packets as bytes, which to feed, which pictures to leave
out) costs nothing, so no decoder that starts from a file reaches it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from framestream.pipeline.picture import to_rgb

#: Codecs whose decoders stay exact when they leave out pictures that no other refers to.
SKIPS = ("h264", "mpeg4")


@dataclass(frozen=True)
class LeastWork:
    """What is to be fed for the wanted frames.

    Attributes:
        codec, extradata, colour: how the decoder is set up.
        runs: of each stretch that begins at a key frame its packets, each with whether its picture is wanted.
        num_packets: packets in the whole file.
    """

    codec: str
    extradata: bytes
    colour: tuple[int, int, int, int]
    runs: list[list[tuple[Any, bool]]]
    num_packets: int

    @property
    def num_fed(self) -> int:
        return sum(map(len, self.runs))

    def decode(self, size: tuple[int, int], *, skip: bool = True) -> list[np.ndarray]:
        """uint8 [3, height, width] of each wanted frame, as stored (not turned), in the order of presentation.

        Args:
            size: (width, height) to convert to.
            skip: leave out pictures that no other refers to and that are not wanted.
        """
        import av

        context: Any = av.CodecContext.create(self.codec, "r")
        if self.extradata:
            context.extradata = self.extradata
        context.color_range, context.color_primaries, context.color_trc, context.colorspace = self.colour
        context.thread_count, context.thread_type = 1, "NONE"
        skip = skip and self.codec in SKIPS
        kept = []
        for run in self.runs:
            leaves_out = False
            for packet, wanted in run:
                if skip and leaves_out == wanted:
                    leaves_out = not wanted
                    context.skip_frame = "NONREF" if leaves_out else "DEFAULT"
                kept += [to_rgb(frame, size) for frame in context.decode(packet) if frame.pts is not None]
            kept += [to_rgb(frame, size) for frame in context.decode(None) if frame.pts is not None]
            context.flush_buffers()
        return kept


def least_work(data: bytes, wanted: Sequence[int]) -> LeastWork:
    """Look a video over for the packets that `wanted` (sorted, distinct) need.

    Raises:
        ValueError: its packets do not say when they are shown, or are too few.
    """
    import av

    with av.open(io.BytesIO(data)) as container:
        stream: Any = container.streams.best("video")
        context = stream.codec_context
        packets = [packet for packet in container.demux(stream) if packet.size]
        if any(packet.pts is None for packet in packets):
            raise ValueError("its packets carry no times, so the ones needed cannot be told beforehand")
        shown = np.array([packet.pts for packet in packets])
        keys = np.array([place for place, packet in enumerate(packets) if packet.is_keyframe])
        visible = np.array([place for place, packet in enumerate(packets) if not packet.is_discard])
        if len(visible) <= wanted[-1]:
            raise ValueError(f"it has {len(visible)} packets that show a frame, and frame {wanted[-1]} is wanted")
        place_of = visible[np.argsort(shown[visible], kind="stable")][list(wanted)]
        runs: list[list[tuple[Any, bool]]] = []
        for begin, end in _stretches(place_of, shown, keys):
            places = range(begin, end + 1)
            # Pictures shown before the key frame that they follow refer to what was before it.
            needed = [p for p in places if shown[p] >= shown[begin] or p > keys[keys > begin].min(initial=end + 1)]
            runs.append([(_packet(packets[p], p in place_of), p in place_of) for p in needed])
        colour = (context.color_range, context.color_primaries, context.color_trc, context.colorspace)
        return LeastWork(context.codec.name, bytes(context.extradata or b""), colour, runs, len(packets))


def _packet(packet: Any, wanted: bool) -> Any:
    """A packet of its own memory; a time says that its picture is wanted."""
    import av

    copy = av.Packet(bytes(packet))
    copy.pts = packet.pts if wanted else None
    return copy


def _stretches(places: np.ndarray, shown: np.ndarray, keys: np.ndarray) -> list[tuple[int, int]]:
    """First and last packet of each stretch that has to be decoded: those that overlap are one."""
    starts = [int(keys[(keys <= p) & (shown[keys] <= shown[p])].max()) for p in places]
    stretches: list[tuple[int, int]] = []
    for begin, end in sorted(zip(starts, places.tolist(), strict=True)):
        if stretches and begin <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(end, stretches[-1][1]))
        else:
            stretches.append((begin, end))
    return stretches
