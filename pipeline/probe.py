"""What there is to know about a video before its frames are wanted."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .errors import DecodeError, SampleError
from .video_index import VideoIndex

if TYPE_CHECKING:
    from .packet_table import PacketTable

MAX_SECONDS = 10 * 24 * 3600  # of a video


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
        packets: where the packets lie, which spares a decoder the look at the container; None where it has to look.
            It is not compared: the same video in another file is the same video.
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
    packets: VideoIndex | None = field(default=None, compare=False, repr=False)

    def times(self) -> np.ndarray:
        """Presentation times in seconds from the first frame: float64 [num_frames]."""
        if self.timestamps is None:
            return np.arange(self.num_frames, dtype=np.float64) / self.fps
        return np.asarray(self.timestamps, dtype=np.float64)

    def checksum(self) -> int:
        """CRC-32 of everything but the packets."""
        record = replace(self, packets=None).to_json()
        return zlib.crc32(json.dumps(record, sort_keys=True).encode())

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON can hold them. `timestamps` and `packets` are left out where they are None."""
        record = {each.name: getattr(self, each.name) for each in fields(self)}
        record["key_frames"] = list(self.key_frames)
        record["timestamps"] = None if self.timestamps is None else list(self.timestamps)
        record["packets"] = None if self.packets is None else self.packets.to_json()
        return {name: value for name, value in record.items() if value is not None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> VideoInfo:
        """Read what `to_json` wrote; other keys are left alone, and `packets` that are damaged or do not fit the rest
        are passed over: the container says the same.

        Raises:
            SampleError: a field is missing, of the wrong type, or impossible.
        """
        if not isinstance(record, dict):
            raise SampleError(f"video metadata: expected a JSON object, got {type(record).__name__}.")
        known = {each.name: record[each.name] for each in fields(cls) if each.name in record}
        packets = known.pop("packets", None)
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
        if info.num_frames / info.fps > MAX_SECONDS:
            raise SampleError(
                f"video metadata: {info.num_frames} frames at {info.fps:g} a second take longer than {MAX_SECONDS} s; "
                "probe the video again."
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
        return info if packets is None else info._with(packets)

    def _with(self, packets: Any) -> VideoInfo:
        try:
            index = VideoIndex.from_json(packets)
        except SampleError:
            return self
        # Rates and times are not seen in packets: an index stands for them, too, or it is not believed.
        shown = len(index) - int(index.hidden.sum())
        return replace(self, packets=index) if index.facts == self.checksum() and shown == self.num_frames else self


def _is_count(value: Any, low: int = 0, high: int = 1 << 40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = 0.0, high: float = 1e12) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


_CHECKS = {
    "num_frames": lambda value: _is_count(value, 1),
    "fps": lambda value: _is_number(value) and 1e-6 < value < 1e6,
    "duration": lambda value: _is_number(value, 0, MAX_SECONDS),
    "width": lambda value: _is_count(value, 1, 1 << 16),
    "height": lambda value: _is_count(value, 1, 1 << 16),
    "codec": lambda value: isinstance(value, str),
    "rotation": lambda value: _is_count(value) and value in (0, 90, 180, 270),
    "key_frames": lambda value: isinstance(value, (list, tuple)) and all(map(_is_count, value)),
    "timestamps": lambda value: (
        value is None or (isinstance(value, (list, tuple)) and all(_is_number(time, 0, MAX_SECONDS) for time in value))
    ),
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


def probe_video(
    source: bytes | memoryview | str | Path,
    *,
    name: str = "",
    timeout_s: float = 120.0,
    packets: bool = False,
    known: VideoInfo | None = None,
    compare: bool = True,
) -> VideoInfo:
    """Look at a video: one pass over its packets, and its first key frame decoded for the size as displayed.

    Args:
        source: the bytes of the file, or its path.
        name: how errors call it; the path by default.
        timeout_s: give up after so long.
        packets: find out where its packets lie, too, so that decoding need not look again; reads the whole file.
        known: what an earlier look at the same file found. Another video is refused.
        compare: with `packets`, decode the first picture by the places that were found as well, and compare: not needed
            of files made here, or of known ones.
    Raises:
        DecodeError: there is no video in it, none of which every frame could be had, or another one than is known.
    """
    if isinstance(source, (str, Path)):
        name = name or str(source)
        try:
            with open(source, "rb") as file:
                return _probe(file.read() if packets else file, name, timeout_s, packets, known, compare)
        except OSError as err:
            raise DecodeError(f"{name}: cannot be read ({err.strerror or err}).") from err
    return _probe(source, name, timeout_s, packets, known, compare)


def _probe(
    source: bytes | memoryview | BinaryIO,
    name: str,
    timeout_s: float,
    packets: bool,
    known: VideoInfo | None,
    compare: bool,
) -> VideoInfo:
    from .buffer_file import buffer_file
    from .indexed import with_index
    from .packet_table import Deadline
    from .packets import read_packets

    deadline = Deadline(timeout_s, name)
    data = source if isinstance(source, (bytes, memoryview)) else None
    file = source if not isinstance(source, (bytes, memoryview)) else buffer_file(source)
    table = read_packets(file, name=name, deadline=deadline, keep=False, data=data if packets else None, quick=True)
    try:
        frame = table.first_frame(deadline)
        info = info_of(table, frame)
        if known not in (None, info):
            raise DecodeError(
                f"{name or 'the video'}: is not the video that it was when it was probed: it was changed."
            )
        if data is None or not packets:
            return info
        return with_index(data, info, table, frame, deadline, check=compare and known is None)
    finally:
        table.close()


def info_of(table: PacketTable, frame: Any) -> VideoInfo:
    """What a table of packets, and the first frame that comes of them (of PyAV's), say of a video.

    Raises:
        DecodeError: it is to be shown at an angle.
    """
    picture = table.picture_of(frame)
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
