"""What a video file says about itself before anything is decoded: its packets, their order, their clock.

One pass over the container gives everything that exact decoding needs. Packets are kept in memory and handed to
the decoder directly, so nothing ever seeks in a container, and with that every trouble of seeking (transport
streams, AVI, edit lists, open GOPs, bad indexes) is gone. What the pass finds can be kept as a `VideoIndex`, which
spares it the next time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from .bitstream import begins_afresh, is_key, is_packed, shows_a_frame
from .errors import DecodeError
from .h264_order import PictureOrder, in_rhythm, reordering
from .packet_marks import PacketMarks
from .packet_order import PacketOrder
from .packet_source import ContainerPackets, knows_its_order, set_up
from .packet_table import Deadline, PacketTable, check_size, label, reason_of
from .presentation import NO_TIME, contradiction, frame_rate, is_ordered, leading_packets, parts_in_turn
from .probe import MAX_SECONDS
from .truncation import broken_at, missing_bytes
from .video_index import MAX_REORDER

# Anything else, above all play lists that name further files or addresses, is refused before it is parsed.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts"
MAX_REORDER_SECONDS = 10  # between decoding a frame and showing it
_BUFFER = 1 << 18
_HEAD = 256  # packets from the first key packet on that are kept in any case


def read_packets(
    source: BinaryIO,
    *,
    name: str,
    deadline: Deadline,
    keep: bool = True,
    data: bytes | memoryview | None = None,
    quick: bool = False,
    digest: hashlib._Hash | None = None,
) -> PacketTable:
    """Demultiplex `source` once. With `keep=False` only the first packets stay in memory: enough for a look. With its
    bytes as `data` the table has the marks of the packets in it. `digest` is updated with the bytes of every packet.
    With `quick=True` nothing is decoded at opening where that tells nothing that is needed; the stream then knows its
    pixel format and colours only after its first frame.

    Raises:
        DecodeError: no known container, no video, damaged on the container level, impossible size, too slow.
    """
    import av

    lost = missing_bytes(source)
    if lost:
        raise DecodeError(f"{label(name)}: the file is cut: {lost} bytes are missing at its end.")
    broken = broken_at(source)
    if broken is not None:
        raise DecodeError(f"{label(name)}: the container is damaged at byte {broken}, where no element of its kind is.")
    try:
        container = _opened(source, quick)
    except (av.error.FFmpegError, ValueError, OverflowError) as err:
        raise DecodeError(
            f"{label(name)}: not a readable video file ({reason_of(err)}); mp4, mov, mkv, webm, avi and ts are."
        ) from err
    try:
        stream = _video_stream(container, name)
        return _table(container, stream, _demux(container, stream, name, deadline, keep, data, digest), name)
    except (av.error.FFmpegError, ValueError, OverflowError) as err:
        container.close()
        raise DecodeError(f"{label(name)}: the container is damaged ({reason_of(err)}).") from err
    except BaseException:
        container.close()
        raise


def _opened(source: BinaryIO, quick: bool) -> Any:
    import av

    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    if quick:
        container = av.open(
            source,
            mode="r",
            options={**options, "skip_frame": "all"},
            metadata_errors="replace",
            buffer_size=_BUFFER,
        )
        streams = container.streams.video
        if len(streams) == 1 and knows_its_order(container.format.name, streams[0].codec_context):
            return container
        container.close()
        source.seek(0)
    return av.open(source, mode="r", options=options, metadata_errors="replace", buffer_size=_BUFFER)


def _video_stream(container: Any, name: str) -> Any:
    from av.stream import Disposition

    pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not pictures:
        kinds = sorted({s.type for s in container.streams if s.type != "video"}) or ["nothing"]
        raise DecodeError(f"{label(name)}: there is no video in it, only {', '.join(kinds)}.")
    best = container.streams.best("video")  # the one that players show
    stream = best if best in pictures else pictures[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(f"{label(name)}: its video codec is unknown to the installed FFmpeg.")
    check_size(context.width, context.height, name)
    return stream


@dataclass
class _Demuxed:
    """What one pass over a container finds: the packets kept, and of every packet the facts."""

    packets: list[Any] = field(default_factory=list)
    pts: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)  # by how much a packet is shown after it is decoded
    decoded: list[int] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    hidden_by_edits: int = 0
    closed_keys: bool = True
    marks: PacketMarks | None = None
    untold: PictureOrder | None = None  # where the container does not say in which order its frames are shown


def _packets(container: Any, stream: Any, name: str) -> Iterator[Any]:
    try:
        yield from container.demux(stream)
    except LookupError as err:  # PyAV looks a packet's stream up among those that there were at opening
        raise DecodeError(f"{label(name)}: a stream begins in it that its head does not name; it is damaged.") from err


def _demux(
    container: Any,
    stream: Any,
    name: str,
    deadline: Deadline,
    keep: bool,
    data: bytes | memoryview | None,
    digest: hashlib._Hash | None,
) -> _Demuxed:
    """One pass. What is asked of each packet is asked as cheaply as can be: a long video has a million of them."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    found = _Demuxed(marks=None if data is None else PacketMarks(data))
    if container.format.name == "avi" and codec == "h264":  # which stores no times, so FFmpeg guesses them
        found.untold = PictureOrder(extradata)
    hides = codec == "vp8"  # frames, in packets of their own
    count = 0
    for packet in _packets(container, stream, name):
        if packet.size == 0:
            continue  # the empty packet at the end
        if packet.is_corrupt:
            raise DecodeError(f"{label(name)}: packet {count} is cut short or damaged.")
        if count == 0 and is_packed(codec, extradata, bytes(packet)):
            raise DecodeError(
                f"{label(name)}: holds two pictures in one packet (DivX packed B-frames), so its frames cannot be "
                "told apart; run ffmpeg -i IN -c copy -bsf:v mpeg4_unpack_bframes OUT first."
            )
        if count and _has_any(packet.iter_sidedata()) and packet.has_sidedata("new_extradata"):
            raise DecodeError(f"{label(name)}: its codec settings change at packet {count}; split it there.")
        if packet.is_keyframe:
            if is_key(codec, extradata, memoryview(packet)):
                found.keys.append(count)
                found.closed_keys &= begins_afresh(codec, extradata, memoryview(packet))
            else:
                found.closed_keys = False  # readers that believe the container begin at it
        hidden = packet.is_discard
        found.hidden_by_edits += hidden
        # Before the first key packet there is nothing to decode from.
        shown = not hidden and bool(found.keys) and (not hides or shows_a_frame(codec, memoryview(packet)))
        found.shown.append(shown)
        pts, dts = packet.pts, packet.dts
        found.pts.append(NO_TIME if pts is None else pts)
        found.decoded.append(NO_TIME if dts is None else dts)
        if pts is not None and dts is not None:
            found.ahead.append(pts - dts)
        found.duration.append(packet.duration or 0)
        if found.marks is not None:
            found.marks.add(packet)
        if found.untold is not None:
            found.untold.add(bytes(packet))
        if digest is not None:
            digest.update(memoryview(packet))
        if keep or not found.keys or count - found.keys[0] < _HEAD:
            found.packets.append(packet)
        count += 1
        if count % 64 == 0:
            deadline.check()
    expected = len(stream.index_entries) if container.format.name.startswith("mov") else 0
    if count < expected:
        raise DecodeError(f"{label(name)}: the file is cut: {count} of {expected} packets are there.")
    if count == 0:
        raise DecodeError(f"{label(name)}: its video stream is empty.")
    if not found.keys:
        raise DecodeError(f"{label(name)}: no key frame among its {count} packets.")
    if found.keys[0] and container.format.name == "avi":
        # Nobody records an AVI from the middle of a stream on: its index, which says what is a key frame, is gone.
        raise DecodeError(f"{label(name)}: {found.keys[0]} packets come before its first key frame; it is damaged.")
    return found


