"""Whether a decoder returned the frames that were asked for: speed on wrong frames is no speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: Mean difference in levels of 255 up to which two decoders' pictures count as the same: they resize and interpolate
#: chroma in different ways, which is 1 to 4 on footage.
TOLERANCE = 12.0
_NEARER = 0.5  # levels by which another frame has to fit better for a frame to be that one


def as_planes(result: Any) -> np.ndarray:
    """What a candidate returned as uint8 [n, 3, H, W]."""
    frames = np.stack(result) if isinstance(result, list) else np.asarray(result)
    return frames if frames.shape[1] == 3 else frames.transpose(0, 3, 1, 2)


class FrameCheck:
    """Compares frames with those of the exact decoder, and with the frames right before and after them.

    Args:
        frames_at: the exact decoder's.
        num_frames: of the video; wanted: the frames compared.
    """

    def __init__(self, frames_at: Callable[[Sequence[int]], Any], num_frames: int, wanted: Sequence[int]) -> None:
        self.wanted = list(wanted)
        near = sorted({i for w in wanted for i in (w - 1, w, w + 1) if 0 <= i < num_frames})
        self._exact = dict(zip(near, as_planes(frames_at(near)).astype(np.int16), strict=True))

    def verdict(self, result: Any) -> str:
        """ "" where every frame is the one wanted, else what is wrong."""
        frames = as_planes(result)
        expected = (len(self.wanted), *next(iter(self._exact.values())).shape)
        if frames.shape != expected:
            return f"wrong frames: {list(frames.shape)} came, {list(expected)} were expected"
        wrong = [index for index, frame in zip(self.wanted, frames, strict=True) if not self._is(index, frame)]
        return f"wrong frames: {len(wrong)} of {len(self.wanted)}, frame {wrong[0]} first" if wrong else ""

    def _is(self, index: int, frame: np.ndarray) -> bool:
        difference = {
            at: float(np.abs(self._exact[at] - frame).mean())
            for at in (index - 1, index, index + 1)
            if at in self._exact
        }
        return difference[index] <= min(TOLERANCE, min(difference.values()) + _NEARER)
