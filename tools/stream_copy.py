"""A part of a video, or all of it, without encoding: its packets from one key frame to another in a new file."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np

from framestream.pipeline.bitstream import begins_afresh
from framestream.pipeline.errors import SampleError

from .clip_file import ClipFile
from .encoders import TAGS
from .opened_video import OpenedVideo

IN_MP4 = ("h264", "hevc", "av1", "vp9", "mpeg4")
_IDR = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")  # an H.264 slice of an IDR picture behind a start code
_ADVICE = "use --transcode auto, with which such clips are encoded anew"


def stream_copy(video: OpenedVideo, frames: tuple[int, int], name: str, *, sound: bool) -> tuple[bytes, str]:
    """Frames `frames[0]` to `frames[1]` - 1 as they are coded: (bytes of the file, its extension, mp4 or mkv).

    The first frame is shown at 0, and all others as long after it as in the source.

    Args:
        sound: with the sound of that stretch, where there is some.
    Raises:
        SampleError: the packets of these frames cannot be told from others, or do not decode without them; or the
            container cannot hold them.
    """
    import av

    begin, end = _packets(video, frames, name)
    table = video.table
    zero = int(video.ticks[table.order.position[frames[0]]])
    shown = video.ticks[begin:end] - zero
    decoded = _decoding_times(shown)
    ext = "mp4" if table.codec in IN_MP4 else "mkv"
    keys = set(table.order.keys.tolist())
    duration = np.diff(np.sort(shown), append=shown.max() + _last(video, frames[1]))[np.argsort(np.argsort(shown))]
    try:
        with ClipFile(ext) as file:
            stream = file.container.add_stream_from_template(video.stream, opaque=True)
            if ext == "mp4" and table.codec in TAGS:
                stream.codec_context.codec_tag = TAGS[table.codec]
            if sound:
                file.add_sound(video.sound, _stretch(video, frames))
            for position in range(begin, end):
                packet: Any = av.Packet(bytes(table.source.packet(position)))
                packet.pts, packet.dts = int(shown[position - begin]), int(decoded[position - begin])
                packet.duration = int(duration[position - begin])
                packet.time_base, packet.stream = video.time_base, stream
                packet.is_keyframe = position in keys
                file.mux([packet])
            return file.finish(), ext
    except (av.error.FFmpegError, ValueError) as err:
        raise SampleError(f"{name} cannot be copied into {ext} ({err}): {_ADVICE}") from err


def _packets(video: OpenedVideo, frames: tuple[int, int], name: str) -> tuple[int, int]:
    """The packets [begin, end) that show exactly `frames`, and that decode without any other."""
    table, (first, stop) = video.table, frames
    order = table.order
    if not table.ordered:
        raise SampleError(f"{name}: its container does not tell the order of its frames: {_ADVICE}")
    begin = int(order.position[first])
    end = int(order.position[stop]) if stop < table.num_frames else table.num_packets
    if first == 0:  # what comes before is of no use, or hidden
        begin = int(order.keys[np.searchsorted(order.keys, begin, side="right") - 1])
    for position, frame in ((begin, first), *(((end, stop),) if end < table.num_packets else ())):
        if position not in order.keys:
            raise SampleError(f"{name}: frame {frame} is no key frame, so it cannot be cut there: {_ADVICE}")
        if position > order.keys[0] and not _forgets(video, position):
            raise SampleError(
                f"{name}: what follows its key frame {frame} may build on what comes before it (an open group of "
                f"pictures), so it cannot be cut there without encoding: {_ADVICE}"
            )
    rank = order.rank[begin:end]
    if stop == table.num_frames:  # what an edit list hides at the end is not needed
        end = begin + int(np.flatnonzero(rank >= 0)[-1]) + 1
        rank = order.rank[begin:end]
    inside = rank[rank >= 0]
    if len(inside) != stop - first or inside.min() != first or inside.max() != stop - 1:
        raise SampleError(
            f"{name}: frames on one side of a key frame build on those on the other (an open group of pictures), so it "
            f"cannot be cut there without encoding: {_ADVICE}"
        )
    hidden = video.ticks[begin:end][rank < 0]
    if table.hidden_by_edits and ((hidden >= video.ticks[order.position[first]]).any() or table.codec not in IN_MP4):
        raise SampleError(f"{name}: an edit list hides frames in it, which a copy would show: {_ADVICE}")
    return begin, end


def _forgets(video: OpenedVideo, position: int) -> bool:
    """Whether a decoder forgets at this key packet what was before."""
    table = video.table
    if table.codec != "h264":
        return True
    extradata = bytes(video.stream.codec_context.extradata or b"")
    packet = bytes(table.source.packet(position))
    if extradata[:1] == b"\x01":
        return begins_afresh(table.codec, extradata, packet)
    return _IDR.search(packet) is not None  # as in transport streams


def _decoding_times(shown: np.ndarray) -> np.ndarray:
    """int64 [P]: rising times that are never behind those of showing, and not earlier than they need to be."""
    rising = np.sort(shown)
    return rising - max(0, int((rising - shown).max()))


def _last(video: OpenedVideo, stop: int) -> int:
    """Ticks for which the frame before `stop` is shown."""
    order, ticks = video.table.order, video.ticks
    if stop < video.info.num_frames:
        return int(ticks[order.position[stop]] - ticks[order.position[stop - 1]])
    seconds = video.info.duration - float(video.info.times()[-1])
    return max(1, round(seconds / float(video.time_base)))


def _stretch(video: OpenedVideo, frames: tuple[int, int]) -> tuple[Fraction, Fraction]:
    """Where frames begin and end, in seconds from the first of the source, by the container's clock."""
    order, ticks = video.table.order, video.ticks
    zero = ticks[order.position[0]]
    last = int(ticks[order.position[frames[1] - 1]] - zero) + _last(video, frames[1])
    return int(ticks[order.position[frames[0]]] - zero) * video.time_base, last * video.time_base
