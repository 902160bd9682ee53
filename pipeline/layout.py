"""What stands where in a sequence of frames: the one description that masks, positions and targets share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Literal, TypeAlias

import numpy as np
import torch

from .errors import ConfigError
from .sampling import FAST, SLOW, SamplingPlan

PositionKind = Literal["source", "sequence"]
Patches: TypeAlias = "int | Sequence[int]"


@dataclass(frozen=True)
class FrameLayout:
    """One entry per frame of a sequence, in the model's order. Hashable, and cheap to send to a worker.

    Attributes:
        frame_index: index of the source frame.
        stream: 0 slow, 1 fast.
        valid: False for frames that only keep the shape static.
        clip: which clip of a packed sequence the frame belongs to.
        patches: tokens of the frame.
        frame_time: seconds, from real timestamps; None when unknown. Rules never compare it.
    """

    frame_index: tuple[int, ...]
    stream: tuple[int, ...]
    valid: tuple[bool, ...]
    clip: tuple[int, ...]
    patches: tuple[int, ...]
    frame_time: tuple[float, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        frames = len(self.frame_index)
        if frames == 0:
            raise ConfigError("a FrameLayout needs at least one frame, got none.")
        for name in ("stream", "valid", "clip", "patches", "frame_time"):
            value = getattr(self, name)
            if value is not None and len(value) != frames:
                raise ConfigError(
                    f"FrameLayout: {name} has {len(value)} entries, but frame_index has {frames}; "
                    "every field needs one entry per frame."
                )
        if min(self.patches) < 1:
            raise ConfigError(f"FrameLayout: every frame needs at least 1 patch, got {min(self.patches)}.")

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.frame_index)

    @property
    def num_tokens(self) -> int:
        """N, the sum of all frames' patches."""
        return sum(self.patches)

    @classmethod
    def from_plan(
        cls,
        plan: SamplingPlan,
        patches: Patches = 256,
        frame_time: Sequence[float] | np.ndarray | None = None,
        clip: int = 0,
    ) -> FrameLayout:
        """The layout of one clip.

        Args:
            plan: what `Sampling.plan` returned.
            patches: tokens per frame; a pair means (slow, fast).
            frame_time: float `[F]` seconds of each frame of the plan.
            clip: number of the clip in a packed sequence.
        """
        return cls.from_arrays(plan.frame_index, plan.stream, plan.valid, patches, frame_time, [clip] * plan.num_frames)

    @classmethod
    def from_arrays(
        cls,
        frame_index: Iterable[int],
        stream: Iterable[int] | None = None,
        valid: Iterable[bool] | None = None,
        patches: Patches = 256,
        frame_time: Iterable[float] | None = None,
        clip: Iterable[int] | None = None,
    ) -> FrameLayout:
        """From sequences, arrays or 1-D tensors of length F.

        Missing fields mean: all fast, all valid, one clip. `patches` is an int, a pair (slow, fast), or one
        entry per frame; with F = 2 two entries count as the pair.
        """
        index = _ints(frame_index)
        streams = (FAST,) * len(index) if stream is None else _ints(stream)
        return cls(
            frame_index=index,
            stream=streams,
            valid=(True,) * len(index) if valid is None else tuple(bool(v) for v in _ints(valid)),
            clip=(0,) * len(index) if clip is None else _ints(clip),
            patches=patches_per_frame(patches, streams),
            frame_time=None if frame_time is None else tuple(float(t) for t in frame_time),
        )

    @staticmethod
    def concat(layouts: Sequence[FrameLayout]) -> FrameLayout:
        """Pack several sequences into one; clips are numbered anew, so that none can see another."""
        if not layouts:
            raise ConfigError("FrameLayout.concat needs at least one layout, got none.")
        clips: list[int] = []
        for layout in layouts:
            first = max(clips, default=-1) + 1
            number = {old: first + k for k, old in enumerate(dict.fromkeys(layout.clip))}
            clips.extend(number[old] for old in layout.clip)
        timed = all(layout.frame_time is not None for layout in layouts)
        return FrameLayout(
            frame_index=sum((layout.frame_index for layout in layouts), ()),
            stream=sum((layout.stream for layout in layouts), ()),
            valid=sum((layout.valid for layout in layouts), ()),
            clip=tuple(clips),
            patches=sum((layout.patches for layout in layouts), ()),
            frame_time=sum((layout.frame_time or () for layout in layouts), ()) if timed else None,
        )

    def only_valid(self) -> FrameLayout:
        """The same without the frames that only keep the shape static.

        Raises:
            ConfigError: no frame is valid.
        """
        if all(self.valid):
            return self
        kept = [i for i, valid in enumerate(self.valid) if valid]
        return FrameLayout(
            frame_index=tuple(self.frame_index[i] for i in kept),
            stream=tuple(self.stream[i] for i in kept),
            valid=(True,) * len(kept),
            clip=tuple(self.clip[i] for i in kept),
            patches=tuple(self.patches[i] for i in kept),
            frame_time=None if self.frame_time is None else tuple(self.frame_time[i] for i in kept),
        )

    def offsets(self) -> tuple[int, ...]:
        """First token of each frame, and N at the end: `[F + 1]`."""
        return tuple(accumulate(self.patches, initial=0))

    def position_ids(self, kind: PositionKind = "source") -> torch.Tensor:
        """See `frame_position_ids`."""
        return frame_position_ids(self, kind)


