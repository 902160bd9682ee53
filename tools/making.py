"""The work on one clip, in a worker process: its bytes, copied or encoded anew, and what is to be said of them."""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
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
from .source_file import IN_MEMORY, check_listed, opened
from .stream_copy import stream_copy
from .trees import local_version
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
    """A local file that is a member of a sample, to the byte.

    Attributes:
        sha256: of the bytes that were looked at; "" where an index in `info` says what its packets are.
        num_bytes: of the file.
    """

    clip: Clip
    info: VideoInfo
    ext: str
    sha256: str
    num_bytes: int

    @property
    def source(self) -> Source:
        return self.clip.source


@dataclass(frozen=True)
class MadeClip:
    """A finished sample.

    Attributes:
        members: by extension; none with `whole`.
        seconds: of video in it.
        whole: of which all members are made by whoever writes the shard (`members_of`): sending a file from process to
            process costs more than reading it again.
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
    name = _name(clip)
    frames = clip.frames or (0, task.info.num_frames)
    planned, ext, known = frames[1] - frames[0], "mp4", None
    data: bytes | memoryview
    sound = task.encoding.audio == "keep"
    if not task.encode and clip.frames is None and not (task.encoding.audio == "drop" and task.info.has_audio):
        ext, known = suffix(clip.source.path)[1:], task.info
        whole = not is_url(clip.source.path)
        if whole and task.info.packets is not None:  # all is known, and compared when it is copied
            return MadeClip({}, task.info.duration, WholeFile(clip, task.info, ext, "", task.info.packets.num_bytes))
        with opened(clip.source, task.remote) as file:
            data = file.data
            if whole:
                info = probe_video(data, name=name, packets=True, known=known, timeout_s=PROBE_TIMEOUT_S)
                sha256 = hashlib.sha256(data).hexdigest() if info.packets is None else ""
                return MadeClip({}, info.duration, WholeFile(clip, info, ext, sha256, len(data)))
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
    members = _members(clip, info, ext, data, hashlib.sha256(data).hexdigest())
    return MadeClip({member: bytes(content) for member, content in members.items()}, info.duration)


def _name(clip: Clip) -> str:
    """How errors call it."""
    name = clip.source.source
    return name if clip.frames is None else f"{name} ({clip.start:g} to {clip.end:g} s)"


def _members(
    clip: Clip, info: VideoInfo, ext: str, data: bytes | memoryview, sha256: str
) -> dict[str, bytes | memoryview]:
    meta = {
        **info.to_json(),
        "source": clip.source.source,
        "clip_start": clip.start,
        "clip_end": clip.end,
        "text": clip.source.text or "",
        "user": dict(clip.source.user),
        "sha256": sha256,
    }
    try:
        return sample_members(data, ext, meta, clip.source.text)
    except ConfigError as err:  # what one row of a manifest brought is no reason to end the run
        raise SampleError(f"{_name(clip)}: {err}") from err


def members_of(whole: WholeFile, scratch: Path) -> dict[str, bytes | memoryview]:
    """The members of a sample that is a whole file; the bytes of a large one lie in the file `scratch`, until the next.

    Raises:
        SampleError: the file has changed since it was looked at, or cannot be read any more.
    """
    data, sha256 = _copy(whole.source, scratch)
    same = whole.sha256 == sha256 if whole.sha256 else _has_packets(data, whole.info)
    if not same:
        raise SampleError(f"{whole.source.source} was written to while it was read: it was changed")
    return _members(whole.clip, whole.info, whole.ext, data, sha256)


def _has_packets(data: bytes | memoryview, info: VideoInfo) -> bool:
    """Whether every packet is where the index says, and what it says."""
    index = info.packets
    if index is None or index.num_bytes != len(data):
        return False
    view = memoryview(data)
    return all(
        zlib.crc32(view[start : start + size]) == crc
        for start, size, crc in zip(index.offset.tolist(), index.size.tolist(), index.crc.tolist(), strict=True)
    )


def _copy(source: Source, scratch: Path) -> tuple[bytes | memoryview, str]:
    """The bytes of a file, as it was listed, and their SHA-256.

    The file itself is read and not mapped: a map of somebody's file ends the process when that is cut short.
    """
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as file:
            facts = os.fstat(file.fileno())
            check_listed(source, facts.st_size, local_version(facts))
            if facts.st_size <= IN_MEMORY:
                data: bytes | memoryview = file.read(facts.st_size + 1)
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
        raise SampleError(f"{source.source} cannot be read ({err.strerror or err})") from err
    return data, digest.hexdigest()
