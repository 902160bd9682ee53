"""From a picture as it comes out of a decoder to the pixels that a player shows. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DecodeError

HD_LINES = 576  # untagged video above this height is BT.709, as players take it
_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED
_CONVERTIBLE = (0, 1, _UNTAGGED, 3, 4, 5, 6, 7, 9)  # AVCOL_SPC_*: RGB, the standards of television, BT.2020
_BT709, _BT601 = 1, 5  # SWS_CS_*; as numbers, because PyAV has no name for every one
_METHOD = 0x2 | 0x40000 | 0x2000 | 0x80000  # SWS_BILINEAR, ACCURATE_RND, FULL_CHR_H_INT, BITEXACT


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a picture: swap rows and columns, then mirror the new axes.

    Attributes:
        swap: rows become columns.
        mirror_x, mirror_y: mirror left to right, top to bottom, after the swap.
    """

    swap: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def rotation(self) -> int:
        """Degrees clockwise, of the turn alone where the picture is mirrored, too."""
        if self.swap:
            return 90 if self.mirror_x else 270
        return 180 if self.mirror_y else 0

    @property
    def mirrored(self) -> bool:
        """Whether the picture is mirrored besides being turned."""
        return self.mirror_x != self.mirror_y if not self.swap else self.mirror_x == self.mirror_y

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [3, h, w] as stored to contiguous uint8 [3, H, W] as shown."""
        planes = picture.transpose(0, 2, 1) if self.swap else picture
        if self.mirror_x:
            planes = planes[:, :, ::-1]
        if self.mirror_y:
            planes = planes[:, ::-1]
        return np.ascontiguousarray(planes)


_UPRIGHT = Orientation()


def orientation(frame: Any, name: str, default: Orientation = _UPRIGHT) -> Orientation:
    """Read it from the display matrix of a decoded PyAV frame; `default` where it carries none.

    Raises:
        DecodeError: the matrix turns by something other than quarter turns.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return default
    # Rows (a, b, u), (c, d, v), (x, y, w): a point (x, y) is shown at (a x + c y, b x + d y), y downwards.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), dtype=np.int32)[:5])
    if a == b == c == d == 0:
        return Orientation()  # says nothing; players ignore it
    if b == c == 0:
        return Orientation(False, mirror_x=a < 0, mirror_y=d < 0)
    if a == d == 0:
        return Orientation(True, mirror_x=c < 0, mirror_y=b < 0)
    raise DecodeError(
        f"{name or 'the video'}: is to be shown at an angle that is no quarter turn (matrix {a} {b} {c} {d}); "
        "turn it once with a video editor."
    )


def fit_short_side(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """(width, height) with the shorter side of length `short_side` and the aspect kept; unchanged for None."""
    if short_side is None:
        return width, height
    if width <= height:
        return short_side, max(1, round(height * short_side / width))
    return max(1, round(width * short_side / height)), short_side


def check_matrix(frame: Any, name: str = "") -> None:
    """Raise DecodeError for a PyAV picture whose colours are in a matrix that cannot be converted by, such as ICtCp."""
    if frame.colorspace not in _CONVERTIBLE:
        raise DecodeError(
            f"{name or 'the video'}: its colours are in matrix number {int(frame.colorspace)} of H.273, which FFmpeg "
            "does not turn into RGB; encode it anew in BT.709."
        )


def to_rgb(frame: Any, size: tuple[int, int], name: str = "", out: np.ndarray | None = None) -> np.ndarray:
    """A decoded PyAV picture as uint8 [3, height, width] RGB of `size` (width, height).

    Resizing and colour conversion are one pass of swscale: bilinear, with a filter that widens on reduction and so
    does not alias; full chroma; the same bits on every processor. Matrix and range are the stream's own; where it
    names none, BT.709 above 576 lines and BT.601 below. Planes, because swscale writes them three times as fast as
    interleaved pixels, with the same bits, and they are what a model wants. `out` is written to where it is given.

    Raises:
        DecodeError: the stream names a matrix that cannot be converted by, such as ICtCp.
    """
    check_matrix(frame, name)
    matrix = None
    if frame.colorspace == _UNTAGGED:
        matrix = _BT709 if frame.height > HD_LINES else _BT601
    planes = frame.reformat(*size, format="gbrp", src_colorspace=matrix, interpolation=_METHOD, threads=1).planes
    width, height = size
    picture = np.empty((3, height, width), dtype=np.uint8) if out is None else out
    for channel, plane in zip((1, 2, 0), planes, strict=True):  # stored as green, blue, red
        picture[channel] = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)[:height, :width]
    return picture
