"""Readers other than PyAV, kept honest: what kind a video is is looked up before they see it, and what they return
is compared with what the container says."""

from __future__ import annotations

import functools
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .decode import Refused
from .errors import DecodeError
from .indexed import packet_table
from .packet_table import Deadline, PacketTable, Picture, label
from .probe import VideoInfo


class CheckedDecoder(ABC):
    """The common part of the foreign readers: the facts from the container, and the refusals.

    Args:
        refusal: says why this reader would get a video wrong, "" where it would not.
        data, short_side, info, name, timeout_s: see `open_decoder`.
    Raises:
        Refused: a DecodeError, for a video of a kind that this reader gets wrong.
        DecodeError: the video cannot be used.
    """

    backend: str
    reader: str  # as messages call it

    def __init__(
        self,
        data: bytes,
        *,
        refusal: Callable[[PacketTable, Picture], str],
        short_side: int | None = None,
        info: VideoInfo | None = None,
        name: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        self.name, self.short_side, self.timeout_s, self.data = name, short_side, timeout_s, data
        deadline = Deadline(timeout_s, name)
        table = packet_table(data, info, name=name, deadline=deadline, keep=False)
        try:
            picture = table.picture or table.picture_of(table.first_frame(deadline))
            reason = refusal(table, picture)
        finally:
            table.close()
        if reason:
            raise Refused(f"{label(name)}: {self.reader} gets such videos wrong ({reason}); use the decoder pyav.")
        self.num_frames, self.fps, self.timestamps = table.num_frames, table.fps, table.times()
        self.key_frames = table.key_frames
        self.size = (picture.width, picture.height)

    @abstractmethod
    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Decoder.frames_at`."""

    def check(self, num_frames: int, shape: Sequence[int], expected: Sequence[int]) -> None:
        """Raise DecodeError where the reader found another number of frames, or frames of another shape."""
        if num_frames != self.num_frames or tuple(shape) != tuple(expected):
            raise DecodeError(
                f"{label(self.name)}: {self.reader} found {num_frames} frames and returned {tuple(shape)}, "
                f"expected {self.num_frames} and {tuple(expected)}; use the decoder pyav."
            )

    def check_times(self, indices: np.ndarray, seconds: np.ndarray) -> None:
        """Raise DecodeError where the reader's presentation times are apart by something else than ours."""
        theirs, ours = seconds - seconds[0], self.timestamps[indices] - self.timestamps[indices[0]]
        if np.abs(theirs - ours).max() > 0.5 / self.fps:
            raise DecodeError(f"{label(self.name)}: {self.reader} times its frames otherwise; use the decoder pyav.")

    def close(self) -> None:
        self.data = b""

    def __enter__(self) -> CheckedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.lru_cache(maxsize=1)
def tiny_clip() -> bytes:
    """Four grey frames, 192 x 128, in a codec that every NVDEC knows and every PyAV wheel writes: to try a reader."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for value in (60, 90, 120, 150):
            picture = np.full((128, 192, 3), value, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