def patches_per_frame(patches: Patches, stream: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each frame from an int, a pair (slow, fast), or one entry per frame.

    Raises:
        ConfigError: when the count of entries is neither 2 nor that of the frames.
    """
    if isinstance(patches, (int, np.integer)):
        return (int(patches),) * len(stream)
    entries = _ints(patches)
    if len(entries) == 2:
        return tuple(entries[SLOW] if s == SLOW else entries[FAST] for s in stream)
    if len(entries) == len(stream):
        return entries
    raise ConfigError(
        f"patches must be an int, a pair (slow, fast) or one entry for each of {len(stream)} frames, "
        f"got {len(entries)} entries."
    )


def frame_position_ids(layout: FrameLayout, kind: PositionKind = "source") -> torch.Tensor:
    """One ID per token, equal within a frame: int64 `[N]`.

    "source" gives the source frame's index. "sequence" gives 0, 0, 1, 1, 2, 2 for three frames of two patches;
    in a merged fast-slow sequence it says nothing about time.
    """
    if kind not in ("source", "sequence"):
        raise ConfigError(f"position IDs are of kind 'source' or 'sequence', got {kind!r}.")
    ids = layout.frame_index if kind == "source" else tuple(range(layout.num_frames))
    return torch.repeat_interleave(
        torch.tensor(ids, dtype=torch.int64), torch.tensor(layout.patches, dtype=torch.int64)
    )


@lru_cache(maxsize=4096)
def next_frame_targets(layout: FrameLayout) -> tuple[int, ...]:
    """What each frame has to predict: the position of the next valid frame of its own stream and clip, or -1.

    "Next" is by source index, so any order of the layout gives the same pairs, and a target never crosses from
    one stream to the other. Invalid frames have no target and are none.
    """
    following: dict[tuple[int, int], int] = {}
    targets = [-1] * layout.num_frames
    for i in sorted(range(layout.num_frames), key=layout.frame_index.__getitem__, reverse=True):
        if layout.valid[i]:
            own = (layout.clip[i], layout.stream[i])
            targets[i] = following.get(own, -1)
            following[own] = i
    return tuple(targets)


def _ints(values: Iterable[int]) -> tuple[int, ...]:
    if isinstance(values, (np.ndarray, torch.Tensor)):
        return tuple(int(v) for v in values.tolist())
    return tuple(int(v) for v in values)
