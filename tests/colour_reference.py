"""Pictures whose Y, Cb and Cr are known exactly, and the RGB that the standards say they are: the colour reference.

A picture has flat patches in its upper half, which show matrix and range, and smooth ramps below, which show banding,
clipping and misplaced chroma. It is coded without loss, so that whatever differs is the reader's conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

# Kr and Kb of ITU-R BT.601-7 (section 2.5.1), BT.709-6 (item 3.2) and BT.2020-2 (table 4, not constant luminance).
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
_TAGS = {"bt601": 6, "bt709": 1, "bt2020": 9}  # MatrixCoefficients of ITU-T H.273
_UNTAGGED = 2
_LOSSLESS = {
    "libx264": {"x264-params": "qp=0:threads=1"},
    "libx265": {"x265-params": "lossless=1:pools=none:frame-threads=1:log-level=none"},
    "libvpx-vp9": {"lossless": "1", "deadline": "realtime", "cpu-used": "8"},
    "ffv1": {},
}
_BORDER = 4  # pixels beside an edge that are not compared: there, chroma is a matter of taste
_PATCHES = [  # R'G'B' of 0 to 1: grey steps, primaries and secondaries at 3/4, and colours of things
    *[(level, level, level) for level in (0.0, 0.2, 0.5, 0.8, 1.0)],
    *[(0.75, 0.0, 0.0), (0.0, 0.75, 0.0), (0.0, 0.0, 0.75), (0.75, 0.75, 0.0), (0.75, 0.0, 0.75), (0.0, 0.75, 0.75)],
    *[(0.9, 0.72, 0.6), (0.35, 0.2, 0.12), (0.2, 0.45, 0.15), (0.45, 0.65, 0.9), (0.6, 0.1, 0.1)],
]
_COLUMNS = 8
_PATCH = 24  # pixels a side


@dataclass(frozen=True)
class ColourCase:
    """One way to store colours.

    Attributes:
        matrix: which standard's matrix the pixels are in, a key of `MATRICES`.
        full: whether black is 0 and white is all ones, or 16 and 235 (of 8 bits).
        pix_fmt: FFmpeg's name.
        tagged: whether the stream says which matrix it is.
        lines: height of the picture; a taller one is filled up with grey.
        codec: FFmpeg's name of the encoder, which has to be lossless.
    """

    matrix: str
    full: bool
    pix_fmt: str = "yuv420p"
    tagged: bool = True
    lines: int = 144
    codec: str = "libx264"
    suffix: str = ".mp4"

    @property
    def bits(self) -> int:
        return 10 if "10" in self.pix_fmt else 8

    @property
    def subsampled(self) -> bool:
        return "420" in self.pix_fmt

    @property
    def name(self) -> str:
        standard = f"BT.{self.matrix.removeprefix('bt')}"
        chroma = "4:2:0" if self.subsampled else "4:4:4"
        words = [standard, "full" if self.full else "limited", f"{self.bits} bit", chroma]
        words += [] if self.tagged else ["untagged"]
        words += [f"{self.lines} lines"] if self.lines > 144 else []
        words += [] if self.codec == "libx264" else [_CODEC_NAMES[self.codec]]
        return " ".join(words)


_CODEC_NAMES = {"libx265": "HEVC", "libvpx-vp9": "VP9", "ffv1": "FFV1"}
_TV = [("bt601", False), ("bt601", True), ("bt709", False), ("bt709", True)]
_PIXELS = ("yuv420p", "yuv444p", "yuv420p10le", "yuv444p10le")
CASES: dict[str, ColourCase] = {
    case.name: case
    for case in (
        *(ColourCase(matrix, full, pixels) for pixels in _PIXELS for matrix, full in _TV),
        *(ColourCase("bt601", False, pixels, tagged=False) for pixels in _PIXELS),
        *(ColourCase("bt709", False, pixels, tagged=False, lines=720) for pixels in _PIXELS),
        ColourCase("bt601", True, tagged=False),
        ColourCase("bt709", True, tagged=False, lines=720),
        ColourCase("bt601", False, lines=720),
        ColourCase("bt2020", False),
        ColourCase("bt2020", False, "yuv420p10le"),
        ColourCase("bt2020", True, "yuv444p10le"),
        ColourCase("bt709", True, codec="libx265"),
        ColourCase("bt709", False, "yuv420p10le", codec="libx265"),
        ColourCase("bt601", False, "yuv444p", codec="libvpx-vp9", suffix=".webm"),
        ColourCase("bt709", True, "yuv444p", codec="libvpx-vp9", suffix=".webm"),
        ColourCase("bt709", False, codec="libvpx-vp9", suffix=".webm"),
        ColourCase("bt709", True, codec="ffv1", suffix=".mkv"),
        ColourCase("bt601", False, "yuv420p10le", codec="ffv1", suffix=".mkv"),
    )
}


def to_ycbcr(rgb: np.ndarray, case: ColourCase) -> np.ndarray:
    """R'G'B' float [..., 3] of 0 to 1 as Y'CbCr in code values, float [..., 3]."""
    kr, kb = MATRICES[case.matrix]
    red, green, blue = np.moveaxis(rgb, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    planes = luma, (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    return np.stack([plane * scale + offset for plane, (scale, offset) in zip(planes, _levels(case), strict=True)], -1)


def to_rgb8(ycbcr: np.ndarray, case: ColourCase) -> np.ndarray:
    """Code values float [..., 3] as R'G'B' of 0 to 255, float [..., 3], clipped as a display clips."""
    kr, kb = MATRICES[case.matrix]
    luma, blueness, redness = (
        (plane - offset) / scale
        for plane, (scale, offset) in zip(np.moveaxis(ycbcr, -1, 0), _levels(case), strict=True)
    )
    red = luma + (2 - 2 * kr) * redness
    blue = luma + (2 - 2 * kb) * blueness
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], -1), 0, 1) * 255


