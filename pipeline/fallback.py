"""One reader first, and another for what it cannot decode: a codec that the hardware lacks costs speed, not samples."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .errors import DecodeError

if TYPE_CHECKING:
    from .decode import Decoder

_MOST_TOLD = 100  # reasons that the log gives; messages of damaged clips may differ without end

_log = logging.getLogger(__name__)
_told: dict[str, object] = {}


class FallbackDecoder:
    """See `Decoder`. The first reader may refuse at opening, where it knows the kind of video, or fail later, where the
    hardware finds out; the second then opens the same bytes and takes over for good.

    Args:
        first, second: open the video.
        name: of the video, which reasons are told without.
        device: where frames are to lie, whoever decodes them; None leaves them where they are.
    Raises:
        DecodeError: neither can decode it; the second one's reason.
    """

    def __init__(
        self,
        first: Callable[[], Decoder],
        second: Callable[[], Decoder],
        *,
        name: str = "",
        device: torch.device | None = None,
    ) -> None:
        self._second, self._name, self._device = second, name, device
        self._reason = ""
        try:
            self._reader = first()
        except DecodeError as err:
            self._take_over(err)

    @property
    def backend(self) -> str:
        """The reader that is at work."""
        return self._reader.backend

    @property
    def fallback(self) -> str:
        """Why the second reader is at work, "" where the first one is."""
        return self._reason

    @property
    def num_frames(self) -> int:
        return self._reader.num_frames

    @property
    def fps(self) -> float:
        return self._reader.fps

    @property
    def timestamps(self) -> np.ndarray:
        return self._reader.timestamps

    @property
    def key_frames(self) -> np.ndarray:
        return self._reader.key_frames

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Decoder.frames_at`; on the device that was asked for."""
        if not self._reason:
            try:
                return self._reader.frames_at(indices)
            except DecodeError as err:
                self._reader.close()  # whose engine and memory others may need meanwhile
                self._take_over(err)
        frames = _moved(self._reader.frames_at(indices), self._device)
        _tell(self._reason, self._reader.backend)  # not earlier: it may be damage, which nobody can decode
        return frames

    def _take_over(self, error: DecodeError) -> None:
        self._reader = self._second()
        reason = str(error).removeprefix(f"{self._name or 'the video'}: ")
        self._reason = reason.replace("; use the decoder pyav", "")  # which is what happens

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> FallbackDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _moved(frames: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    if device is None or frames.device == device:
        return frames
    if device.type == "cuda":  # page-locked, so that the copy runs on the stream beside whatever else the GPU does
        return frames.pin_memory().to(device, non_blocking=True)
    return frames.to(device)


def _tell(reason: str, backend: str) -> None:
    """Log a reason once per process, whatever numbers are in it."""
    kind = re.sub(r"\d+", "#", reason)
    mine = object()
    if len(_told) >= _MOST_TOLD or _told.setdefault(kind, mine) is not mine:  # one step, where a lock could be forked
        return
    _log.warning("decoding with %s where this is so, and counting it as cpu_fallbacks: %s", backend, reason)
