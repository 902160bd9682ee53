"""Exact decoding with PyAV, frame by frame as they are stored, no packet more than they need. Needs no torch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from .arrivals import Arrivals
from .bitstream import begins_afresh, leaves_out_safely
from .decode_pass import DecodePass, DecodeStats
from .errors import DecodeError
from .file_parts import FileParts
from .indexed import packet_table
from .packet_order import Run
from .packet_table import Deadline, check_size, label
from .picture import Orientation, orientation
from .probe import VideoInfo

LONG_LEAD = 300  # packets before the first one wanted, which is more than encoders put between key frames unasked


class FrameReader:
    """The frames of one video. Holds the file's packets; one thread; not to be shared between threads.

    Args:
        data: the video file.
        info: what is known about the video. A file that no longer has as many frames is refused.
        name: how errors call it.
        timeout_s: for opening, and again from frame to frame.
    Raises:
        DecodeError: nothing can be decoded from `data`, or not what `info` promises.
    """

    def __init__(
        self,
        data: bytes | memoryview | FileParts,
        *,
        info: VideoInfo | None = None,
        name: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.stats = DecodeStats()
        self.table = packet_table(data, info, name=name, deadline=Deadline(timeout_s, name))
        self._leaves_out = self.table.ordered and leaves_out_safely(self.table.codec, self.table.source.extradata)
        self.num_frames = self.table.num_frames
        self.fps = self.table.fps
        self.timestamps = self.table.times()
        self.key_frames = self.table.key_frames
        self._stored: tuple[int, int] | None = None
        self._laid: Orientation | None = None
        self._pass: DecodePass | None = None

    def pictures(self, indices: Sequence[int]) -> Generator[tuple[int, Any, Orientation], None, None]:
        """The frames at rising `indices`, one at a time as they are stored: (index, PyAV frame, how it is to be laid).

        For work on long stretches: nothing is converted, and one frame is in memory at a time. `timeout_s` counts anew
        from frame to frame.

        Raises:
            DecodeError: as `frames_at` does.
        """
        wanted = check_indices(indices, self.num_frames, self.name)
        if (np.diff(wanted) < 1).any():
            raise ValueError(f"{label(self.name)}: pictures come in their order, but the indices do not rise")
        for run in self.table.order.runs(wanted.tolist()):
            deadline = Deadline(self.timeout_s, self.name)
            for index, frame in self._collected(run, deadline, onward=True):
                yield index, frame, self._look(frame, index)
                deadline.renew()

    def _collected(self, run: Run, deadline: Deadline, *, onward: bool = False) -> Iterator[tuple[int, Any]]:
        """Decode a run, and from an earlier key packet on where that was not enough.

        With `onward` more may be asked for later: what takes a long way is then not begun anew each time. Packets
        behind the run are needed for that.

        Some streams mark packets as key that only begin a gradual refresh, after which pictures are complete. Others
        begin open groups of pictures that manage references from before them, which is an error without those.
        """
        order = self.table.order
        last = -1  # that was given out
        if onward and self._pass is not None and self._pass.serves(run):
            try:
                for index, frame in self._pass.frames(run, deadline):
                    yield index, frame
                    last = index
                return
            except DecodeError:  # of damage that may lie before or behind what the run needs
                deadline.check()
        starts = self._starts(int(np.searchsorted(order.keys, run.packets[0])))
        start: int | None = next(starts)
        while start is not None:
            following = next(starts, None)
            if self._pass is not None:
                self._pass.end()
            self._pass, decoded = None, self._decoded
            if onward and following is None and self._leads_far(run):
                self._pass = DecodePass(self.table, self.name, run, leaves_out=self._leaves_out, stats=self.stats)
                decoded = self._pass.frames
            try:
                for index, frame in decoded(run, deadline):
                    if index > last:
                        yield index, frame
                        last = index
                return
            except DecodeError:
                deadline.check()
                if self._pass is not None:  # which has ended; the damage may lie behind what the run needs
                    self._pass, onward, following = None, False, start
                if following is None:
                    raise
                start = following
                run = order.run_from(int(order.keys[start]), run.frames)

    def _leads_far(self, run: Run) -> bool:
        order = self.table.order
        return order.ordered and int(order.position[run.frames[0]]) - run.packets[0] > LONG_LEAD

    def _starts(self, key: int) -> Iterator[int]:
        """Key packets, counted, from which decoding may begin to get what follows key packet `key`: each earlier than
        the one before it, the last one where a decoder forgets all that was before."""
        yield key
        if self.table.closed_keys or not self.table.ordered or key == 0:
            return
        afresh = key
        while afresh and not self._begins_afresh(afresh):
            afresh -= 1
        yield from (key - back for back in (1, 4) if key - back > afresh)
        if afresh < key:
            yield afresh

    def _begins_afresh(self, key: int) -> bool:
        table = self.table
        packet = table.source.packet(int(table.order.keys[key]))
        return begins_afresh(table.codec, table.source.extradata, memoryview(packet))

    def _decoded(self, run: Run, deadline: Deadline) -> Iterator[tuple[int, Any]]:
        """Decode one run. Damage anywhere in it is an error: frames after it may build on it without a sign of it."""
        import av

        table, wanted, ordered = self.table, set(run.frames), self.table.ordered
        context = table.source.codec()
        self.stats.runs += 1
        came = Arrivals(self.name, ordered, run.frames)
        try:
            for position, index in zip(run.packets, table.order.rank[run.packets].tolist(), strict=True):
                deadline.check()
                if self._leaves_out:
                    context.skip_frame = "DEFAULT" if index in wanted else "NONREF"
                elif index >= 0 and ordered and index not in wanted:
                    came.expect(index)
                self.stats.packets += 1
                for frame in context.decode(table.source.packet(position)):
                    if (index := came.index_of(frame)) in wanted:
                        yield index, frame
                if not ordered and came.last >= run.frames[-1]:
                    return
            for frame in context.decode(None):
                if (index := came.index_of(frame)) in wanted:
                    yield index, frame
        except (av.error.FFmpegError, ValueError) as err:
            raise DecodeError(
                f"{label(self.name)}: damaged between frames {max(0, int(table.order.rank[run.packets[0]]))} and "
                f"{max(run.frames)} ({getattr(err, 'strerror', None) or err})."
            ) from err
        finally:
            context.flush_buffers()
        came.check(self.num_frames)

    def _look(self, frame: Any, index: int) -> Orientation:
        """How a frame is to be laid. Raises DecodeError where its size, or how it is turned, is not that of others."""
        size = (frame.width, frame.height)
        if self._stored not in (None, size):
            raise DecodeError(
                f"{label(self.name)}: frame {index} is {size[0]} x {size[1]}, others are "
                f"{self._stored[0]} x {self._stored[1]}; split the video where its size changes."  # type: ignore[index]
            )
        check_size(*size, self.name)
        self._stored = size
        laid = orientation(frame, self.name, self.table.source.turn)
        if self._laid not in (None, laid):
            raise DecodeError(f"{label(self.name)}: frame {index} is turned otherwise than others; split it there.")
        self._laid = laid
        return laid

    def close(self) -> None:
        self._pass = None
        self.table.close()


def check_indices(indices: Sequence[int], num_frames: int, name: str) -> np.ndarray:
    """The indices as int64 [n]. Raises DecodeError where one is outside the video or there is none."""
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(wanted) == 0:
        raise DecodeError(f"{name or 'the video'}: no frames were asked for.")
    outside = wanted[(wanted < 0) | (wanted >= num_frames)]
    if len(outside):
        raise DecodeError(f"{name or 'the video'}: frame {outside[0]} was asked for, but it has {num_frames} frames.")
    return wanted
