"""The look at one source, in a worker process: what is in it, and by what it is told from others."""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np

from framestream.pipeline.buffer_file import buffer_file
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.indexed import with_index
from framestream.pipeline.packet_table import Deadline
from framestream.pipeline.packets import read_packets
from framestream.pipeline.picture_head import head_frame
from framestream.pipeline.probe import VideoInfo, info_of
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url

from .inputs import Source
from .opened_video import OpenedVideo
from .scene_cuts import scene_cuts
from .shard_options import Decode, ShardOptions
from .source_file import opened, read_text

PROBE_TIMEOUT_S = 3600.0  # the limit that matters is the worker's
_ALIKE = 1.2  # the factor between rates that are told apart; the usual ones lie far from where it rounds
_PACE = 0.05  # of the length, in steps of which it is told when a quarter, a half and three of the frames are shown


@dataclass(frozen=True)
class ProbeTask:
    """One source to be looked at.

    Attributes:
        scene_threshold: also find where scenes begin, as `scene_cuts` does; None for not.
        remote: how remote storage is spoken to.
        exact: `content` is made of all bytes of the packets, for dropping duplicates, and not of their checksums alone.
        whole: it is copied whole: also find out where its packets lie, and its checksum.
        decode: as in `ShardOptions`.
    """

    source: Source
    scene_threshold: float | None
    remote: Remote
    exact: bool = True
    whole: bool = False
    decode: Decode = "first"


@dataclass(frozen=True)
class Probed:
    """What is known of a source.

    Attributes:
        info: the video; with its packets' places where these were asked for, and an index can stand for the container.
        size: bytes of the file.
        content: equal for the same pictures: SHA-256, in hexadecimal, over the bytes of the video packets in the order
            of the file (or their lengths and CRC-32), which of them shows which frame, the codec, the pixel format, the
            size as displayed, how pictures are turned and mirrored and, roughly, when they are shown. A copy in another
            container (mp4, mov, mkv, webm), with other metadata or other sound is equal. Not so the same pictures coded
            anew, or in a transport stream or AVI, which frame H.264 and HEVC otherwise; a copy that shows a frame more,
            or another part of the same packets, is another, too. Copies whose frames come at another pace are told
            apart where the rates are a tenth apart, or frames are moved by a fortieth of the length.
        text: what is said about it.
        scenes: the first frame of every scene but the first, rising; empty where not asked for.
        sha256: of all bytes of the file, in hexadecimal, where it is copied whole; "" where that is not known.
    """

    info: VideoInfo
    size: int
    content: str
    text: str | None
    scenes: tuple[int, ...]
    sha256: str = ""

    def in_short(self) -> Probed:
        """The same without the places of the packets, which take room; whoever copies the file looks at it again."""
        return replace(self, info=replace(self.info, packets=None), sha256="")


def probe_task(source: Source, options: ShardOptions, remote: Remote) -> ProbeTask:
    """What is to be found out of a source for these options."""
    part = options.cutting.cuts or source.start is not None or source.end is not None
    copied = not options.encodes(part) and options.encoding.audio != "drop"
    return ProbeTask(
        source,
        options.cutting.scene_threshold,
        remote,
        exact=options.drop_duplicates,
        whole=copied and not part and not is_url(source.path),
        decode=options.decode,
    )


def probe_source(task: ProbeTask) -> Probed:
    """Look at a source: one pass over its packets, what is to be decoded of it, and all frames where scenes are asked
    for.

    Raises:
        SampleError: it cannot be read, or is no usable video.
    """
    source = task.source
    with opened(source, task.remote) as file:
        text = read_text(source, task.remote)
        try:
            info, content = _look(file.data, task, heads=task.decode == "none")
        except DecodeError:
            if task.decode != "none":
                raise
            info, content = _look(file.data, task, heads=False)  # what is wrong with it may be its head alone
        data, plain = memoryview(file.data), replace(info, packets=None)
        scenes: tuple[int, ...] = ()
        if task.scene_threshold is not None:  # which decodes all
            scenes = scene_cuts(data, plain, task.scene_threshold, name=source.source)
        elif task.decode == "all":
            _decode_all(data, plain, source.source)
        sha256 = hashlib.sha256(file.data).hexdigest() if task.whole else ""
        return Probed(info, file.size, content, text, scenes, sha256)


def _look(data: bytes | memoryview, task: ProbeTask, *, heads: bool) -> tuple[VideoInfo, str]:
    """What a file says of its video, and by what its pictures are told from others. `heads` decodes no more of the
    first picture than its head, where that tells all that is asked."""
    name = task.source.source
    deadline = Deadline(PROBE_TIMEOUT_S, name)
    digest = hashlib.sha256()
    table = read_packets(
        buffer_file(data),
        name=name,
        deadline=deadline,
        keep=False,
        data=data if task.whole or not task.exact else None,
        quick=True,
        digest=digest if task.exact else None,
    )
    try:
        frame = head_frame(table) if heads else None
        heads = frame is not None
        frame = frame or table.first_frame(deadline)
        info = info_of(table, frame)
        mirrored = table.picture_of(frame).mirrored
        if task.whole:
            info = with_index(data, info, table, frame, deadline, check=False, head=heads)
        if not task.exact and table.marks is not None:
            sizes, checksums = table.marks.size, table.marks.crc
            digest.update(" ".join(f"{size} {crc}" for size, crc in zip(sizes, checksums, strict=True)).encode())
        digest.update(table.order.rank.astype("<i8").tobytes())
    finally:
        table.close()
    digest.update(_shown(info, mirrored).encode())
    return info, digest.hexdigest()


def _decode_all(data: memoryview, info: VideoInfo, name: str) -> None:
    """Raises DecodeError where a frame does not decode, or not as all others. One frame is in memory at a time."""
    video = OpenedVideo(data, info, name)
    try:
        with contextlib.closing(video.decoder.pictures(range(info.num_frames))) as pictures:
            for _ in pictures:
                pass
    finally:
        video.close()


def _shown(info: VideoInfo, mirrored: bool) -> str:
    """What decides, besides the packets and their order, what is seen. Containers round times: rates are only told
    apart roughly, and so is whether the video is slower in one part than in another."""
    speed = round(math.log(info.fps / 30, _ALIKE))
    facts = (info.codec, info.pix_fmt, info.width, info.height, info.num_frames, info.rotation, int(mirrored), speed)
    return " ".join(map(str, (*facts, *_pace(info.times()))))


def _pace(times: np.ndarray) -> list[int]:
    """How much later than at an even pace the frames at the quarters come, in steps of `_PACE` of the length.

    An even pace gives 0, in the middle of what is rounded to it, whatever the clock of the container.
    """
    last = len(times) - 1
    if times[-1] <= 0:
        return [0, 0, 0]
    quarters = [last * quarter // 4 for quarter in (1, 2, 3)]
    return [round(float(times[at] / times[-1] - at / last) / _PACE) for at in quarters]
