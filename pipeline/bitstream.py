"""What single packets say about themselves that their container does not. Pure, on bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

H264_SLICES = (1, 2, 5)  # types of NAL units that begin a picture's data (ITU-T H.264, table 7-1)
_HEVC_SPS = 33
_PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")


def shows_a_frame(codec: str, packet: bytes | memoryview) -> bool:
    """False for VP8's hidden reference frames, which are packets of their own: bit 4 says whether to show them."""
    return codec != "vp8" or bool(packet[0] >> 4 & 1)


def is_packed(codec: str, extradata: bytes, packet: bytes) -> bool:
    """Whether an MPEG-4 stream holds two pictures in one packet (DivX "packed bitstream")."""
    return codec == "mpeg4" and _PACKED.search(extradata + packet) is not None


def begins_afresh(codec: str, extradata: bytes, packet: bytes | memoryview) -> bool:
    """False for an H.264 key packet without an IDR picture: one that begins a gradual refresh or an open GOP.

    True for other codecs. Looks into length-prefixed NAL units (mp4, mkv); False where they are not.
    """
    if codec != "h264":
        return True
    for start, _ in _units(packet, h264_length_width(extradata)):
        kind = packet[start] & 31
        if 1 <= kind <= 5:
            return kind == 5
    return False


def up_to_slice(extradata: bytes, packet: bytes, length: int) -> bytes | None:
    """An H.264 packet up to its first slice, and of that the first `length` bytes, as a packet of its own.

    None where it holds no slice behind length-prefixed NAL units (mp4, mkv).
    """
    width = h264_length_width(extradata)
    for start, size in _units(packet, width):
        if packet[start] & 31 in H264_SLICES:
            part = packet[start : start + min(size, length)]
            return packet[: start - width] + len(part).to_bytes(width, "big") + part if part else None
    return None


def is_key(codec: str, extradata: bytes, packet: bytes | memoryview) -> bool:
    """False for a packet that its container calls a key packet, although its picture refers to others.

    Looks into HEVC with length-prefixed NAL units (mp4, mkv) and into MPEG-4; True for anything else.
    """
    if codec == "mpeg4":
        at = bytes(packet).find(b"\x00\x00\x01\xb6")
        return at < 0 or at + 4 >= len(packet) or packet[at + 4] >> 6 == 0
    if codec == "hevc" and len(extradata) >= 23 and extradata[0] == 1:
        for start, _ in _units(packet, (extradata[21] & 3) + 1):
            kind = packet[start] >> 1 & 63
            if kind < 32:
                return 16 <= kind <= 23
    return True


def h264_length_width(extradata: bytes) -> int:
    """Bytes of the length before each NAL unit, as an `avcC` says it (ISO/IEC 14496-15, 5.3.3.1); 0 where units begin
    with start codes."""
    return (extradata[4] & 3) + 1 if len(extradata) > 4 and extradata[0] == 1 else 0


def _units(packet: bytes | memoryview, width: int) -> Iterator[tuple[int, int]]:
    """Where each NAL unit of a packet begins, and the length that stands before it; none without lengths."""
    at = 0
    while width and at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        yield at + width, size
        at += width + size


def leaves_out_safely(codec: str, extradata: bytes) -> bool:
    """Whether FFmpeg's decoder, told to leave out pictures that no other refers to, leaves out no other.

    In HEVC a picture may be marked as not referred to within its own temporal layer alone, so it has to be known that
    there is only one. Looks into the sequence parameter sets of an `hvcC` (ISO/IEC 14496-15, 8.3.3.1); False where they
    are elsewhere.
    """
    if codec in ("h264", "mpeg4"):
        return True
    if codec != "hevc" or len(extradata) < 23 or extradata[0] != 1:
        return False
    sets = [unit for kind, unit in _hevc_units(extradata) if kind == _HEVC_SPS]
    return bool(sets) and all(len(unit) > 2 and not unit[2] >> 1 & 7 for unit in sets)


def _hevc_units(extradata: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, bytes) of the NAL units in an `hvcC`, as far as it goes."""
    at = 23
    for _ in range(extradata[22]):
        kind, count = extradata[at : at + 1], int.from_bytes(extradata[at + 1 : at + 3], "big")
        at += 3
        for _ in range(count):
            stop = at + 2 + int.from_bytes(extradata[at : at + 2], "big")
            if stop > len(extradata):
                return
            yield kind[0] & 63, extradata[at + 2 : stop]
            at = stop
