"""One pass of a decoder over a video, from which frames are taken as they are asked for.

Some videos have hardly a key packet at which decoding may begin: those that are refreshed a stripe at a time, those
with one key frame at their very beginning, recordings with open groups of pictures. Whoever wants all parts of one,
one after the other, goes through it once so, where each part on its own would have everything before it decoded again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .arrivals import Arrivals
from .errors import DecodeError
from .packet_order import Run
from .packet_table import Deadline, PacketTable, label, reason_of

_GAP = 16  # as many packets as a run has, so many times, are rather gone through than begun behind


@dataclass
class DecodeStats:
    """Work that a decoder has done so far: packets fed to it, runs begun at a key frame, pictures converted."""

    packets: int = 0
    runs: int = 0
    pictures: int = 0


class DecodePass:
    """A decoder at work, and where it is. Nothing else may use the table's decoder meanwhile.

    Args:
        table: of a video whose frames are ordered.
        run: the first one; its first packet is one at which a decoder forgets all that was before.
        leaves_out: pictures that no other refers to, and nobody wants, need not be decoded.
        stats: counts its packets, and the pass as a run.
    """

    def __init__(self, table: PacketTable, name: str, run: Run, *, leaves_out: bool, stats: DecodeStats) -> None:
        self._table, self._name, self._leaves_out, self._stats = table, name, leaves_out, stats
        stats.runs += 1
        self._position = run.packets[0]  # of the packet that is next
        # Leading packets of the first key packet, which refer to what is not decoded.
        self._left_out = set(range(run.packets[0], run.packets[-1] + 1)) - set(run.packets)
        self._ahead: deque[Any] = deque()  # frames that have come and were not looked at yet
        self._last = -1  # index of the one that was looked at last
        self._usable, self._drained = True, False

    def serves(self, run: Run) -> bool:
        """Whether these frames are still to come, and soon."""
        gap = run.packets[0] - self._position
        most = 0 if self._table.closed_keys else _GAP * len(run.packets)
        return self._usable and run.frames[0] > self._last and gap <= most

    def frames(self, run: Run, deadline: Deadline) -> Iterator[tuple[int, Any]]:
        """The frames of a run that this serves: (index, PyAV frame).

        Raises:
            DecodeError: there is damage on the way, or a frame does not come; the pass is at its end then, as it is
                when not all of them are taken.
        """
        import av

        context = self._table.source.codec()
        wanted, last = set(run.frames), run.frames[-1]
        arrivals = Arrivals(self._name, True, run.frames, self._last)
        taken, self._usable = False, False
        try:
            while not taken:
                while self._ahead and not taken:
                    frame = self._ahead.popleft()
                    index = arrivals.index_of(frame)
                    self._last = arrivals.last
                    taken = index == last
                    if index in wanted:
                        yield index, frame
                if not taken:
                    deadline.check()
                    if self._drained:
                        arrivals.check(self._table.num_frames)
                        raise DecodeError(f"{label(self._name)}: frame {last} did not come out of the decoder.")
                    self._feed(context, wanted, last, arrivals)
            self._usable = True
        except (av.error.FFmpegError, ValueError) as err:
            raise DecodeError(f"{label(self._name)}: damaged before frame {last} ({reason_of(err)}).") from err
        finally:
            if not self._usable:
                self.end()

    def end(self) -> None:
        """The decoder forgets all of it, and may be used otherwise."""
        self._usable = False
        self._table.source.codec().flush_buffers()

    def _feed(self, context: Any, wanted: set[int], last: int, arrivals: Arrivals) -> None:
        """Give the decoder the next packet, or the end."""
        if self._position == self._table.num_packets:
            self._ahead.extend(context.decode(None))
            self._drained = True
            return
        position = self._position
        self._position += 1
        if position in self._left_out:
            return
        self._stats.packets += 1
        index = int(self._table.order.rank[position])
        if self._leaves_out:  # what comes behind these may be wanted next
            context.skip_frame = "DEFAULT" if index in wanted or index > last else "NONREF"
        elif 0 <= index < last and index not in wanted:
            arrivals.expect(index)
        self._ahead.extend(context.decode(self._table.source.packet(position)))
