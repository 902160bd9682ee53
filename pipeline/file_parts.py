"""Some of a file's bytes, at their places, in place of all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence


class FileParts:
    """Parts of a file: as long as the file, and holding what was read of it. Can be sent to another process.

    Args:
        num_bytes: length of the file.
        parts: (offset, bytes), ascending, without overlap.
    """

    def __init__(self, num_bytes: int, parts: Sequence[tuple[int, bytes | memoryview]]) -> None:
        self.num_bytes = num_bytes
        self._starts = [start for start, _ in parts]
        self._parts = [part for _, part in parts]

    def __len__(self) -> int:
        """Bytes of the file."""
        return self.num_bytes

    @property
    def num_held(self) -> int:
        """Bytes of it that are here."""
        return sum(map(len, self._parts))

    def cut(self, start: int, size: int) -> memoryview:
        """The bytes from `start` on. Raises KeyError where they were not read."""
        number = bisect_right(self._starts, start) - 1
        if number >= 0:
            at = start - self._starts[number]
            part = memoryview(self._parts[number])[at : at + size]
            if len(part) == size:
                return part
        raise KeyError(f"bytes {start} to {start + size} were not read")


def joined(pieces: Iterable[tuple[int, int]], gap: int) -> list[range]:
    """Ranges that cover pieces of (offset, size), ascending; those less than `gap` bytes apart are read as one."""
    ranges: list[range] = []
    for start, size in sorted(pieces):
        if ranges and start <= ranges[-1].stop + gap:
            ranges[-1] = range(ranges[-1].start, max(ranges[-1].stop, start + size))
        else:
            ranges.append(range(start, start + size))
    return ranges
