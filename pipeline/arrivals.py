"""Frames as they come out of a decoder, held against what was fed to it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from .errors import DecodeError
from .packet_table import label


class Arrivals:
    """Which frames of a run have come out of the decoder, and which are still to come. They come as they are shown.

    Args:
        frames: indices that have to come, rising.
        last: the frame that came before these.
    """

    def __init__(self, name: str, ordered: bool, frames: Sequence[int], last: int = -1) -> None:
        self.name, self.ordered, self.last = name, ordered, last
        self._count = 0
        self._expected = list(frames)  # a heap

    def expect(self, index: int) -> None:
        """One more that has to come."""
        heapq.heappush(self._expected, index)

    def index_of(self, frame: Any) -> int:
        """The index of a frame that has come, -1 for one that an edit list hides. Raises DecodeError where it is
        damaged, comes at the wrong time, or in place of one that has not come."""
        # Where the container does not order its frames, the order in which they come does.
        index = frame.pts if self.ordered else self._count
        if frame.is_corrupt:
            raise DecodeError(f"{label(self.name)}: the decoder says that frame {index} is damaged.")
        if index is None:
            return -1
        if index <= self.last:
            raise DecodeError(
                f"{label(self.name)}: the decoder shows frame {index} after frame {self.last}, so the times in the "
                "container, or the pictures, are damaged."
            )
        self.check(index)
        if self._expected and self._expected[0] == index:
            heapq.heappop(self._expected)
        self.last = index
        self._count += 1
        return int(index)

    def check(self, before: int) -> None:
        """Raise DecodeError where a frame before this one was to come, and has not."""
        if self._expected and self._expected[0] < before:
            missing = [index for index in self._expected if index < before]
            raise DecodeError(
                f"{label(self.name)}: {len(missing)} frames did not come out of the decoder, frame {min(missing)} "
                "first; the packets on the way to it, or the times in the container, are damaged."
            )
