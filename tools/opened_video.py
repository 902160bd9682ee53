"""A source video, opened for its clips to be made: one look through the file, whatever number of clips follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np

from framestream.pipeline.buffer_file import buffer_file
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.frame_reader import FrameReader
from framestream.pipeline.indexed import with_index
from framestream.pipeline.packet_source import ContainerPackets
from framestream.pipeline.packet_table import Deadline, PacketTable
from framestream.pipeline.packets import read_packets
from framestream.pipeline.probe import VideoInfo, info_of
from framestream.pipeline.remote import Remote

from .clip_sound import SoundReader
from .inputs import Source
from .source_file import opened

OPEN_TIMEOUT_S = 3600.0  # for the look through a file, and from frame to frame; the limit that matters is the worker's


class OpenedVideo:
    """An open source: its frames, its packets with their times, and its sound.

    Where the kind of video allows it, packets are cut out of the file by an index, so that of a long video only what is
    looked at is in memory; else all packets are.

    Args:
        data: the file.
        info: what probing said; a file with other frames is refused.
        name: how errors call it.
    Attributes:
        decoder: gives the frames.
        table: the packets.
        ticks: int64 [P], when each packet's frame is shown, by the container's clock.
        time_base: seconds per tick.
        stream: the container's video stream, which says how the packets are coded.
    Raises:
        DecodeError: it is not the video that `info` describes, or cannot be read.
    """

    def __init__(self, data: memoryview, info: VideoInfo, name: str) -> None:
        self.info, self.name = info, name
        deadline = Deadline(OPEN_TIMEOUT_S, name)
        looked = read_packets(buffer_file(data), name=name, deadline=deadline, keep=False, data=data)
        try:
            frame = looked.first_frame(deadline)
            if info_of(looked, frame) != info:
                raise DecodeError(f"{name}: is not the video that it was when it was probed: it was changed.")
            indexed = with_index(data, info, looked, frame, deadline, check=False)
        except BaseException:
            looked.close()
            raise
        assert isinstance(looked.source, ContainerPackets)
        self._looked = looked.source
        self._looked.packets = []  # the decoder has its own
        self.stream = looked.source.stream
        self.ticks: np.ndarray = looked.order.shown_at
        self.time_base: Fraction = self.stream.time_base
        self.decoder = FrameReader(data, info=indexed, name=name, timeout_s=OPEN_TIMEOUT_S)
        self._data = data
        self._sound: SoundReader | None = None

    @property
    def table(self) -> PacketTable:
        return self.decoder.table

    @property
    def sound(self) -> SoundReader | None:
        """Its sound, None without. Raises SampleError where there is some that cannot be read."""
        if self._sound is None and self.info.has_audio:
            self._sound = SoundReader(self._data, self._begin(), self.name)
        return self._sound

    def _begin(self) -> Fraction:
        """When the first frame is shown, in seconds of the container's clock."""
        if not self.table.ordered:
            return (self.stream.start_time or 0) * self.time_base
        return int(self.ticks[self.table.order.position[0]]) * self.time_base

    def close(self) -> None:
        self.decoder.close()
        self._looked.close()
        if self._sound is not None:
            self._sound.close()


class _Last:
    """The source that was opened last: the clips of one source come one after the other."""

    def __init__(self) -> None:
        self.video: OpenedVideo | None = None
        self._place: tuple[str, int, str] = ("", -1, "")

    def drop(self) -> None:
        if self.video is not None:
            self.video.close()
        self.video = None

    def get(self, source: Source, info: VideoInfo, remote: Remote) -> OpenedVideo:
        place = (source.path, source.size, source.version)
        if self.video is None or place != self._place or self.video.info != info:
            self.drop()
            with opened(source, remote) as file:
                self.video = OpenedVideo(memoryview(file.data), info, source.source)
            self._place = place
        return self.video


_last = _Last()  # of this process


@contextmanager
def opened_video(source: Source, info: VideoInfo, remote: Remote) -> Iterator[OpenedVideo]:
    """An open source; the last one of this process, where it is the same. After an error it is opened anew.

    Raises:
        SampleError: as `opened` does, or it is not the video that `info` describes.
    """
    try:
        yield _last.get(source, info, remote)
    except BaseException:
        _last.drop()
        raise
