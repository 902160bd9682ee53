"""Which clips a source is cut into, and which of them train and which are held out. Pure."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.probe import VideoInfo

from .inputs import Source

MIN_SECONDS = 0.01  # of a clip, and from one to the next: below that there are more clips than frames
_EPSILON = 1e-6  # seconds: times computed in floating point are not worth more


@dataclass(frozen=True)
class Cutting:
    """How sources become clips. All in seconds; `clip_seconds` None takes every source as one clip."""

    clip_seconds: float | None = None
    stride_seconds: float | None = None
    val_tail: float = 0.0  # share of each source, at its end, that is held out
    val_gap: float = 0.0  # seconds before the held-out part that are used for nothing

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "stride_seconds"):
            value = getattr(self, name)
            if value is not None and not MIN_SECONDS <= value < float("inf"):
                name = name.replace("stride", "clip_stride")
                raise ConfigError(f"{name} is {value}, it has to be at least {MIN_SECONDS}")
        if self.clip_seconds is None and (self.stride_seconds is not None or self.val_tail or self.val_gap):
            raise ConfigError("clip_stride_seconds, val_tail and val_gap cut videos into clips: set clip_seconds too")
        if not 0.0 <= self.val_tail < 1.0 or not 0.0 <= self.val_gap < float("inf"):
            raise ConfigError(
                f"val_tail has to be from 0 to below 1 and val_gap at least 0 s, got {self.val_tail} and {self.val_gap}"
            )
        if self.val_gap and not self.val_tail:
            raise ConfigError("val_gap is the distance to the held-out part: set val_tail too")


@dataclass(frozen=True)
class Clip:
    """One planned sample. `frames` is its range of frames in the source, None for the whole file."""

    source: Source
    key: str
    start: float
    end: float
    frames: tuple[int, int] | None

    def identity(self) -> list[Any]:
        """What decides the sample's bytes, apart from the encoder's settings."""
        s = self.source
        return [s.source, s.size, self.key, self.start, self.end, self.frames, s.text, dict(s.user)]


@dataclass
class Plan:
    """Clips per split, and what was not worth planning: dropped clips and sources by rule."""

    splits: dict[str, list[Clip]] = field(default_factory=dict)
    dropped_clips: Counter[str] = field(default_factory=Counter)
    dropped_sources: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_clips(self) -> int:
        return sum(map(len, self.splits.values()))


def plan_clips(sources: Sequence[Source], infos: Sequence[VideoInfo | str], cutting: Cutting) -> Plan:
    """Cut all sources; `infos` has for each what probing said: its VideoInfo, or why it is rejected.

    Raises:
        ConfigError: sources have splits of their own and `val_tail` asks for others.
    """
    named = sorted({source.split for source in sources if source.split})
    if named and cutting.val_tail:
        raise ConfigError(f"the manifest has splits ({', '.join(named)}) and val_tail makes others: use one of them")
    plan = Plan({"train": [], "val": []} if cutting.val_tail else {name: [] for name in named})
    for source, info in zip(sources, infos, strict=True):
        if isinstance(info, str):
            plan.rejects.append({"source": source.source, "reason": info})
            continue
        start, end = source.start or 0.0, info.duration if source.end is None else source.end
        if start >= info.duration or end > info.duration + 0.5:
            reason = f"its row asks for {start:g} to {end:g} s, the video has {info.duration:.3f} s"
            plan.rejects.append({"source": source.source, "reason": reason})
            continue
        clips = _cut(source, info, start, min(end, info.duration), cutting, plan.dropped_clips)
        if not clips:
            plan.dropped_sources["shorter than half a clip"] += 1
        for split, clip in _held_out(clips, start, min(end, info.duration), cutting):
            if split is None:
                plan.dropped_clips["in the gap before the held-out part"] += 1
            else:
                plan.splits.setdefault(split or source.split or ("train" if named else ""), []).append(clip)
    if not plan.splits:
        plan.splits[""] = []
    return plan


def _cut(
    source: Source, info: VideoInfo, start: float, end: float, cutting: Cutting, dropped: Counter[str]
) -> list[Clip]:
    times = info.times()
    if cutting.clip_seconds is None:
        if source.start is None and source.end is None:
            return [Clip(source, source.key, 0.0, _rounded(info.duration), None)]
        return _clip(source, source.key, times, start, end)
    length, stride = cutting.clip_seconds, cutting.stride_seconds or cutting.clip_seconds
    if length >= info.duration - _EPSILON and source.start is None and source.end is None:
        if info.duration < length / 2 - _EPSILON:
            dropped["remainder shorter than half a clip"] += 1
            return []
        return [Clip(source, f"{source.key}-00000", 0.0, _rounded(info.duration), None)]
    clips = []
    number = 0
    while (first := start + number * stride) < end - _EPSILON:
        last = min(first + length, end)
        if number and first - stride + length >= end - _EPSILON:
            break  # the clip before this one reaches the end: of overlapping clips the rest only repeats it
        if last - first < length / 2 - _EPSILON:
            dropped["remainder shorter than half a clip"] += 1
        else:
            clips += _clip(source, f"{source.key}-{number:05d}", times, first, last)
        number += 1
    return clips


def _clip(source: Source, key: str, times: np.ndarray, start: float, end: float) -> list[Clip]:
    first, stop = (int(np.searchsorted(times, t - _EPSILON)) for t in (start, end))
    return [Clip(source, key, _rounded(start), _rounded(end), (first, stop))] if stop > first else []


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _held_out(clips: Sequence[Clip], start: float, end: float, cutting: Cutting) -> list[tuple[str | None, Clip]]:
    """(split, clip): "train", "val", or None in the gap; "" where nothing is held out.

    The held-out part begins with the first clip inside the last `val_tail` of the source, so that no clip but
    those in the gap is lost to it.
    """
    if not cutting.val_tail:
        return [("", clip) for clip in clips]
    border = start + (end - start) * (1.0 - cutting.val_tail)
    border = min((clip.start for clip in clips if clip.start >= border - _EPSILON), default=end + cutting.val_gap)
    placed: list[tuple[str | None, Clip]] = []
    for clip in clips:
        if clip.start >= border - _EPSILON:
            placed.append(("val", clip))
        else:
            placed.append(("train" if clip.end <= border - cutting.val_gap + _EPSILON else None, clip))
    return placed


def digest(clips: Sequence[Clip], options: Mapping[str, Any]) -> str:
    """Names a split's plan: equal when the same shards come out of it."""
    content = json.dumps([dict(options), [clip.identity() for clip in clips]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
