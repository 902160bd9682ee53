"""Which frames of a clip a model sees: pure functions over numbers, no I/O.

Fast frames cover the end of a clip densely, slow frames cover the whole clip sparsely, after SlowFast
(Feichtenhofer et al. 2019). A plan says which source frames are wanted, in which order they stand in the
model's sequence, and what has to be decoded for it: every source frame once, however many streams want it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from .errors import ConfigError

SLOW, FAST = 0, 1
MAX_FPS = 1e6

Order = Literal["concat", "interleave", "time"]
SlowCoverage = Literal["clip", "stride"]
SlowSnap = Literal["keyframe"]


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """The frames of one clip, in the model's order.

    Attributes:
        frame_index: int64 `[F]`, index of the source frame.
        stream: uint8 `[F]`, 0 slow, 1 fast.
        valid: bool `[F]`, False where the clip was too short and the frame only keeps the shape static.
        unique: int64 `[U]`, the sorted source frames to decode.
        gather: int64 `[F]`, position of each frame in `unique`: `decoded[gather]` is the sequence.
    """

    frame_index: np.ndarray
    stream: np.ndarray
    valid: np.ndarray
    unique: np.ndarray
    gather: np.ndarray

    @property
    def num_frames(self) -> int:
        """F, the frames of the sequence (padding included)."""
        return len(self.frame_index)


@runtime_checkable
class Sampling(Protocol):
    """What turns a clip's length into a `SamplingPlan`. Lengths are static: every plan has `num_frames`."""

    @property
    def num_frames(self) -> int:
        """F, the same for every clip."""

    @property
    def fps(self) -> float | None:
        """Frames per second that strides count in; None counts source frames."""

    def plan(self, num_frames: int, *, end: int | None = None, timestamps: np.ndarray | None = None) -> SamplingPlan:
        """Choose frames of a clip of `num_frames` frames, using only those before `end`."""

    def streams(self) -> np.ndarray:
        """uint8 `[F]`, the stream at each position of the sequence."""


