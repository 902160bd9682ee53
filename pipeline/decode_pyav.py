"""Exact decoding on the CPU with PyAV: the frames asked for, and no packet more than they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .file_parts import FileParts
from .frame_reader import FrameReader, check_indices
from .packet_table import Deadline
from .picture import Orientation, fit_short_side, to_rgb
from .probe import VideoInfo


class PyAVDecoder(FrameReader):
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
        data: bytes | memoryview | FileParts,
        *,
        short_side: int | None = None,
        info: VideoInfo | None = None,
        name: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(data, info=info, name=name, timeout_s=timeout_s)
        self.short_side = short_side
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
            for index, frame in self._collected(run, deadline):
                self._convert(frame, index)
        frames, self._frames = self._frames, None
        assert frames is not None
        in_order = len(gather) == len(wanted) and bool((np.diff(gather) > 0).all())
        return torch.from_numpy(frames if in_order else frames[gather])

    def _convert(self, frame: Any, index: int) -> None:
        """Write a frame to its row: RGB, resized and turned as a player shows it."""
        laid = self._look(frame, index)
        self.stats.pictures += 1
        width, height = fit_short_side(frame.width, frame.height, self.short_side)
        if self._frames is None:  # once for all, because fresh memory costs more than what is written to it
            shown = (width, height) if laid.swap else (height, width)
            self._frames = np.empty((len(self._rows), 3, *shown), dtype=np.uint8)
        row = self._frames[self._rows[index]]
        if laid == Orientation():
            to_rgb(frame, (width, height), self.name, out=row)
        else:
            row[:] = laid.apply(to_rgb(frame, (width, height), self.name))

    def __enter__(self) -> PyAVDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
