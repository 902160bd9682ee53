"""What single packets say about themselves that their container does not. Pure, on bytes."""

from __future__ import annotations

import re

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
    if len(extradata) < 5 or extradata[0] != 1:
        return False
    width, at = (extradata[4] & 3) + 1, 0
    while at + width < len(packet):
        kind = packet[at + width] & 31
        if 1 <= kind <= 5:
            return kind == 5
        at += width + int.from_bytes(packet[at : at + width], "big")
    return False
