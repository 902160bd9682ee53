"""What there is to know about a video before its frames are wanted."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import DecodeError, SampleError


@dataclass(frozen=True)
class VideoInfo:
    """One video, as a player shows it.

    Attributes:
        num_frames: frames that are shown, after edit lists and hidden packets.
        fps: frames per second, on average where the rate varies.
        duration: seconds from the first frame to the end of the last.
        width, height: pixels as displayed, after rotation; the shape of single pixels is not applied.
        codec: FFmpeg's name of the codec, "h264".
        rotation: 0, 90, 180 or 270 degrees clockwise from the stored to the displayed picture.
        key_frames: indices of the frames that decode on their own, in order of presentation.
        timestamps: seconds from the first frame, one per frame; None where the rate is constant.
        has_audio: whether there is sound.
        pix_fmt: FFmpeg's name of the stored pixel format, "yuv420p".
    """

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    codec: str
    rotation: int = 0
    key_frames: tuple[int, ...] = (0,)
    timestamps: tuple[float, ...] | None = None
    has_audio: bool = False
    pix_fmt: str = ""

    def times(self) -> np.ndarray:
        """Presentation times in seconds from the first frame: float64 [num_frames]."""
        if self.timestamps is None:
            return np.arange(self.num_frames, dtype=np.float64) / self.fps
        return np.asarray(self.timestamps, dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON can hold them. `timestamps` is left out where the rate is constant."""
        record = asdict(self)
        record["key_frames"] = list(self.key_frames)
        if self.timestamps is None:
            del record["timestamps"]
        else:
            record["timestamps"] = list(self.timestamps)
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> VideoInfo:
        """Read what `to_json` wrote; other keys are left alone.

        Raises:
            SampleError: a field is missing, of the wrong type, or impossible.
        """
        if not isinstance(record, dict):
            raise SampleError(f"video metadata: expected a JSON object, got {type(record).__name__}.")
        known = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        missing = [key for key in ("num_frames", "fps", "duration", "width", "height", "codec") if key not in known]
        if missing:
            raise SampleError(f"video metadata: {', '.join(missing)} missing; probe the video again.")
        for key, value in known.items():
            if not _CHECKS[key](value):
                shown = repr(value)
                raise SampleError(
                    f"video metadata: {key} is {shown if len(shown) < 80 else shown[:77] + '...'}, "
                    f"expected {_EXPECTED[key]}; probe the video again."
                )
        times = known.get("timestamps")
        info = cls(
            **{
                **known,
                "fps": float(known["fps"]),
                "duration": float(known["duration"]),
                "key_frames": tuple(known.get("key_frames", (0,))),
                "timestamps": None if times is None else tuple(float(value) for value in times),
            }
        )
        keys = info.key_frames
        if any(b <= a for a, b in pairwise(keys)) or (keys and keys[-1] >= info.num_frames):
            raise SampleError("video metadata: key_frames are not rising frame indices; probe the video again.")
        if info.timestamps is not None and (
            len(info.timestamps) != info.num_frames or any(b < a for a, b in pairwise(info.timestamps))
        ):
            raise SampleError(
                f"video metadata: timestamps are not {info.num_frames} rising times; probe the video again."
            )
        return info


def _is_count(value: Any, low: int = 0, high: int = 1 << 40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = 0.0, high: float = 1e12) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


_CHECKS = {
    "num_frames": lambda value: _is_count(value, 1),
    "fps": lambda value: _is_number(value) and 1e-6 < value < 1e6,
    "duration": _is_number,
    "width": lambda value: _is_count(value, 1, 1 << 16),
    "height": lambda value: _is_count(value, 1, 1 << 16),
    "codec": lambda value: isinstance(value, str),
    "rotation": lambda value: _is_count(value) and value in (0, 90, 180, 270),
    "key_frames": lambda value: isinstance(value, (list, tuple)) and all(map(_is_count, value)),
    "timestamps": lambda value: value is None or (isinstance(value, (list, tuple)) and all(map(_is_number, value))),
    "has_audio": lambda value: isinstance(value, bool),
    "pix_fmt": lambda value: isinstance(value, str),
}
_EXPECTED = {
    "num_frames": "an integer of at least 1",
    "fps": "a positive number",
    "duration": "a number of seconds",
    "width": "a number of pixels",
    "height": "a number of pixels",
    "codec": "a name",
    "rotation": "0, 90, 180 or 270",
    "key_frames": "a list of frame indices",
    "timestamps": "a list of seconds, or nothing",
    "has_audio": "true or false",
    "pix_fmt": "a name",
}


def probe_video(source: bytes | str | Path, *, name: str = "", timeout_s: float = 120.0) -> VideoInfo:
    """Look at a video: one pass over its packets, and its first key frame decoded for the size as displayed.

    Args:
        source: the bytes of the file, or its path.
        name: how errors call it; the path by default.
        timeout_s: give up after so long.
    Raises:
        DecodeError: there is no video in it, or none of which every frame could be had.
    """
    if isinstance(source, (str, Path)):
        name = name or str(source)
        try:
            with open(source, "rb") as file:
                return _probe(file, name, timeout_s)
        except OSError as err:
            raise DecodeError(f"{name}: cannot be read ({err.strerror or err}).") from err
    return _probe(io.BytesIO(source), name, timeout_s)


def _probe(source: BinaryIO, name: str, timeout_s: float) -> VideoInfo:
    from .packet_table import Deadline
    from .packets import read_packets

    deadline = Deadline(timeout_s, name)
    table = read_packets(source, name=name, deadline=deadline, keep=False)
    try:
        picture = table.first_picture(deadline)
    finally:
        table.close()
    return VideoInfo(
        num_frames=table.num_frames,
        fps=table.fps,
        duration=table.duration,
        width=picture.width,
        height=picture.height,
        codec=table.codec,
        rotation=picture.rotation,
        key_frames=tuple(table.key_frames.tolist()),
        timestamps=None if table.timestamps is None else tuple(table.timestamps.tolist()),
        has_audio=table.has_audio,
        pix_fmt=picture.pix_fmt,
    )