def _has_any(items: Iterator[Any]) -> bool:
    return next(items, None) is not None


def _table(container: Any, stream: Any, found: _Demuxed, name: str) -> PacketTable:
    codec = stream.codec_context.codec.canonical_name
    packets, pts, count = found.packets, found.pts, len(found.pts)
    keys = np.array(found.keys, dtype=np.int64)
    shown = np.array(found.shown, dtype=bool)

    if container.format.name == "mpegts":  # the only container in which both times stand with each packet
        apart = [ahead for ahead in found.ahead if not 0 <= ahead * stream.time_base <= MAX_REORDER_SECONDS]
        if apart:
            raise DecodeError(f"{label(name)}: {len(apart)} of its {count} packets carry impossible times; damaged.")
    if found.hidden_by_edits and NO_TIME not in pts:
        pts = parts_in_turn(np.array(pts), np.array(found.decoded), np.array(found.duration), shown, keys).tolist()
    is_avi = container.format.name == "avi"
    guessed = is_avi and codec != "mpeg4" and stream.codec_context.has_b_frames > 0
    ordered = is_ordered(pts, shown, guessed=guessed)
    decoded_at = np.array(found.decoded, dtype=np.int64)
    place = None if found.untold is None else found.untold.places()
    clocked = place is None and ordered
    if clocked:
        shown_at = np.array(pts, dtype=np.int64)
    else:
        ordered, place = place is not None, np.arange(count) if place is None else place
        clocked = bool(NO_TIME not in found.decoded and (np.diff(decoded_at) > 0).all())
        shown_at = in_rhythm(place, decoded_at, stream.codec_context.reorder_depth) if clocked else place
    wrong = contradiction(codec, shown_at, shown, keys, closed=found.closed_keys) if ordered else ""
    if wrong:
        raise DecodeError(f"{label(name)}: the times of its frames are damaged: {wrong}.")
    leading = leading_packets(shown_at, keys) if ordered else np.zeros(count, dtype=bool)
    if leading.any():
        first_gop = np.arange(count) < (keys[1] if len(keys) > 1 else count)
        lost = leading & first_gop & shown
        if lost.any():
            shown &= ~lost | _decodable(stream, packets, keys[0], np.flatnonzero(lost)[-1], count)

    if not shown.any():
        raise DecodeError(f"{label(name)}: none of its {count} packets shows a frame.")
    order = PacketOrder.of(shown_at, shown, keys, ordered=ordered)
    position = order.position
    if codec == "h264" and ordered:  # which may not say it, and a decoder that finds it out has lost frames by then
        lag = min(reordering(np.argsort(np.argsort(shown_at, kind="stable"))), MAX_REORDER)
        stream.codec_context.reorder_depth = max(stream.codec_context.reorder_depth, lag)
    for packet, index in zip(packets, order.rank.tolist(), strict=False):  # not all may be kept
        packet.pts, packet.dts = (index if index >= 0 else None), None

    nominal = stream.average_rate or stream.guessed_rate or 0
    if place is not None and clocked and len(position) > 1:  # an AVI's clock may tick many times for each frame
        nominal = 1 / (int(np.median(np.diff(shown_at[position]))) * stream.time_base)
    fps, timestamps = frame_rate(
        shown_at[position] if clocked else None,
        tick=float(stream.time_base),
        nominal=float(nominal),
        frames=len(position),
    )
    duration = len(position) / fps
    if timestamps is not None:
        last = 0 if is_avi else found.duration[position[-1]]  # AVI says one tick of all
        if codec == "vp9" and stream.duration:  # its parser says of all packets what the first one lasts
            last = max(0, (stream.start_time or 0) + stream.duration - int(shown_at[position[-1]]))
        duration = float(timestamps[-1] + (last * stream.time_base if last else 1 / fps))
    if not 0 < duration < MAX_SECONDS:
        raise DecodeError(f"{label(name)}: its times span {duration:g} s, expected at most {MAX_SECONDS} s.")
    return PacketTable(
        name=name,
        source=ContainerPackets(container, stream, packets),
        order=order,
        fps=fps,
        duration=duration,
        timestamps=timestamps,
        hidden_by_edits=found.hidden_by_edits,
        closed_keys=found.closed_keys,
        has_audio=len(container.streams.audio) > 0,
        format=container.format.name.split(",")[0],
        codec=codec,
        marks=found.marks,
    )


def _decodable(stream: Any, packets: list[Any], first: int, last: int, count: int) -> np.ndarray:
    """bool [P]: which packets up to `last` give a frame when decoding starts at the very first key packet.

    Frames before the first key frame usually refer to a GOP that was cut away, but they need not (MPEG-2 closed
    GOPs, HEVC RADL pictures). H.264 has no such frames, and its decoder would show grey ones.
    """
    import av

    decodable = np.zeros(count, dtype=bool)
    if stream.codec_context.codec.canonical_name == "h264":
        return decodable
    kept = [packet.pts for packet in packets]
    last = min(last, len(packets) - 1)
    for index in range(first, last + 1):
        packets[index].pts, packets[index].dts = index, None
    context = set_up(stream.codec_context)
    for packet in [*packets[first : last + 1], None]:
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError:
            continue  # a reference is missing: not decodable
        decodable[[frame.pts for frame in frames if not frame.is_corrupt]] = True
    context.flush_buffers()
    for packet, pts in zip(packets, kept, strict=True):
        packet.pts = pts
    return decodable
