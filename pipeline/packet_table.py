"""The packets of one file, laid out for decoding, and the small things that everything about them needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DecodeError
from .packet_marks import PacketMarks
from .packet_order import PacketOrder
from .packet_source import MAX_PIXELS, PacketSource
from .picture import orientation
from .probe import VideoInfo

MAX_SIDE = 16384
_TRIES = 32  # packets after a key packet that a decoder may want before it shows the frame


def label(name: str) -> str:
    """How error messages call a clip."""
    return name or "the video"


class Deadline:
    """A moment after which work on one clip is given up. `check` raises DecodeError once it has passed."""

    def __init__(self, seconds: float, name: str) -> None:
        self.seconds, self.name = seconds, name
        self.renew()

    def renew(self) -> None:
        """Count anew from now."""
        self.end = time.monotonic() + self.seconds

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
        source: gives the packets; their `pts` is the index of the frame that they show (None: shows none).
        order: which packet shows which frame.
        timestamps: float64 [T], seconds from the first frame; None where the rate is constant.
        hidden_by_edits: packets that an edit list hides.
        closed_keys: every key packet is one at which a decoder forgets all that was before.
        picture: how frames are shown, where that is known without decoding one.
        marks: where the file has its packets, if that was asked for.
    """

    name: str
    source: PacketSource
    order: PacketOrder
    fps: float
    duration: float
    timestamps: np.ndarray | None
    hidden_by_edits: int
    closed_keys: bool
    has_audio: bool
    format: str
    codec: str
    picture: Picture | None = None
    marks: PacketMarks | None = None

    @property
    def ordered(self) -> bool:
        """Whether the container says in which order its frames are shown."""
        return self.order.ordered

    @property
    def open_gop(self) -> bool:
        """Whether frames may refer to the group of pictures before their own."""
        return bool(self.order.leading.any())

    @property
    def num_packets(self) -> int:
        return len(self.order.rank)

    @property
    def num_frames(self) -> int:
        return len(self.order.position)

    @property
    def key_frames(self) -> np.ndarray:
        """int64 [K]: indices of the key frames in presentation order."""
        return self.order.key_frames

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

    def first_frame(self, deadline: Deadline) -> Any:
        """The first frame that is shown, as a PyAV frame.

        Raises:
            DecodeError: it does not decode.
        """
        import av

        context = self.source.codec()
        first = int(self.order.keys[0])
        some: list[int | None] = [*range(first, min(first + _TRIES, self.num_packets)), None]
        # A key frame that is the first to be shown is usually all that has to be decoded.
        for positions in ([[first, None]] if self.order.rank[first] == 0 else []) + [some]:
            try:
                for position in positions:
                    deadline.check()
                    for frame in context.decode(None if position is None else self.source.packet(position)):
                        check_size(frame.width, frame.height, self.name)
                        if frame.pts is not None:  # else hidden, by an edit list
                            return frame
            except (av.error.FFmpegError, ValueError) as err:
                raise DecodeError(f"{label(self.name)}: its first frame is damaged ({reason_of(err)}).") from err
            finally:
                context.flush_buffers()
        raise DecodeError(f"{label(self.name)}: its first frame does not come out of the decoder.")

    def picture_of(self, frame: Any) -> Picture:
        """How frames are shown, told by one of them. Raises DecodeError for slanted ones."""
        laid = orientation(frame, self.name, self.source.turn)
        size = (frame.height, frame.width) if laid.swap else (frame.width, frame.height)
        return Picture(*size, laid.rotation, laid.mirrored, frame.format.name)

    def close(self) -> None:
        self.source.close()
