"""What tells a packet from all others, so that its bytes can be found in the file again."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

_HEADER = 64  # a container may name the place of its own header, so many bytes before the packet at most


class PacketMark(NamedTuple):
    """What identifies a packet: its place as the container tells it (-1: untold), length, CRC-32 and first bytes."""

    place: int
    size: int
    crc: int
    head: bytes

    @classmethod
    def of(cls, packet: Any) -> PacketMark:
        body = memoryview(packet)
        return cls(-1 if packet.pos is None else packet.pos, packet.size, zlib.crc32(body), bytes(body[:8]))

    def find(self, data: bytes | memoryview) -> int | None:
        """The offset at which `data` holds this very packet, None where it does not in one piece (MPEG-TS)."""
        if self.place < 0:
            return None
        view = memoryview(data)
        begin = bytes(view[self.place : self.place + _HEADER + len(self.head)])
        at = begin.find(self.head)
        while at >= 0:
            start = self.place + at
            if zlib.crc32(view[start : start + self.size]) == self.crc:
                return start
            at = begin.find(self.head, at + 1)
        return None