@dataclass(frozen=True)
class FastSlowSampling:
    """Slow frames over the whole clip and fast frames at its end.

    Args:
        num_fast: fast frames, always ending at the newest frame.
        num_slow: slow frames.
        fast_stride: source frames between two fast frames.
        slow_stride: source frames between two slow frames; acts with `slow_coverage="stride"` only.
        slow_coverage: "clip" spreads the slow frames evenly over the whole clip; "stride" takes the most recent
            `num_slow * slow_stride` frames, and falls back to "clip" where the clip is shorter than that.
        order: "concat" is all slow, then all fast; "interleave" alternates, element k of n at (k + 0.5) / n;
            "time" is by source frame. Ties put slow first. No order drops a frame.
        fps: count frames and strides on the clip resampled to this rate by its timestamps. A source frame is
            never counted twice, so a clip slower than `fps` keeps its own rate.
        slow_snap: "keyframe" moves slow frames to the nearest key frame before the current moment, which decodes
            alone; `frame_index` is then where they really are. A key frame takes in the nearest slow frame only, and
            the others stay, so that frames never become one and keep their order.

    Raises:
        ConfigError: for counts or strides below 1, and unknown names.
    """

    num_fast: int = 8
    num_slow: int = 8
    fast_stride: int = 1
    slow_stride: int = 4
    slow_coverage: SlowCoverage = "clip"
    order: Order = "concat"
    fps: float | None = None
    slow_snap: SlowSnap | None = None

    def __post_init__(self) -> None:
        for name in ("num_fast", "num_slow", "fast_stride", "slow_stride"):
            _check_count(self, name)
        _check_choice(self, "slow_coverage", ("clip", "stride"))
        _check_choice(self, "order", ("concat", "interleave", "time"))
        _check_choice(self, "slow_snap", (None, "keyframe"))
        _check_fps(self)

    @property
    def num_frames(self) -> int:
        """F = num_slow + num_fast."""
        return self.num_slow + self.num_fast

    def plan(
        self,
        num_frames: int,
        *,
        end: int | None = None,
        timestamps: np.ndarray | None = None,
        key_frames: Sequence[int] | None = None,
    ) -> SamplingPlan:
        """Choose the frames of a clip.

        Args:
            num_frames: frames of the clip.
            end: the current moment: only frames before it are used. Default `num_frames`.
            timestamps: float `[num_frames]` seconds, ascending; needed when `fps` is set.
            key_frames: indices of the clip's key frames, ascending; needed when `slow_snap` is set.

        Raises:
            ConfigError: when `num_frames` or `end` are out of range, or timestamps or key frames are missing.
        """
        source = _usable_frames(self, num_frames, end, timestamps)
        t = len(source)
        fast, fast_valid = _strided_to_end(t, self.num_fast, self.fast_stride)
        slow, slow_valid = self._slow(t)
        fast, slow = source[fast], source[slow]
        if self.slow_snap is not None:
            if key_frames is None:
                raise ConfigError("sampling with slow_snap='keyframe' needs the key frames of the clip, got none.")
            slow = snapped(slow, slow_valid, [key for key in key_frames if key <= source[-1]])
        index = np.concatenate([slow, fast])
        valid = np.concatenate([slow_valid, fast_valid])
        stream = self._concat_streams()
        if self.order == "interleave":
            by_share = _interleave_order(self.num_slow, self.num_fast)
            index, valid, stream = index[by_share], valid[by_share], stream[by_share]
        elif self.order == "time":
            # Stable, and padding precedes its stream: a padded frame stays before the frame it repeats.
            by_time = np.argsort(index, kind="stable")
            index, valid, stream = index[by_time], valid[by_time], stream[by_time]
        return _finish(index, stream, valid)

    def streams(self) -> np.ndarray:
        """uint8 `[F]`, the stream at each position. `order="time"` has no fixed answer: ConfigError."""
        if self.order == "time":
            raise ConfigError(
                "streams() has no fixed answer for order='time', where the order depends on the clip; "
                "read plan(...).stream of each clip, or use order='concat' or 'interleave'."
            )
        streams = self._concat_streams()
        return streams[_interleave_order(self.num_slow, self.num_fast)] if self.order == "interleave" else streams

    def _concat_streams(self) -> np.ndarray:
        return np.repeat(np.array([SLOW, FAST], np.uint8), [self.num_slow, self.num_fast])

    def _slow(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        k = np.arange(self.num_slow, dtype=np.int64)
        if self.slow_coverage == "stride" and t >= self.num_slow * self.slow_stride:
            return t - self.slow_stride * (self.num_slow - k), np.ones(self.num_slow, bool)
        if t >= self.num_slow:
            return k * t // self.num_slow, np.ones(self.num_slow, bool)
        return _strided_to_end(t, self.num_slow, 1)  # 0..t-1, padded at the front


@dataclass(frozen=True)
class DenseSampling:
    """One stream, newest frame last: the baseline without slow frames. All frames count as fast.

    Args:
        num_frames: frames of the sequence.
        stride: source frames between two of them.
        fps: as in `FastSlowSampling`.

    Raises:
        ConfigError: for counts or strides below 1.
    """

    num_frames: int
    stride: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        _check_count(self, "num_frames")
        _check_count(self, "stride")
        _check_fps(self)

    def plan(self, num_frames: int, *, end: int | None = None, timestamps: np.ndarray | None = None) -> SamplingPlan:
        """Choose the frames of a clip; arguments and errors as in `FastSlowSampling.plan`."""
        source = _usable_frames(self, num_frames, end, timestamps)
        index, valid = _strided_to_end(len(source), self.num_frames, self.stride)
        return _finish(source[index], self.streams(), valid)

    def streams(self) -> np.ndarray:
        """uint8 `[F]`, all fast."""
        return np.full(self.num_frames, FAST, np.uint8)


def sampling_for_length(num_frames: int) -> Sampling:
    """The preset for clips of `num_frames` frames.

    Below 30 all frames are taken; 30 to 60 take 8 fast and 8 slow (strides 1 and 4); longer clips take 16 fast
    and 8 slow (strides 2 and 8). The strides of the slow frames act (`slow_coverage="stride"`).
    """
    if not _is_count(num_frames):
        raise ConfigError(f"sampling_for_length() needs a clip of at least 1 frame, got {num_frames!r}.")
    if num_frames < 30:
        return DenseSampling(num_frames)
    if num_frames <= 60:
        return FastSlowSampling(8, 8, 1, 4, slow_coverage="stride")
    return FastSlowSampling(16, 8, 2, 8, slow_coverage="stride")


def make_sampling(spec: Sampling | Mapping[str, Any]) -> Sampling:
    """Build a sampling from a mapping, as it stands in a config file.

    `{"kind": "fast_slow", ...}`, `{"kind": "dense", ...}` take the fields of the class; `{"kind": "length",
    "num_frames": T}` is `sampling_for_length(T)`. A sampling object is returned as it is.

    Raises:
        ConfigError: for an unknown kind or key, by name.
    """
    if not isinstance(spec, Mapping):
        if isinstance(spec, Sampling):
            return spec
        raise ConfigError(
            f"sampling must be a sampling object or a mapping with the key 'kind', got {spec!r}; "
            "for example FastSlowSampling(num_fast=8, num_slow=8)."
        )
    options = dict(spec)
    kind = options.pop("kind", "fast_slow")
    kinds = {"fast_slow": FastSlowSampling, "dense": DenseSampling, "length": sampling_for_length}
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"sampling kind {kind!r} is unknown; valid kinds are {', '.join(kinds)}.")
    known = (
        ["num_frames"] if kind == "length" else [f.name for f in dataclasses.fields(kinds[kind])]  # type: ignore[arg-type]
    )
    for key in options:
        if key not in known:
            raise ConfigError(f"sampling key {key!r} is unknown for kind {kind!r}; valid: {', '.join(known)}.")
    if kind != "fast_slow" and "num_frames" not in options:
        raise ConfigError(f"sampling of kind {kind!r} needs the key 'num_frames'.")
    return kinds[kind](**options)  # type: ignore[operator]


