"""Whether a file is shorter than its own container header says.

FFmpeg reads what is there and stops without an error, so a download that broke off looks like a shorter video.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"uuid", b"sidx", b"mfra"}
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


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


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """An EBML number at `at` and the position after it; -1 for "unknown" and for what is no number."""
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    if first == 0 or at + width > len(data):
        return -1, at
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (-1 if value == (1 << 7 * width) - 1 else value), at + width
