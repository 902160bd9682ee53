"""The packets of one file, laid out for decoding, and the small things that everything about them needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import DecodeError
from .picture import orientation
from .probe import VideoInfo

MAX_SIDE = 16384
MAX_PIXELS = 1 << 26
_TRIES = 32  # packets after a key packet that a decoder may want before it shows the frame


def label(name: str) -> str:
    """How error messages call a clip."""
    return name or "the video"


class Deadline:
    """A moment after which work on one clip is given up. `check` raises DecodeError once it has passed."""

    def __init__(self, seconds: float, name: str) -> None:
        self.seconds, self.name = seconds, name
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise DecodeError(f"{label(self.name)}: decoding took longer than {self.seconds:g} s; gave up.")


def reason_of(err: BaseException) -> str:
    return getattr(err, "strerror", None) or str(err) or type(err).__name__


def check_size(width: int, height: int, name: str) -> None:
    """Raise DecodeError for picture sizes that no clip has."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise DecodeError(
            f"{label(name)}: its header claims a picture of {width} x {height}; "
            f"expected 1 to {MAX_SIDE} a side and at most {MAX_PIXELS} pixels."
        )


def open_codec(stream: Any) -> Any:
    """The stream's decoder: one thread, and an error rather than a concealed picture wherever it notices one."""
    context = stream.codec_context
    if not context.is_open:
        context.thread_count = 1
        context.thread_type = "NONE"
        context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return context


@dataclass(frozen=True)
class Picture:
    """How frames are shown: size in pixels after rotation, degrees clockwise to turn them, whether to mirror
    them as well, stored pixel format."""

    width: int
    height: int
    rotation: int
    mirrored: bool
    pix_fmt: str


@dataclass
class PacketTable:
    """The video packets of one file in decoding order, and which frame each of them shows.

    Attributes:
        packets: the packets; their `pts` is replaced by the index of the frame that they show (None: shows none).
        rank: int64 [P], index of the frame that each packet shows in presentation order, or -1.
        position: int64 [T], the inverse: which packet shows frame t.
        start: int64 [T], the key packet from which decoding has to begin to get frame t.
        keys: int64 [K], key packets.
        ordered: False where the container does not say in which order its frames are shown (H.264 in AVI). Then
            `rank` counts packets, and only decoding from the first packet on tells which frame is which.
        timestamps: float64 [T], seconds from the first frame; None where the rate is constant.
        hidden_by_edits: packets that an edit list hides.
        leading: bool [P], packets shown before the key packet that they follow: there are some in open GOPs.
        closed_keys: every key packet is one at which a decoder forgets all that was before.
    """

    name: str
    container: Any
    stream: Any
    packets: list[Any]
    rank: np.ndarray
    position: np.ndarray
    start: np.ndarray
    keys: np.ndarray
    ordered: bool
    fps: float
    duration: float
    timestamps: np.ndarray | None
    hidden_by_edits: int
    leading: np.ndarray
    closed_keys: bool
    has_audio: bool
    format: str
    codec: str = field(default="")

    @property
    def open_gop(self) -> bool:
        """Whether frames may refer to the group of pictures before their own."""
        return bool(self.leading.any())

    @property
    def num_frames(self) -> int:
        return len(self.position)

    @property
    def key_frames(self) -> np.ndarray:
        """int64 [K]: indices of the key frames in presentation order."""
        if not self.ordered:
            return np.zeros(1, dtype=np.int64)
        shown = self.rank[self.keys]
        return np.sort(shown[shown >= 0])

    def times(self) -> np.ndarray:
        """float64 [T]: presentation times in seconds from the first frame."""
        if self.timestamps is None:
            return np.arange(self.num_frames, dtype=np.float64) / self.fps
        return self.timestamps

    def expect(self, info: VideoInfo | None) -> None:
        """Raise DecodeError where the video no longer has the frames, or the times, that `info` says it has."""
        if info is None:
            return
        if info.num_frames != self.num_frames:
            raise DecodeError(
                f"{label(self.name)}: has {self.num_frames} frames, but its metadata says {info.num_frames}; "
                "it is cut, damaged, or described by the metadata of another video."
            )
        # A rate alone may be rounded (29.97 to 30); where every time is told, it is to be that frame's.
        slack = 0.5 / self.fps if info.timestamps else max(0.5 / self.fps, 0.02 * self.duration)
        apart = np.abs(info.times() - self.times())
        if apart.max() > slack:
            raise DecodeError(
                f"{label(self.name)}: shows frame {apart.argmax()} {apart.max():.3g} s from where its metadata says; "
                "it is damaged, or described by the metadata of another video."
            )

    def first_picture(self, deadline: Deadline) -> Picture:
        """Decode the first key frame alone and say how it is shown.

        Raises:
            DecodeError: it does not decode.
        """
        import av

        context = open_codec(self.stream)
        try:
            for packet in [*self.packets[self.keys[0] :][:_TRIES], None]:
                deadline.check()
                for frame in context.decode(packet):
                    check_size(frame.width, frame.height, self.name)
                    laid = orientation(frame, self.name)
                    size = (frame.height, frame.width) if laid.swap else (frame.width, frame.height)
                    return Picture(*size, laid.rotation, laid.mirrored, frame.format.name)
        except (av.error.FFmpegError, ValueError) as err:
            raise DecodeError(f"{label(self.name)}: its first frame is damaged ({reason_of(err)}).") from err
        finally:
            context.flush_buffers()
        raise DecodeError(f"{label(self.name)}: its first frame does not come out of the decoder.")

    def close(self) -> None:
        self.packets = []
        self.container.close()
