"""One sample as it lies in a shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .cached import cached_property
from .errors import ConfigError, SampleError
from .shard_index import SAFE_EXTENSIONS, VIDEO_EXTENSIONS, video_member

if TYPE_CHECKING:
    from .probe import VideoInfo
    from .tar_member import StoredMember


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard: members by extension (without dot), undecoded.

    Attributes:
        key: the sample's key.
        shard: path or URL of its shard.
        members: extension -> bytes, of the extensions that were asked for; a video may not have been read yet.
        cached: whether a remote shard was at hand when it was read; False where the read waited for its download,
            None for local shards.
    """

    key: str
    shard: str
    members: Mapping[str, bytes | StoredMember] = field(repr=False)
    cached: bool | None = field(default=None, repr=False, compare=False)

    @property
    def video_ext(self) -> str:
        """Extension of the video member. Raises SampleError when there is none."""
        ext = video_member(self.members)
        if ext is None:
            raise SampleError(
                f"sample {self.key!r} of {self.shard} has no video, only {sorted(self.members) or 'nothing'}; "
                f"videos are {', '.join(VIDEO_EXTENSIONS)}"
            )
        return ext

    @property
    def video(self) -> bytes:
        """The encoded video. Raises SampleError when there is none, or where it cannot be read."""
        video = self.members[self.video_ext]
        return video if isinstance(video, bytes) else video.read()

    @property
    def stored_video(self) -> StoredMember | None:
        """The encoded video where it has not been read, else None. Raises SampleError when there is none."""
        video = self.members[self.video_ext]
        return None if isinstance(video, bytes) else video

    def read(self) -> RawSample:
        """The sample with all of its video read. Raises SampleError as `video`."""
        if self.stored_video is None:
            return self
        return replace(self, members={**self.members, self.video_ext: self.video})

    def content(self, ext: str) -> bytes:
        """A member's bytes. Raises KeyError where there is none, SampleError where it cannot be read."""
        member = self.members[ext]
        return member if isinstance(member, bytes) else member.read()

    @cached_property
    def _meta(self) -> tuple[dict[str, Any], str]:
        if "json" not in self.members:
            return {}, f"sample {self.key!r} of {self.shard} has no .json"
        try:
            meta = json.loads(self.content("json"))
        except (ValueError, RecursionError) as err:
            return {}, f"the .json of sample {self.key!r} of {self.shard} is damaged ({err})"
        if not isinstance(meta, dict):
            return {}, f"the .json of sample {self.key!r} of {self.shard} holds no object but a {type(meta).__name__}"
        return meta, ""

    @property
    def meta(self) -> dict[str, Any]:
        """The parsed .json; {} when it is missing or damaged, which `meta_error` then tells."""
        return self._meta[0]

    @property
    def meta_error(self) -> str:
        """Why `meta` is empty though it should not be; "" when the .json was read."""
        return self._meta[1]

    @property
    def text(self) -> str:
        """The .txt (UTF-8, stripped), else the JSON's `text`, else ""."""
        if "txt" in self.members:
            return self.content("txt").decode("utf-8", "replace").strip()
        text = self.meta.get("text")
        return text if isinstance(text, str) else ""

    @cached_property
    def info(self) -> VideoInfo | None:
        """What the .json says of the video; None when it says too little, so that the video has to be probed."""
        from .probe import VideoInfo

        try:
            return VideoInfo.from_json(self.meta)
        except SampleError:
            return None

    @classmethod
    def from_webdataset(cls, sample: Mapping[str, Any]) -> RawSample:
        """From the dict that a plain WebDataset pipeline yields before any `.decode()`.

        Raises:
            ConfigError: the dict has no `__key__`, or a member that we read was decoded already.
        """
        if "__key__" not in sample:
            raise ConfigError(f"this is no webdataset sample: it has no '__key__', only {sorted(map(str, sample))[:8]}")
        key = str(sample["__key__"])
        members = {}
        for name, value in sample.items():
            ext = str(name).lower()
            if ext.startswith("__") or ext.rpartition(".")[2] not in SAFE_EXTENSIONS:
                continue
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise ConfigError(
                    f"member {name!r} of webdataset sample {key!r} is a {type(value).__name__}, not bytes: "
                    f"put this step before any .decode()"
                )
            members[ext] = bytes(value)
        return cls(key, str(sample.get("__url__", "")), members)


def sample_from_members(key: str, shard: str, members: Mapping[str, bytes]) -> RawSample:
    """A sample from loose bytes: extension without dot -> bytes."""
    return RawSample(key, shard, dict(members))
