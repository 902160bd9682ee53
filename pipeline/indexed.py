"""The packets of a video by the index that its shard carries, and how that index is made."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .buffer_file import buffer_file
from .errors import DecodeError
from .file_parts import FileParts, joined
from .packet_source import IndexedPackets
from .packet_table import Deadline, PacketTable, Picture, label
from .packets import read_packets
from .picture import Orientation, orientation, to_rgb
from .picture_head import head_frame
from .probe import VideoInfo
from .reader_limits import videos
from .video_index import DECODERS, MAX_EXTRADATA, MAX_PACKETS, MAX_REORDER, VideoIndex

READ_THROUGH = 1 << 16  # bytes between two needed packets that are read along, which costs less than reading twice


def usable_index(info: VideoInfo | None, num_bytes: int) -> VideoIndex | None:
    """The index that `info` carries, where it was made for a file of this length and FFmpeg here has the decoder."""
    index = None if info is None else info.packets
    if info is None or index is None or index.num_bytes != num_bytes or info.codec not in _decoders():
        return None
    return index


@functools.lru_cache(maxsize=1)
def _decoders() -> frozenset[str]:
    import av

    return frozenset(codec for codec, decoder in DECODERS.items() if decoder in av.codecs_available)


def needed_ranges(info: VideoInfo, num_bytes: int, frames: Sequence[int]) -> list[range] | None:
    """The bytes of a file from which `frames` can be decoded; None where more may turn out to be needed.

    That is so without a usable index, and where decoding from a key packet on may turn out not to be enough.
    """
    index = usable_index(info, num_bytes)
    if index is None or not index.closed_keys:
        return None
    packets = [packet for run in index.packet_order.runs(frames) for packet in run.packets]
    return joined(zip(index.offset[packets].tolist(), index.size[packets].tolist(), strict=True), READ_THROUGH)


def packet_table(
    data: bytes | memoryview | FileParts, info: VideoInfo | None, *, name: str, deadline: Deadline, keep: bool = True
) -> PacketTable:
    """The packets of a video: by the index that `info` carries where that is usable, else from the container, which is
    then compared with `info`. `keep` as in `read_packets`.

    Raises:
        DecodeError: as `read_packets`; also where the video is not the one that `info` describes.
    """
    index = usable_index(info, len(data))
    if info is not None and index is not None:
        return _indexed(data, info, index, name)
    if isinstance(data, FileParts):
        raise DecodeError(f"{label(name)}: only parts of it were read, and without an index all of it is needed.")
    table = read_packets(buffer_file(data), name=name, deadline=deadline, keep=keep)
    try:
        table.expect(info)
    except DecodeError:
        table.close()
        raise
    return table


def _indexed(data: bytes | memoryview | FileParts, info: VideoInfo, index: VideoIndex, name: str) -> PacketTable:
    return PacketTable(
        name=name,
        source=IndexedPackets(data, index, info.codec, name),
        order=index.packet_order,
        fps=info.fps,
        duration=info.duration,
        timestamps=None if info.timestamps is None else info.times(),
        hidden_by_edits=index.hidden_by_edits,
        closed_keys=index.closed_keys,
        has_audio=info.has_audio,
        format=index.format,
        codec=info.codec,
        picture=Picture(info.width, info.height, info.rotation, index.turn.mirrored, info.pix_fmt),
    )


def with_index(
    data: bytes | memoryview,
    info: VideoInfo,
    table: PacketTable,
    frame: Any,
    deadline: Deadline,
    *,
    check: bool = True,
    head: bool = False,
) -> VideoInfo:
    """`info` with the index of its packets, or as it is where the video cannot be decoded by an index alone: codecs
    that lean on their container, packets that are not there in one piece, frames without an order of their own.

    Args:
        table: of the same file, read with marks.
        frame: its first key frame, or its head alone. Decoded by the index it has to come out the same to the bit.
        check: compare them. Without, that is only done where pictures carry how they are to be turned; the decoder, its
            settings and the packets are the same in any case.
        head: compare nothing but what the head tells.
    """
    turn = orientation(frame, table.name)
    index = _index(data, info, table, turn)
    if index is None:
        return info
    indexed = replace(info, packets=index)
    if not check and frame.side_data.get("DISPLAYMATRIX") is None:
        return indexed
    size = (frame.width, frame.height)
    try:
        by_index = _indexed(data, indexed, index, table.name)
        again = head_frame(by_index) if head else by_index.first_frame(deadline)
        if again is None or again.side_data.get("DISPLAYMATRIX") is not None:  # in the stream, where not all have it
            return info
        same = (again.width, again.height) == size
        return indexed if same and (head or np.array_equal(to_rgb(again, size), to_rgb(frame, size))) else info
    except DecodeError:
        return info


def _index(data: bytes | memoryview, info: VideoInfo, table: PacketTable, turn: Orientation) -> VideoIndex | None:
    context = table.source.codec()
    extradata = table.source.extradata
    marks = table.marks
    if (
        marks is None
        or not table.ordered
        or videos(table) > 1
        or context.codec.name != DECODERS.get(table.codec)
        or len(extradata) > MAX_EXTRADATA
        or not 0 < table.num_packets <= MAX_PACKETS
        or not 0 <= context.reorder_depth <= MAX_REORDER
        or len(data) >= 1 << 31  # gaps between packets are kept in 32 bits
        or -1 in marks.offset
        or len(np.unique(table.order.shown_at)) < table.num_packets
    ):
        return None
    key = np.zeros(table.num_packets, dtype=bool)
    key[table.order.keys] = True
    return VideoIndex(
        num_bytes=len(data),
        facts=info.checksum(),
        format=table.format,
        extradata=extradata,
        reorder=context.reorder_depth,
        colour=tuple(
            int(x) for x in (context.color_range, context.color_primaries, context.color_trc, context.colorspace)
        ),
        turn=turn,
        closed_keys=table.closed_keys,
        hidden_by_edits=table.hidden_by_edits,
        offset=np.array(marks.offset, dtype=np.int64),
        size=np.array(marks.size, dtype=np.int64),
        crc=np.array(marks.crc, dtype=np.uint32),
        order=np.argsort(np.argsort(table.order.shown_at)),
        hidden=table.order.rank < 0,
        key=key,
    )