def _levels(case: ColourCase) -> list[tuple[float, float]]:
    """(scale, offset) of Y', Cb and Cr in code values."""
    step = 1 << (case.bits - 8)
    if not case.full:
        return [(219 * step, 16 * step), (224 * step, 128 * step), (224 * step, 128 * step)]
    top = (1 << case.bits) - 1
    return [(top, 0), (top, 128 * step), (top, 128 * step)]


def picture(case: ColourCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is stored and what is to be seen.

    Returns:
        Y', Cb, Cr in code values, float [H, W, 3] (halved and rounded they are what is stored); R'G'B' of 0 to 255,
        float [H, W, 3]; and which pixels are to be compared, bool [H, W].
    """
    width = _COLUMNS * _PATCH
    half = len(_PATCHES) // _COLUMNS * _PATCH
    y, x = np.mgrid[0:half, 0:width].astype(float)
    flat = np.array(_PATCHES)[(y // _PATCH * _COLUMNS + x // _PATCH).astype(int)]
    inside = _from_edge(x % _PATCH, _PATCH) & _from_edge(y % _PATCH, _PATCH)
    # Ramps: luma along the rows, both chromas across them, slow enough that a misplaced sample hardly shows.
    along, across = x / (width - 1), y / (half - 1)
    ramp = to_ycbcr(np.stack([0.2 + 0.6 * along, 0.35 + 0.3 * across, 0.65 - 0.3 * across * along], -1), case)
    ramp[..., 0] = np.round(ramp[..., 0])
    grey = to_ycbcr(np.full((case.lines - 2 * half, width, 3), 0.5), case)
    planes = np.concatenate([np.round(to_ycbcr(flat, case)), ramp, np.round(grey)])
    compared = np.concatenate([inside, _from_edge(x, width) & _from_edge(y, half), np.zeros(grey.shape[:2], bool)])
    return planes, to_rgb8(planes, case), compared


def _from_edge(at: np.ndarray, length: int) -> np.ndarray:
    return (at >= _BORDER) & (at < length - _BORDER)


def deviation(frame: np.ndarray, case: ColourCase, reduced: int = 1) -> tuple[float, float]:
    """(mean, worst) absolute difference, of 255, between a decoded picture and what the standard says.

    Args:
        frame: uint8 [3, H, W].
        reduced: by how much the picture was made smaller.
    """
    _, seen, compared = picture(case)
    height, width = (side // reduced for side in compared.shape)
    blocks = seen.reshape(height, reduced, width, reduced, 3).mean((1, 3))
    compared = compared.reshape(height, reduced, width, reduced).all((1, 3))
    if frame.shape != (3, height, width):
        raise ValueError(f"expected a picture of {width} x {height}, got {frame.shape}")
    apart = np.abs(frame.transpose(1, 2, 0) - blocks)[compared]
    return float(apart.mean()), float(apart.max())


def write(case: ColourCase, path: Path, *, tag: int = 0) -> Path:
    """A video of three frames of `picture`, coded without loss; `tag` is another matrix to name than the case's."""
    planes = picture(case)[0]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(case.codec, rate=24, options=_LOSSLESS[case.codec])
        stream.height, stream.width = planes.shape[:2]
        stream.pix_fmt = case.pix_fmt
        context = stream.codec_context
        context.colorspace = tag or (_TAGS[case.matrix] if case.tagged else _UNTAGGED)
        context.color_range = 2 if case.full else 1  # FFmpeg's numbers
        frame = stored_frame(planes, case)
        for index in range(3):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def stored_frame(planes: np.ndarray, case: ColourCase) -> av.VideoFrame:
    """The picture in the case's pixel format. Chroma lies where MPEG-2 put it: left, and between two rows."""
    luma, blueness, redness = np.moveaxis(planes, -1, 0)
    if case.subsampled:
        blueness, redness = (_halved(plane) for plane in (blueness, redness))
    frame = av.VideoFrame(planes.shape[1], planes.shape[0], case.pix_fmt)
    kind = np.dtype("<u2" if case.bits > 8 else "u1")
    for plane, values in zip(frame.planes, (luma, blueness, redness), strict=True):
        rows = np.zeros((plane.height, plane.line_size // kind.itemsize), dtype=kind)
        rows[:, : values.shape[1]] = np.round(values)
        plane.update(rows.tobytes())
    return frame


def _halved(plane: np.ndarray) -> np.ndarray:
    """Chroma at half the resolution: the mean of two rows, and (1, 2, 1) around every other column."""
    rows = (plane[0::2] + plane[1::2]) / 2
    wide = np.pad(rows, ((0, 0), (1, 1)), mode="edge")
    return ((wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4)[:, 0::2]
