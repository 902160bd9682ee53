"""What readers other than PyAV get wrong alike, told from a video's packets and its first picture.

Each is measured: docs/conformance.md says what the readers do with such videos when nobody keeps them from it.
"""

from __future__ import annotations

from .packet_source import ContainerPackets
from .packet_table import PacketTable, Picture
from .picture import HD_LINES

# Numbers of ITU-T H.273 (MatrixCoefficients) and of FFmpeg (AVColorRange).
RGB, BT709, UNTAGGED, BT470BG, SMPTE170M = 0, 1, 2, 5, 6  # the last two are BT.601's
FULL_RANGE = 2
_MATRICES = (RGB, BT709, UNTAGGED, 4, BT470BG, SMPTE170M, 7, 9)  # that FFmpeg converts by what they say
_WITHOUT_MATRIX = ("gbr", "rgb", "bgr", "gray", "pal", "mono")


def shared_refusal(table: PacketTable, picture: Picture) -> str:
    """Why readers built on FFmpeg would get this video wrong, "" where they do not."""
    if not table.ordered:
        return "its container does not tell the order of its frames"
    if videos(table) > 1:
        return "there are several videos in it, and readers do not agree which is the one to show"
    if picture.mirrored:
        return "it is to be shown mirrored"
    if is_untagged_hd(table, picture):
        return f"it names no colour matrix and has more than {HD_LINES} lines, so it counts as BT.709"
    if matrix(table) not in _MATRICES:
        return f"its colour matrix is number {matrix(table)} of H.273"
    return ""


def videos(table: PacketTable) -> int:
    """Video streams in the file, cover pictures left out. An index is made of files with a single one alone."""
    if not isinstance(table.source, ContainerPackets):
        return 1
    from av.stream import Disposition

    streams = table.source.container.streams.video
    return sum(not stream.disposition & Disposition.attached_pic for stream in streams)


def matrix(table: PacketTable) -> int:
    """The colour matrix that the stream names, a number of H.273; `UNTAGGED` where it names none."""
    return int(table.source.codec().colorspace)


def is_full_range(table: PacketTable, picture: Picture) -> bool:
    """Whether black is 0 and white is all ones."""
    return picture.pix_fmt.startswith("yuvj") or int(table.source.codec().color_range) == FULL_RANGE


def is_untagged_hd(table: PacketTable, picture: Picture) -> bool:
    """Whether players, and `pyav`, take its colours for BT.709 without being told."""
    lines = picture.width if picture.rotation in (90, 270) else picture.height
    return matrix(table) == UNTAGGED and lines > HD_LINES and not picture.pix_fmt.startswith(_WITHOUT_MATRIX)


def plays_parts(table: PacketTable) -> bool:
    """Whether packets in the midst are hidden, as where an edit list plays several parts of a recording."""
    order = table.order
    times = order.shown_at[order.position]
    within = (order.shown_at > times.min()) & (order.shown_at < times.max())
    return bool(table.hidden_by_edits and (within & (order.rank < 0)).any())


def key_frames_untold(data: bytes, table: PacketTable) -> bool:
    """Whether an mp4 or mov does not say which of its frames are key frames, so that old readers take all for some."""
    alone = table.num_packets == 1 or table.source.codec().codec.intra_only
    all_are = len(table.order.keys) == table.num_packets and table.codec == "h264" and table.closed_keys
    if table.format != "mov" or alone or all_are:
        return False
    boxes = _top_level_boxes(data)
    return b"moof" not in boxes and b"stss" not in boxes.get(b"moov", b"")


def _top_level_boxes(data: bytes) -> dict[bytes, bytes]:
    """Kind to content of the boxes of an ISO base media file, the last of each kind; the pictures left out."""
    boxes: dict[bytes, bytes] = {}
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        stop = at + size if size >= 8 else len(data)
        boxes[kind] = b"" if kind == b"mdat" else data[at + 8 : stop]
        at = stop
    return boxes
