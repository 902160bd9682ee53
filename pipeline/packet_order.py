"""The packets of a video in decoding order, the frames they show, and the least of them that given frames need. Pure.

P packets, T frames, K key packets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .presentation import leading_packets, start_packets


class Run(NamedTuple):
    """Packets that are decoded in one go, ascending, and the frames that are wanted of them."""

    packets: list[int]
    frames: list[int]


@dataclass(frozen=True, eq=False)
class PacketOrder:
    """Which packet shows which frame, and where its decoding has to begin.

    Attributes:
        shown_at: int64 [P], when each packet's frame is shown, on any clock; the decoding order where nothing tells.
        rank: int64 [P], index of the frame that each packet shows in presentation order, or -1 for none.
        position: int64 [T], the inverse: which packet shows frame t.
        start: int64 [T], the key packet from which decoding has to begin to get frame t.
        keys: int64 [K], key packets.
        leading: bool [P], packets shown before the key packet that they follow: there are some in open GOPs.
        ordered: False where nothing says in which order frames are shown (H.264 coded as fields, in AVI). Then `rank`
            counts packets, and only decoding from the first packet on tells which frame is which.
    """

    shown_at: np.ndarray
    rank: np.ndarray
    position: np.ndarray
    start: np.ndarray
    keys: np.ndarray
    leading: np.ndarray
    ordered: bool

    @classmethod
    def of(cls, shown_at: np.ndarray, shown: np.ndarray, keys: np.ndarray, *, ordered: bool = True) -> PacketOrder:
        """From the times that packets carry.

        Args:
            shown: bool [P], packets that show a frame.
        """
        position = np.flatnonzero(shown)
        position = position[np.argsort(shown_at[position], kind="stable")]
        rank = np.full(len(shown), -1, dtype=np.int64)
        rank[position] = np.arange(len(position))
        leading = leading_packets(shown_at, keys) if ordered else np.zeros(len(shown), dtype=bool)
        return cls(shown_at, rank, position, start_packets(shown_at, keys, position), keys, leading, ordered)

    @property
    def key_frames(self) -> np.ndarray:
        """int64 [K]: indices of the key frames in presentation order, those that are shown."""
        if not self.ordered:
            return np.zeros(1, dtype=np.int64)
        shown = self.rank[self.keys]
        return np.sort(shown[shown >= 0])

    def runs(self, wanted: Sequence[int]) -> list[Run]:
        """The fewest packets that give the frames wanted, in as few goes as that takes.

        Frames are grouped by the key packet from which their decoding begins. A group goes on where the one before it
        ends if nothing is spared by not doing so; else the decoder starts afresh there, which spares what lies
        between.
        """
        if not self.ordered:
            return [Run(list(range(len(self.rank))), list(wanted))]
        groups: list[tuple[int, list[int]]] = []
        end = -1
        for start, frame in sorted((int(self.start[frame]), int(frame)) for frame in wanted):
            if groups and (start == groups[-1][0] or start <= end + 1):
                groups[-1][1].append(frame)
                end = max(end, int(self.position[frame]))
            else:
                groups.append((start, [frame]))
                end = int(self.position[frame])
        return [self.run_from(start, frames) for start, frames in groups]

    def run_from(self, start: int, frames: list[int]) -> Run:
        """The packets from key packet `start` on up to the last that shows one of `frames`.

        Leading packets of the first key packet refer to what is not decoded, and are left out.
        """
        if not self.ordered:
            return Run(list(range(len(self.rank))), frames)
        packets = np.arange(start, int(self.position[frames].max()) + 1)
        later_keys = self.keys[self.keys > start]
        first = packets < (later_keys[0] if len(later_keys) else len(self.rank))
        left_out = first & self.leading[packets]
        if np.isin(self.rank[packets[left_out]], frames).any():  # decodable ones, at the very start
            return Run(packets.tolist(), frames)
        return Run(packets[~left_out].tolist(), frames)
