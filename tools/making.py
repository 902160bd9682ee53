"""The work on one clip, in a worker process: its bytes, copied or encoded anew, and what is to be said of them."""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from framestream.pipeline.errors import ConfigError, SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.remote import Remote, disk_full
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import sample_members

from .clips import Clip
from .encode import encode, timing
from .encoders import version_of
from .inputs import Source
from .opened_video import opened_video
from .shard_options import Encoding, ShardOptions
from .source_file import IN_MEMORY, opened
from .stream_copy import stream_copy
from .urls import suffix

_BLOCK = 8 << 20  # bytes read at a time
PROBE_TIMEOUT_S = 3600.0  # the limit that matters is the worker's


@dataclass(frozen=True)
class ClipTask:
    """One clip to be made.

    Attributes:
        info: what probing said about its source.
        encode: encode it anew, as `encoding` says; else it is copied. `encoding.audio` counts either way.
        remote: how remote storage is spoken to.
    """

    clip: Clip
    info: VideoInfo
    encode: bool
    encoding: Encoding
    remote: Remote


@dataclass(frozen=True)
class WholeFile:
    """A local file that is a member of a sample, to the byte. `sha256` is that of the bytes that were looked at."""

    source: Source
    ext: str
    sha256: str


@dataclass(frozen=True)
class MadeClip:
    """A finished sample.

    Attributes:
        members: by extension.
        seconds: of video in it.
        whole: the member that is still missing. Whoever writes the shard reads it again (`copy_of`): sending it from
            process to process costs more.
    """

    members: dict[str, bytes]
    seconds: float
    whole: WholeFile | None = None

    def num_bytes(self) -> int:
        """Of the members that are here."""
        return sum(map(len, self.members.values()))


def encoder_version(options: ShardOptions) -> str:
    """What the bytes of an encoded clip depend on besides options and inputs. Raises ConfigError when this PyAV cannot
    encode what the options ask for."""
    return version_of(options.encoding.codec)


def make_clip(task: ClipTask) -> MadeClip:
    """Make one sample: the same bytes on every run.

    Raises:
        SampleError: the source does not give every frame of it, or not the frames that were planned.
    """
    clip = task.clip
    name = clip.source.source if clip.frames is None else f"{clip.source.source} ({clip.start:g} to {clip.end:g} s)"
    frames = clip.frames or (0, task.info.num_frames)
    planned, ext, known, whole = frames[1] - frames[0], "mp4", None, False
    data: bytes | memoryview
    sound = task.encoding.audio == "keep"
    if not task.encode and clip.frames is None and not (task.encoding.audio == "drop" and task.info.has_audio):
        with opened(clip.source, task.remote) as file:
            data, ext, known = file.data, suffix(clip.source.path)[1:], task.info
            whole = not is_url(clip.source.path)
    else:
        with opened_video(clip.source, task.info, task.remote) as video:
            if task.encode:
                planned = len(timing(task.info, frames, task.encoding.fps).indices)
                data = encode(video, frames, task.encoding, name, sound=sound)
            else:
                data, ext = stream_copy(video, frames, name, sound=sound)
    info = probe_video(data, name=name, packets=True, known=known, timeout_s=PROBE_TIMEOUT_S)
    if info.num_frames != planned:
        raise SampleError(f"{name}: the clip made of it has {info.num_frames} frames in place of {planned}")
    meta = {
        **info.to_json(),
        "source": clip.source.source,
        "clip_start": clip.start,
        "clip_end": clip.end,
        "text": clip.source.text or "",
        "user": dict(clip.source.user),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        members = sample_members(data, ext, meta, clip.source.text)
        if whole:
            del members[ext]
        sent = {member: bytes(content) for member, content in members.items()}
        return MadeClip(sent, info.duration, WholeFile(clip.source, ext, meta["sha256"]) if whole else None)
    except ConfigError as err:  # what one row of a manifest brought is no reason to end the run
        raise SampleError(f"{name}: {err}") from err


def copy_of(whole: WholeFile, scratch: Path) -> bytes | memoryview:
    """The bytes of a file, as they were looked at; those of a large one lie in the file `scratch`, until the next.

    The file itself is read and not mapped: a map of somebody's file ends the process when that is cut short.

    Raises:
        SampleError: the file has changed, or cannot be read any more.
    """
    name, size = whole.source.source, whole.source.size
    digest = hashlib.sha256()
    try:
        with open(whole.source.path, "rb") as file:
            if size <= IN_MEMORY:
                data: bytes | memoryview = file.read(size + 1)
                digest.update(data)
            else:
                scratch.unlink(missing_ok=True)  # what was mapped of the last one stays whole
                with open(scratch, "xb") as copy:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        copy.write(block)
                with open(scratch, "rb") as copy:
                    data = memoryview(mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as err:
        if err.filename == os.fspath(scratch) or disk_full(err):
            raise
        raise SampleError(f"{name} cannot be read ({err.strerror or err})") from err
    if digest.hexdigest() != whole.sha256:
        raise SampleError(f"{name} was written to while it was read: it was changed")
    return data
