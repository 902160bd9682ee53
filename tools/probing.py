"""The look at one source, in a worker process: what is in it, and by what it is told from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from framestream.pipeline.buffer_file import buffer_file
from framestream.pipeline.packet_table import Deadline
from framestream.pipeline.packets import read_packets
from framestream.pipeline.probe import VideoInfo, info_of
from framestream.pipeline.remote import Remote

from .inputs import Source
from .scene_cuts import scene_cuts
from .source_file import opened, read_text

PROBE_TIMEOUT_S = 3600.0  # the limit that matters is the worker's


@dataclass(frozen=True)
class ProbeTask:
    """One source to be looked at.

    Attributes:
        scene_threshold: also find where scenes begin, as `scene_cuts` does; None for not.
        remote: how remote storage is spoken to.
    """

    source: Source
    scene_threshold: float | None
    remote: Remote


@dataclass(frozen=True)
class Probed:
    """What is known of a source.

    Attributes:
        info: the video, without its packets' places.
        size: bytes of the file.
        content: equal for the same pictures: SHA-256, in hexadecimal, over the bytes of the video packets in the order
            of the file, the number of frames shown and how they are turned. A copy in another container (mp4, mov, mkv,
            webm), with other metadata or other sound is equal. Not so the same pictures coded anew, or in a transport
            stream or AVI, which frame H.264 and HEVC otherwise; a copy with a frame more is another, too.
        text: what is said about it.
        scenes: the first frame of every scene but the first, rising; empty where not asked for.
    """

    info: VideoInfo
    size: int
    content: str
    text: str | None
    scenes: tuple[int, ...]


def probe_source(task: ProbeTask) -> Probed:
    """Look at a source: one pass over its packets, its first frame, and all frames where scenes are asked for.

    Raises:
        SampleError: it cannot be read, or is no usable video.
    """
    source = task.source
    with opened(source, task.remote) as file:
        text = read_text(source, task.remote)
        data = memoryview(file.data)
        deadline = Deadline(PROBE_TIMEOUT_S, source.source)
        digest = hashlib.sha256()
        table = read_packets(buffer_file(data), name=source.source, deadline=deadline, keep=False, digest=digest)
        try:
            info, _ = info_of(table, deadline)
        finally:
            table.close()
        digest.update(f"{info.num_frames} {info.rotation}".encode())
        scenes: tuple[int, ...] = ()
        if task.scene_threshold is not None:
            scenes = scene_cuts(data, info, task.scene_threshold, name=source.source)
        return Probed(info, file.size, digest.hexdigest(), text, scenes)
