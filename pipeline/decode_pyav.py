"""Exact decoding on the CPU with PyAV: the frames asked for, and no packet more than they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .bitstream import leaves_out_safely
from .decode import check_indices, fit_short_side
from .errors import DecodeError
from .file_parts import FileParts
from .indexed import packet_table
from .packet_order import Run
from .packet_table import Deadline, check_size, label
from .picture import Orientation, orientation, to_rgb
from .probe import VideoInfo


@dataclass
class DecodeStats:
    """Work that a decoder has done so far: packets fed to it, runs begun at a key frame, pictures converted."""

    packets: int = 0
    runs: int = 0
    pictures: int = 0


class PyAVDecoder:
    """See `Decoder`. Holds the file's packets; one thread; not to be shared between threads.

    Args:
        data: the video file.
        short_side: resize so that the shorter side has this length; None keeps the size.
        info: what is known about the video. A file that no longer has as many frames is refused.
        name: how errors call it.
        timeout_s: for opening, and again for every `frames_at`.
    Raises:
        DecodeError: nothing can be decoded from `data`, or not what `info` promises.
    """

    backend = "pyav"

    def __init__(
        self,
        data: bytes | FileParts,
        *,
        short_side: int | None = None,
        info: VideoInfo | None = None,
        name: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        self.name, self.short_side, self.timeout_s = name, short_side, timeout_s
        self.stats = DecodeStats()
        self.table = packet_table(data, info, name=name, deadline=Deadline(timeout_s, name))
        self._leaves_out = self.table.ordered and leaves_out_safely(
            self.table.codec, bytes(self.table.source.codec().extradata or b"")
        )
        self.num_frames = self.table.num_frames
        self.fps = self.table.fps
        self.timestamps = self.table.times()
        self.key_frames = self.table.key_frames
        self._stored: tuple[int, int] | None = None
        self._laid: Orientation | None = None
        self._rows: dict[int, int] = {}  # frame -> row of `_frames`
        self._frames: np.ndarray | None = None  # uint8 [n, 3, H, W], while they are being decoded

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices`: uint8 [n, 3, H, W] RGB, in the order asked, repeats allowed.

        Raises:
            DecodeError: an index is outside the video, a packet on the way is damaged, a frame does not come out
                of the decoder, or the time is up. Never returns another frame in place of a missing one.
        """
        wanted, gather = np.unique(check_indices(indices, self.num_frames, self.name), return_inverse=True)
        deadline = Deadline(self.timeout_s, self.name)
        self._rows, self._frames = {index: row for row, index in enumerate(wanted.tolist())}, None
        for run in self.table.order.runs(wanted.tolist()):
            self._collect(run, deadline)
        frames, self._frames = self._frames, None
        assert frames is not None
        in_order = len(gather) == len(wanted) and bool((np.diff(gather) > 0).all())
        return torch.from_numpy(frames if in_order else frames[gather])

    def _collect(self, run: Run, deadline: Deadline) -> None:
        """Decode a run, and from an earlier key packet on where that was not enough.

        Some streams mark packets as key that only begin a gradual refresh, after which pictures are complete.
        """
        order = self.table.order
        key = int(np.searchsorted(order.keys, run.packets[0]))
        for earlier in (0, 1, 4):
            if earlier:
                run = order.run_from(int(order.keys[max(0, key - earlier)]), run.frames)
            try:
                self._decode(run, deadline)
                return
            except DecodeError:
                deadline.check()
                if self.table.closed_keys or not order.ordered or key - earlier <= 0 or earlier == 4:
                    raise

    def _decode(self, run: Run, deadline: Deadline) -> None:
        """Decode one run. Damage anywhere in it is an error: frames after it may build on it without a sign of it."""
        import av

        table, wanted, ordered = self.table, set(run.frames), self.table.ordered
        context = table.source.codec()
        self.stats.runs += 1
        found: set[int] = set()
        expected: set[int] = set(run.frames)
        came: dict[int, None] = {}  # in the order in which they came
        try:
            for position, index in zip(run.packets, table.order.rank[run.packets].tolist(), strict=True):
                deadline.check()
                if self._leaves_out:
                    context.skip_frame = "DEFAULT" if index in wanted else "NONREF"
                elif index >= 0 and ordered:
                    expected.add(index)
                self.stats.packets += 1
                self._keep(context.decode(table.source.packet(position)), came, wanted, found)
                if not ordered and len(found) == len(wanted):
                    break
            self._keep(context.decode(None), came, wanted, found)
        except (av.error.FFmpegError, ValueError) as err:
            raise DecodeError(
                f"{label(self.name)}: damaged between frames {max(0, int(table.order.rank[run.packets[0]]))} and "
                f"{max(run.frames)} ({getattr(err, 'strerror', None) or err})."
            ) from err
        finally:
            context.flush_buffers()
        missing = sorted(expected - came.keys())
        if missing:
            raise DecodeError(
                f"{label(self.name)}: {len(missing)} frames did not come out of the decoder, "
                f"frame {missing[0]} first; the packets on the way to it are damaged."
            )

    def _keep(self, frames: Iterable[Any], came: dict[int, None], wanted: set[int], found: set[int]) -> None:
        """Convert those of `frames` that are wanted, and note which ones came. They come as they are to be shown."""
        for frame in frames:
            # Where the container does not order its frames, the order in which they come does.
            index = frame.pts if self.table.ordered else len(came)
            if frame.is_corrupt:
                raise DecodeError(f"{label(self.name)}: the decoder says that frame {index} is damaged.")
            if index is None:
                continue  # hidden, by an edit list
            last = next(reversed(came), -1)
            if index <= last:
                raise DecodeError(
                    f"{label(self.name)}: the decoder shows frame {index} after frame {last}, so the times in the "
                    "container, or the pictures, are damaged."
                )
            came[index] = None
            if index in wanted and index not in found:
                found.add(index)
                self._convert(frame, index)

    def _convert(self, frame: Any, index: int) -> None:
        """Write a frame to its row: RGB, resized and turned as a player shows it."""
        size = (frame.width, frame.height)
        if self._stored not in (None, size):
            raise DecodeError(
                f"{label(self.name)}: frame {index} is {size[0]} x {size[1]}, others are "
                f"{self._stored[0]} x {self._stored[1]}; split the video where its size changes."  # type: ignore[index]
            )
        check_size(*size, self.name)
        self._stored = size
        self.stats.pictures += 1
        laid = orientation(frame, self.name, self.table.source.turn)
        if self._laid not in (None, laid):
            raise DecodeError(f"{label(self.name)}: frame {index} is turned otherwise than others; split it there.")
        self._laid = laid
        width, height = fit_short_side(*size, self.short_side)
        if self._frames is None:  # once for all, because fresh memory costs more than what is written to it
            shown = (width, height) if laid.swap else (height, width)
            self._frames = np.empty((len(self._rows), 3, *shown), dtype=np.uint8)
        row = self._frames[self._rows[index]]
        if laid == Orientation():
            to_rgb(frame, (width, height), self.name, out=row)
        else:
            row[:] = laid.apply(to_rgb(frame, (width, height), self.name))

    def close(self) -> None:
        self.table.close()

    def __enter__(self) -> PyAVDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
