"""What tells packets from all others, so that their bytes can be found in the file again."""

from __future__ import annotations

import zlib
from typing import Any

_HEADER = 64  # a container may name the place of its own header, so many bytes before the packet at most
_HEAD = 8  # bytes by which a packet is looked for


class PacketMarks:
    """Where a file has its packets, taken one by one from a pass over its container.

    Args:
        data: the file.
    Attributes:
        offset: bytes, per packet; -1 where the file does not have it in one piece (MPEG-TS).
        size: bytes.
        crc: CRC-32.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self.offset: list[int] = []
        self.size: list[int] = []
        self.crc: list[int] = []

    def add(self, packet: Any) -> None:
        """Take a packet of PyAV's."""
        body = bytes(packet)
        self.offset.append(-1 if packet.pos is None else self._find(packet.pos, body))
        self.size.append(len(body))
        self.crc.append(zlib.crc32(body))

    def _find(self, place: int, body: bytes) -> int:
        """The offset of these bytes, which begin at the place that the container tells (-1: untold) or soon after."""
        if place < 0 or self._has(place, body):
            return place
        begin = bytes(self._data[place : place + _HEADER + _HEAD])
        at = begin.find(body[:_HEAD])
        while at >= 0:
            if self._has(place + at, body):
                return place + at
            at = begin.find(body[:_HEAD], at + 1)
        return -1

    def _has(self, start: int, body: bytes) -> bool:
        return bytes(self._data[start : start + len(body)]) == body
