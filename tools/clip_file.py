"""A clip's file in the making, in memory: pictures and sound, in the order of their times."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from types import TracebackType
from typing import Any

from .clip_sound import IN_MP4, ClipSound, SoundReader

FORMATS = {"mp4": "mp4", "mkv": "matroska"}  # extension to FFmpeg's name


class ClipFile:
    """Write a video stream of `container` through `mux`; the sound comes in between by itself.

    Args:
        ext: extension, of `FORMATS`.
    """

    def __init__(self, ext: str) -> None:
        import av

        self._buffer = io.BytesIO()
        # bitexact: no version, no date, no random numbers.
        self.container: Any = av.open(self._buffer, "w", format=FORMATS[ext], options={"fflags": "+bitexact"})
        self._ext = ext
        self._sound: ClipSound | None = None

    def add_sound(self, reader: SoundReader | None, stretch: tuple[Fraction, Fraction]) -> None:
        """Add the sound of a stretch, where there is sound; after the video stream and before the first packet."""
        if reader is not None:
            copied = IN_MP4 if self._ext == "mp4" else (reader.codec,)
            self._sound = ClipSound(self.container, reader, *stretch, copied)

    def mux(self, packets: Iterable[Any]) -> None:
        """Write packets of the video stream, rising in time of decoding."""
        for packet in packets:
            if self._sound is not None:
                for other in self._sound.before(packet.dts * packet.time_base):
                    self.container.mux(other)
            self.container.mux(packet)

    def finish(self) -> bytes:
        """The bytes of the file."""
        if self._sound is not None:
            for other in self._sound.before(None):
                self.container.mux(other)
        self.container.close()
        return self._buffer.getvalue()

    def __enter__(self) -> ClipFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # what was begun is given up; writing its end would only hide the reason
            self._buffer.close()
