"""Whether a file is shorter than its own container header says, or is no unbroken chain of elements.

FFmpeg reads what is there and stops without an error, so a download that broke off looks like a shorter video; in
Matroska it looks for the next thing that it knows, so that lost or damaged frames just are not there.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"uuid", b"sidx", b"mfra"}
_EBML, _SEGMENT, _CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_ANYWHERE = {b"\xec", b"\xbf"}  # Void, CRC-32
_IN_SEGMENT = _ANYWHERE | {
    b"\x11\x4d\x9b\x74",  # SeekHead
    b"\x15\x49\xa9\x66",  # Info
    b"\x16\x54\xae\x6b",  # Tracks
    b"\x1c\x53\xbb\x6b",  # Cues
    b"\x19\x41\xa4\x69",  # Attachments
    b"\x10\x43\xa7\x70",  # Chapters
    b"\x12\x54\xc3\x67",  # Tags
    _CLUSTER,
}
# Timestamp, SimpleBlock, BlockGroup, Position, PrevSize, SilentTracks, EncryptedBlock
_IN_CLUSTER = _ANYWHERE | {b"\xe7", b"\xa3", b"\xa0", b"\xa7", b"\xab", b"\x58\x54", b"\xaf"}


def missing_bytes(source: BinaryIO) -> int:
    """How many bytes of `source` are missing at its end, 0 where none are or the container does not tell.

    Reads box and element headers alone (ISO base media, Matroska, AVI) and leaves the position at the start.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    head = source.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        end = 8 + int.from_bytes(head[4:8], "little")
    elif head[:4] == _EBML:
        end = _segment_end(source, size)
    elif head[4:8] in _BOXES:
        end = _boxes_end(source, size)
    else:
        end = size
    source.seek(0)
    return max(0, end - size)


def _boxes_end(source: BinaryIO, size: int) -> int:
    """Where the last of the top-level boxes of an ISO base media file ends."""
    end = 0
    while end + 8 <= size:
        source.seek(end)
        head = source.read(16)
        if head[4:8] not in _BOXES:
            return size  # something of somebody's own at the end
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # 0: the last box, up to the end of the file
            return size
        end += length
    return end


def _segment_end(source: BinaryIO, size: int) -> int:
    """Where the segment of a Matroska or WebM file ends."""
    source.seek(0)
    head = source.read(256)
    length, at = _vint(head, 4)
    at += length
    if head[at : at + 4] != _SEGMENT:
        return size
    length, start = _vint(head, at + 4)
    return size if length < 0 else start + length


def broken_at(source: BinaryIO) -> int | None:
    """Where the elements of a Matroska or WebM file stop to follow one another; None where they do not stop.

    Reads element headers alone, two or three per frame, and leaves the position at the start. A file that is cut
    and knows its length is the business of `missing_bytes`. Other containers give None.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    head = source.read(256)
    try:
        return _broken_element(source, head, size) if head[:4] == _EBML else None
    finally:
        source.seek(0)


def _broken_element(source: BinaryIO, head: bytes, size: int) -> int | None:
    length, at = _vint(head, 4)
    at += length
    if length < 0 or head[at : at + 4] != _SEGMENT:
        return max(4, at)
    length, at = _vint(head, at + 4)
    end = size if length < 0 else min(size, at + length)
    cluster_end = 0  # of the cluster in hand; one byte behind `end` where the cluster does not know its length
    while at < end:
        source.seek(at)
        header = source.read(12)  # a name of up to 4 bytes and a length of up to 8
        name = header[: 9 - header[0].bit_length()]
        inside = at < cluster_end and not (cluster_end > end and name in _IN_SEGMENT - _ANYWHERE)
        length, skip = _vint(header, len(name))
        if name not in (_IN_CLUSTER if inside else _IN_SEGMENT) or (length < 0 and name != _CLUSTER):
            return at
        stop = at + skip + max(0, length)
        if stop > (min(cluster_end, size) if inside else size):
            return at
        if name == _CLUSTER:
            at, cluster_end = at + skip, end + 1 if length < 0 else stop
        else:
            at = stop
    return None


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """An EBML number at `at` and the position after it; -1 for "unknown" and for what is no number."""
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    if first == 0 or at + width > len(data):
        return -1, at
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (-1 if value == (1 << 7 * width) - 1 else value), at + width
