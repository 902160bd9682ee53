"""The work on one clip, in a worker process: its bytes, copied or encoded anew, and what is to be said of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from framestream.pipeline.errors import ConfigError, SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import StreamedMember, described

from .clips import Clip
from .encode import encode, timing
from .encoders import version_of
from .opened_video import opened_video
from .shard_options import Encoding, ShardOptions
from .source_file import opened
from .stream_copy import stream_copy
from .urls import suffix
from .whole_file import WholeFile

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

    @property
    def is_whole(self) -> bool:
        """Whether the file becomes the sample's video as it is."""
        drops = self.encoding.audio == "drop" and self.info.has_audio
        return not self.encode and self.clip.frames is None and not drops

    @property
    def is_known(self) -> bool:
        """Whether it is a local file that becomes the video as it is, and probing found out all to be said of it."""
        return self.is_whole and bool(self.clip.source.sha256) and not is_url(self.clip.source.path)


@dataclass(frozen=True)
class MadeClip:
    """A finished sample.

    Attributes:
        members: by extension. The video may be a file that whoever writes the shard reads: sending it from process to
            process costs more than reading it again.
        seconds: of video in it.
    """

    members: Mapping[str, bytes | StreamedMember]
    seconds: float

    def num_bytes(self) -> int:
        """Of the members that are here."""
        return sum(len(member) for member in self.members.values() if isinstance(member, bytes))


def encoder_version(options: ShardOptions) -> str:
    """What the bytes of an encoded clip depend on besides options and inputs. Raises ConfigError when this PyAV cannot
    encode what the options ask for."""
    return version_of(options.encoding.codec)


def known_clip(task: ClipTask) -> MadeClip:
    """The sample of a task of which all is known.

    Raises:
        SampleError: what its input brings along cannot be written down.
    """
    source = task.clip.source
    return _whole(task.clip, task.info, WholeFile(source, source.size, source.sha256))


def _whole(clip: Clip, info: VideoInfo, file: WholeFile) -> MadeClip:
    return MadeClip(_members(clip, info, suffix(file.source.path)[1:], file, file.sha256), info.duration)


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
    if task.is_whole:
        if task.is_known:
            return known_clip(task)
        ext, known = suffix(clip.source.path)[1:], task.info
        with opened(clip.source, task.remote) as file:
            data = file.data
            if not is_url(clip.source.path):
                info = probe_video(data, name=name, packets=True, known=known, timeout_s=PROBE_TIMEOUT_S)
                return _whole(clip, info, WholeFile(clip.source, len(data), hashlib.sha256(data).hexdigest()))
    else:
        with opened_video(clip.source, task.info, task.remote) as video:
            if task.encode:
                planned = len(timing(task.info, frames, task.encoding.fps).indices)
                data = encode(video, frames, task.encoding, name, sound=sound)
            else:
                data, ext = stream_copy(video, frames, name, sound=sound)
    info = probe_video(data, name=name, packets=True, known=known, compare=False, timeout_s=PROBE_TIMEOUT_S)
    if info.num_frames != planned:
        raise SampleError(f"{name}: the clip made of it has {info.num_frames} frames in place of {planned}")
    return MadeClip(_members(clip, info, ext, bytes(data), hashlib.sha256(data).hexdigest()), info.duration)


def _name(clip: Clip) -> str:
    """How errors call it."""
    name = clip.source.source
    return name if clip.frames is None else f"{name} ({clip.start:g} to {clip.end:g} s)"


def _members(
    clip: Clip, info: VideoInfo, ext: str, video: bytes | WholeFile, sha256: str
) -> dict[str, bytes | StreamedMember]:
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
        return {ext: video, **described(ext, meta, clip.source.text)}
    except ConfigError as err:  # what one row of a manifest brought is no reason to end the run
        raise SampleError(f"{_name(clip)}: {err}") from err