def _usable_frames(sampling: Sampling, num_frames: int, end: int | None, timestamps: np.ndarray | None) -> np.ndarray:
    """Source indices that frames and strides count on, ascending, the current moment last."""
    if num_frames < 1:
        raise ConfigError(f"a plan needs a clip of at least 1 frame, got num_frames={num_frames}.")
    end = num_frames if end is None else end
    if not 1 <= end <= num_frames:
        raise ConfigError(f"end must be within 1..{num_frames} (frames before it are used), got {end}.")
    if sampling.fps is None:
        return np.arange(end, dtype=np.int64)
    if timestamps is None or len(timestamps) < end:
        raise ConfigError(
            f"sampling with fps={sampling.fps} needs the timestamps of all {num_frames} frames in seconds, "
            f"got {'none' if timestamps is None else len(timestamps)}."
        )
    times = np.asarray(timestamps[:end], np.float64)
    steps = int(np.floor((times[-1] - times[0]) * sampling.fps + 1e-6)) + 1
    wanted = times[-1] - np.arange(steps) / sampling.fps
    # The nearest frame, not the last before: containers round timestamps, often to milliseconds.
    after = np.clip(np.searchsorted(times, wanted), 1, max(end - 1, 1)) if end > 1 else np.zeros(steps, np.int64)
    before = np.maximum(after - 1, 0)
    nearest = np.where(wanted - times[before] <= times[after] - wanted + 1e-9, before, after)
    return np.unique(nearest).astype(np.int64)


def _strided_to_end(t: int, count: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` indices at `stride`, ending at t-1; what lies before the clip repeats the earliest, invalid."""
    index = t - 1 - stride * np.arange(count - 1, -1, -1, dtype=np.int64)
    valid = index >= 0
    return np.where(valid, index, index[valid][0]), valid


def snapped(frames: np.ndarray, valid: np.ndarray, key_frames: Sequence[int]) -> np.ndarray:
    """Move frames to key frames: each key frame takes in the nearest of the frames to which it is the nearest.

    Args:
        frames: int64 `[n]`, ascending; distinct where `valid`.
        valid: bool `[n]`, False for padding in front, which repeats the first valid frame, before and after.
        key_frames: ascending.

    Returns:
        int64 `[n]`, ascending, distinct where `valid`.
    """
    keys = np.asarray(key_frames, np.int64)
    if not len(keys):
        return frames
    result = frames.copy()
    after = np.searchsorted(keys, frames).clip(max=len(keys) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(np.abs(keys[after] - frames) < np.abs(frames - keys[before]), after, before)
    distance = np.abs(keys[nearest] - frames)
    for key in np.unique(nearest[valid]):
        taken = np.flatnonzero(valid & (nearest == key))
        result[taken[distance[taken].argmin()]] = keys[key]
    result[~valid] = result[valid][0]
    return result


def _interleave_order(num_slow: int, num_fast: int) -> np.ndarray:
    # (k + 0.5) / n compared in integers: both sides times 2 * num_slow * num_fast.
    share = np.concatenate([(2 * np.arange(num_slow) + 1) * num_fast, (2 * np.arange(num_fast) + 1) * num_slow])
    return np.argsort(share, kind="stable")


def _finish(index: np.ndarray, stream: np.ndarray, valid: np.ndarray) -> SamplingPlan:
    unique, gather = np.unique(index, return_inverse=True)
    return SamplingPlan(index, stream, valid, unique, gather.astype(np.int64).reshape(-1))


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _check_count(sampling: object, name: str) -> None:
    value = getattr(sampling, name)
    if not _is_count(value):
        raise ConfigError(f"{type(sampling).__name__}: {name} must be a whole number >= 1, got {value!r}.")


def _check_choice(sampling: object, name: str, choices: tuple[str | None, ...]) -> None:
    value = getattr(sampling, name)
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise ConfigError(f"{type(sampling).__name__}: {name} must be one of {expected}, got {value!r}.")


def _check_fps(sampling: Sampling) -> None:
    fps = sampling.fps
    number = isinstance(fps, (int, float, np.integer, np.floating)) and not isinstance(fps, bool)
    if fps is not None and not (number and 0 < fps <= MAX_FPS):
        raise ConfigError(
            f"{type(sampling).__name__}: fps must be positive, a number of at most {MAX_FPS:g}, got {fps!r}."
        )
