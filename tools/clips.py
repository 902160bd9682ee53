"""Which clips one source is cut into, and which of them train and which are held out. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from framestream.pipeline.probe import VideoInfo

from .inputs import Source
from .shard_options import Cutting, ShardOptions

MIN_SCENE_SECONDS = 0.5  # of a scene that becomes a clip: what is shorter is a flash or a transition
SHORT_REMAINDER = "remainder shorter than half a clip"
SHORT_SCENE = "scene shorter than half a clip"
FLASH = f"scene shorter than {MIN_SCENE_SECONDS:g} s"
SHORT_PACKETS = "shorter than half a clip from key frame to key frame"
OUTSIDE_KEY_FRAMES = "no key frame to begin or end it"
TOO_SHORT = "shorter than half a clip"  # of whole sources
NO_FRAME = "no frame begins in it"
GAP = "in the gap before the held-out part"
_EPSILON = 1e-6  # seconds: times computed in floating point are not worth more
_END_SLACK = 0.5  # seconds that a row may ask for behind the end: container and last frame often differ by that


@dataclass(frozen=True)
class Clip:
    """One planned sample.

    Attributes:
        key: of the sample, unique in the plan.
        start, end: seconds in the source.
        frames: [first, stop) in the source, None for the whole file.
    """

    source: Source
    key: str
    start: float
    end: float
    frames: tuple[int, int] | None


@dataclass
class Cut:
    """What one source is cut into.

    Attributes:
        clips: each with its split, in order of time.
        dropped: clips that are not worth making, by rule.
        rejected: why the source cannot be used at all; "" where it can.
    """

    clips: list[tuple[str, Clip]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: str = ""

    @property
    def left_out(self) -> str:
        """The rule by which a source without clips is left out; "" where it has clips or is rejected."""
        if self.clips or self.rejected:
            return ""
        if self.dropped.keys() & {SHORT_REMAINDER, SHORT_SCENE, SHORT_PACKETS}:
            return TOO_SHORT
        return min(self.dropped, default=NO_FRAME)


class _Piece(NamedTuple):
    """A wanted clip in seconds, and the rule by which it is dropped ("" to keep it)."""

    start: float
    end: float
    rule: str = ""


def cut(
    source: Source,
    info: VideoInfo,
    scenes: Sequence[int],
    options: ShardOptions,
    split: str = "",
    times: Callable[[], np.ndarray] | None = None,
    shared: bool = False,
) -> Cut:
    """Cut one source.

    Clips are named KEY-00000 and so on; KEY alone where sources are taken as they are. Where nothing is encoded
    anew (`transcode` is never) a clip begins at the last key frame at or before the wanted time, and ends where the
    next one begins.

    Args:
        scenes: first frame of every scene but the first, rising; looked at only where `scene_threshold` is set.
        split: of all clips; with `val_tail` they are "train" or "val" instead.
        times: gives `info.times()`, for callers that cut many parts of one long video; None to ask `info`.
        shared: other sources are parts of the same video, so `val_tail` holds out its end for all of them alike.
    """
    result = Cut()
    result.rejected = not_in(source, info)
    if result.rejected:
        return result
    start = source.start or 0.0
    end = info.duration if source.end is None else min(source.end, info.duration)
    whole = source.start is None and source.end is None
    cutting = options.cutting
    if whole and not cutting.cuts:
        result.clips = [(split, Clip(source, source.key, 0.0, _rounded(info.duration), None))]
        return result
    at = (times or info.times)()
    borders = _scene_borders(at, scenes, start, end) if cutting.scene_threshold is not None else [start, end]
    pieces = _pieces(borders, cutting)
    if options.transcode == "never":
        pieces, ranges = _at_key_frames(pieces, info, at, end, cutting, result.dropped)
    else:
        ranges = _frames(pieces, info, at)
    clips = []
    for number, (piece, frames) in enumerate(zip(pieces, ranges, strict=True)):
        if piece.rule:
            result.dropped[piece.rule] += 1
            continue
        key = f"{source.key}-{number:05d}" if cutting.cuts else source.key
        if whole and frames == (0, info.num_frames):
            clips.append(Clip(source, key, 0.0, _rounded(info.duration), None))
        elif frames[1] > frames[0]:
            clips.append(Clip(source, key, _rounded(piece.start), _rounded(piece.end), frames))
        else:
            result.dropped[NO_FRAME] += 1
    if cutting.val_tail:
        border = _border(clips, info, cutting, moved=whole and not shared)
        result.clips = _held_out(clips, border, cutting.val_gap, result.dropped)
    else:
        result.clips = [(split, clip) for clip in clips]
    return result


def not_in(source: Source, info: VideoInfo) -> str:
    """Why the video does not have the part that is asked for; "" where it does."""
    start = source.start or 0.0
    end = info.duration if source.end is None else source.end
    if start < info.duration and end <= info.duration + _END_SLACK:
        return ""
    return f"its row asks for {start:g} to {end:g} s, the video has {info.duration:.3f} s"


def _frames(pieces: Sequence[_Piece], info: VideoInfo, times: np.ndarray) -> list[tuple[int, int]]:
    """[first, stop) of the frames that begin in each piece."""
    borders = np.array([(piece.start, piece.end) for piece in pieces])
    found = times.searchsorted(borders - _EPSILON)
    found[borders[:, 1] >= info.duration - _EPSILON, 1] = info.num_frames
    return [(first, stop) for first, stop in found.tolist()]


def _scene_borders(times: np.ndarray, scenes: Sequence[int], start: float, end: float) -> list[float]:
    """Where the scenes of [start, end) begin and end, in seconds."""
    inside = (float(times[scene]) for scene in scenes if scene < len(times))
    return [start, *(time for time in inside if start + _EPSILON < time < end - _EPSILON), end]


def _pieces(borders: Sequence[float], cutting: Cutting) -> list[_Piece]:
    """What is wanted of the stretches between `borders`, in order, those that are too short included."""
    length = cutting.clip_seconds
    several = len(borders) > 2
    pieces = []
    for start, end in pairwise(borders):
        if length is None:
            rule = FLASH if several and end - start < MIN_SCENE_SECONDS - _EPSILON else ""
            pieces.append(_Piece(start, end, rule))
            continue
        for number, (first, last) in enumerate(_stretches(start, end, length, cutting.stride_seconds or length)):
            short = last - first < length / 2 - _EPSILON
            rule = SHORT_SCENE if several and number == 0 else SHORT_REMAINDER
            pieces.append(_Piece(first, last, rule if short else ""))
    return pieces


def _stretches(start: float, end: float, length: float, stride: float) -> Iterator[tuple[float, float]]:
    """Clips of [start, end) in seconds; the last ones may be shorter than `length`."""
    number = 0
    while (first := start + number * stride) < end - _EPSILON:
        if number and first - stride + length >= end - _EPSILON:
            break  # the clip before this one reaches the end: of overlapping clips the rest only repeats it
        yield first, min(first + length, end)
        number += 1


def _at_key_frames(
    pieces: Sequence[_Piece], info: VideoInfo, times: np.ndarray, end: float, cutting: Cutting, dropped: Counter[str]
) -> tuple[list[_Piece], list[tuple[int, int]]]:
    """The pieces moved to key frames, so that their packets can be copied, and their frames.

    Neighbours stay neighbours. A piece that begins and ends at the same key frame vanishes: its neighbours have what
    was in it. Only what lies before the first key frame, and behind the last one before `end`, goes to nobody; each
    counts as a dropped clip.
    """
    keys = [*info.key_frames, info.num_frames]
    begins = [*(float(times[key]) for key in info.key_frames), info.duration]

    def moved(time: float) -> int:
        """Where in `keys` the last key frame at or before `time` is, or else the first one."""
        return max(0, bisect_right(begins, time + _EPSILON) - 1)

    shortest, rule = MIN_SCENE_SECONDS if len(pieces) > 1 else 0.0, FLASH
    if cutting.clip_seconds is not None:
        shortest, rule = cutting.clip_seconds / 2, SHORT_PACKETS
    kept, frames = [], []
    for piece in pieces:
        first, last = moved(piece.start), moved(piece.end)
        if last > first:
            short = begins[last] - begins[first] < shortest - _EPSILON
            kept.append(_Piece(begins[first], begins[last], (piece.rule or rule) if short else ""))
            frames.append((keys[first], keys[last]))
    for lost in (begins[0] > pieces[0].start + _EPSILON, begins[moved(end)] < end - _EPSILON):
        if lost:
            dropped[OUTSIDE_KEY_FRAMES] += 1
    return kept, frames


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _border(clips: Sequence[Clip], info: VideoInfo, cutting: Cutting, *, moved: bool) -> float:
    """Where the held-out part of a video begins, in seconds.

    That is a share of the video and not of a row's part of it: parts that overlap have to agree. In a video that is
    cut once, as a whole, it is `moved` on to the next clip, so that no clip but those in the gap is lost to it.
    """
    border = _rounded(info.duration * (1.0 - cutting.val_tail))
    if moved:
        return min((clip.start for clip in clips if clip.start >= border), default=math.inf)
    return border


def _held_out(clips: Sequence[Clip], border: float, gap: float, dropped: Counter[str]) -> list[tuple[str, Clip]]:
    """Each clip with its split; those in the gap, or across the border, are dropped."""
    last = _rounded(border - gap)
    placed = []
    for clip in clips:
        if clip.start >= border:
            placed.append(("val", clip))
        elif clip.end <= last:
            placed.append(("train", clip))
        else:
            dropped[GAP] += 1
    return placed
