"""Everything that decides the bytes of a shard set, apart from the inputs: options of `framestream shard`, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from framestream.pipeline.errors import ConfigError

MIN_SECONDS = 0.01  # of a clip, and from one to the next: below that there are more clips than frames

Transcode = Literal["auto", "always", "never"]
Codec = Literal["h264", "hevc", "vp9", "av1"]
Audio = Literal["auto", "keep", "drop"]
Decode = Literal["none", "first", "all"]


@dataclass(frozen=True)
class Cutting:
    """How sources become clips, and which of a source's clips are held out.

    Attributes:
        clip_seconds: length of a clip; None takes every source (or every scene of it) as one.
        stride_seconds: from one clip's beginning to the next; None for `clip_seconds`.
        scene_threshold: also cut where the picture changes by more than this share, 0 to 1; None for no such cuts.
        val_tail: share of each video, at its end, that is held out; rows that take parts of it do not move that border.
        val_gap: seconds before the held-out part that are used for nothing.
    """

    clip_seconds: float | None = None
    stride_seconds: float | None = None
    scene_threshold: float | None = None
    val_tail: float = 0.0
    val_gap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "stride_seconds"):
            value = getattr(self, name)
            if value is not None and not MIN_SECONDS <= value < float("inf"):
                name = name.replace("stride", "clip_stride")
                raise ConfigError(f"{name} is {value}, it has to be at least {MIN_SECONDS}")
        if self.clip_seconds is None and (self.stride_seconds is not None or self.val_tail or self.val_gap):
            raise ConfigError("clip_stride_seconds, val_tail and val_gap cut videos into clips: set clip_seconds too")
        if self.scene_threshold is not None and not 0.0 < self.scene_threshold < 1.0:
            raise ConfigError(f"scene_threshold is {self.scene_threshold}, it has to be between 0 and 1; try 0.3")
        if not 0.0 <= self.val_tail < 1.0 or not 0.0 <= self.val_gap < float("inf"):
            raise ConfigError(
                f"val_tail has to be from 0 to below 1 and val_gap at least 0 s, got {self.val_tail} and {self.val_gap}"
            )
        if self.val_gap and not self.val_tail:
            raise ConfigError("val_gap is the distance to the held-out part: set val_tail too")

    @property
    def cuts(self) -> bool:
        """Whether a source can become something else than one clip of all of it."""
        return self.clip_seconds is not None or self.scene_threshold is not None


@dataclass(frozen=True)
class Filters:
    """Which inputs are wanted; None for no limit. What an input's row cuts out of a video counts, not all of it.

    Attributes:
        min_seconds, max_seconds: duration.
        min_side, max_side: pixels of the shorter side, as displayed.
        min_fps, max_fps: frames per second, on average.
    """

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_side: int | None = None
    max_side: int | None = None
    min_fps: float | None = None
    max_fps: float | None = None

    def __post_init__(self) -> None:
        for what in ("seconds", "side", "fps"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            for name, value in ((f"min_{what}", low), (f"max_{what}", high)):
                if value is not None and not 0 < value < float("inf"):
                    raise ConfigError(f"{name} is {value}, it has to be above 0")
            if low is not None and high is not None and low > high:
                raise ConfigError(f"min_{what} is {low} and max_{what} {high}: nothing lies between them")


@dataclass(frozen=True)
class Encoding:
    """How clips are encoded: one thread, bit-exact, closed GOPs of fixed length, no B-frames.

    Attributes:
        short_side: pixels of the shorter side, even; smaller videos keep their size. None for the source's own.
        fps: frames per second; None for the source's own, variable rates included.
        gop: frames from one key frame to the next.
        crf: quality on the codec's own scale, 0 (best) to 51 (h264, hevc) or 63 (vp9, av1).
        codec: of the pictures.
        audio: `keep` copies the sound or encodes it as AAC where mp4 cannot hold it, `drop` leaves it out; `auto`
            leaves files that are copied whole as they are, and makes all other clips without sound.
    """

    short_side: int | None = None
    fps: float | None = None
    gop: int = 16
    crf: int = 20
    codec: Codec = "h264"
    audio: Audio = "auto"

    def __post_init__(self) -> None:
        if self.short_side is not None and (self.short_side < 16 or self.short_side % 2):
            raise ConfigError(f"short_side is {self.short_side}, it has to be even and at least 16")
        if self.fps is not None and not 0.01 <= self.fps <= 1000.0:
            raise ConfigError(f"fps is {self.fps}, it has to be from 0.01 to 1000")
        if self.codec not in ("h264", "hevc", "vp9", "av1"):
            raise ConfigError(f"codec is {self.codec!r}, it has to be h264, hevc, vp9 or av1")
        if self.audio not in ("auto", "keep", "drop"):
            raise ConfigError(f"audio is {self.audio!r}, it has to be auto, keep or drop")
        top = 51 if self.codec in ("h264", "hevc") else 63
        if self.gop < 1 or not 0 <= self.crf <= top:
            raise ConfigError(
                f"gop has to be at least 1 and crf 0 to {top} for {self.codec}, got {self.gop} and {self.crf}"
            )


@dataclass(frozen=True)
class ShardOptions:
    """Everything that decides the bytes of the result, apart from the inputs.

    Attributes:
        samples_per_shard: clips planned for one tar.
        bytes_per_shard: start a new tar where the next clip would exceed so many bytes of video; None for no limit.
            Clips that are encoded anew count as they were in the source.
        prefix: tars are named PREFIX-000000.tar and so on.
        transcode: encode clips anew: where they are parts of files or `short_side` or `fps` is given (`auto`), all of
            them (`always`), or none, so that parts are cut at key frames and copied (`never`).
        val_share: share of the sources that are held out, chosen by a hash of each source's name.
        drop_duplicates: keep only the first of inputs with the same pictures, whatever is said of them.
        decode: which frames of a source are decoded before it is taken, to find out whether it is broken: the first,
            all, or none. Its container and every packet are looked at in any case.
    """

    samples_per_shard: int = 256
    bytes_per_shard: int | None = None
    prefix: str = "clips"
    cutting: Cutting = field(default_factory=Cutting)
    filters: Filters = field(default_factory=Filters)
    transcode: Transcode = "auto"
    encoding: Encoding = field(default_factory=Encoding)
    val_share: float = 0.0
    drop_duplicates: bool = False
    decode: Decode = "first"

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard is {self.samples_per_shard}, it has to be at least 1")
        if self.bytes_per_shard is not None and self.bytes_per_shard < 1:
            raise ConfigError(f"bytes_per_shard is {self.bytes_per_shard}, it has to be at least 1")
        plain = self.prefix.replace("-", "").replace("_", "")
        if not plain.isalnum() or not self.prefix.isascii() or len(self.prefix) > 100:
            raise ConfigError(f"prefix {self.prefix!r} has to be made of letters, digits, - and _, 100 at most")
        if self.transcode not in ("auto", "always", "never"):
            raise ConfigError(f"transcode is {self.transcode!r}, it has to be auto, always or never")
        if self.transcode == "never" and self._asks_for_encoding:
            raise ConfigError("transcode is never, but short_side and fps need clips to be encoded anew")
        if self.transcode == "never" and self.cutting.stride_seconds is not None:
            raise ConfigError("transcode is never, so clips begin and end at key frames: leave clip_stride_seconds out")
        if self.decode not in ("none", "first", "all"):
            raise ConfigError(f"decode is {self.decode!r}, it has to be none, first or all")
        if not 0.0 <= self.val_share < 1.0:
            raise ConfigError(f"val_share is {self.val_share}, it has to be from 0 to below 1")
        if self.val_share and self.cutting.val_tail:
            raise ConfigError("val_share holds out whole sources and val_tail the end of each: use one of them")

    @property
    def _asks_for_encoding(self) -> bool:
        return self.encoding.short_side is not None or self.encoding.fps is not None

    def encodes(self, part: bool) -> bool:
        """Whether a clip is encoded anew: one that is a part of a file, or a whole file."""
        if self.transcode == "never":
            return False
        return part or self.transcode == "always" or self._asks_for_encoding

    def to_json(self) -> dict[str, Any]:
        """As the plan keeps them, nested as they are here."""
        return asdict(self)
