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

    def find(self, data: bytes) -> int | None:
        """The offset at which `data` holds this very packet, None where it does not in one piece (MPEG-TS)."""
        if self.place < 0:
            return None
        view, stop = memoryview(data), self.place + _HEADER + self.size
        at = data.find(self.head, self.place, stop)
        while at >= 0:
            if zlib.crc32(view[at : at + self.size]) == self.crc:
                return at
            at = data.find(self.head, at + 1, stop)
        return None
