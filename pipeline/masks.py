"""Rules: who may see whom, frame by frame, as functions of a layout. True = may attend, everywhere.

Every rule stays within a clip of a packed sequence. Rules combine with `&` and `|`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

from .errors import ConfigError
from .frame_mask import FrameMask, FramePattern, QueryGroup, frames_of
from .layout import FrameLayout, next_frame_targets
from .sampling import FAST, SLOW

__all__ = [
    "RULES",
    "FrameMask",
    "FramePattern",
    "QueryGroup",
    "check_rule",
    "fast_slow",
    "fast_slow_causal",
    "frame_causal",
    "full",
    "leaking_targets",
    "make_mask",
    "sliding_window",
    "time_causal",
]

Rule: TypeAlias = "Callable[..., FrameMask]"


def frame_causal(layout: FrameLayout) -> FrameMask:
    """Key frame stands at or before the query frame in the sequence."""
    return _from_rule(layout, lambda i, j: j <= i)


def sliding_window(layout: FrameLayout, window_size: int = 3) -> FrameMask:
    """The last `window_size` frames of the sequence **including the frame itself**: 1 sees only itself."""
    if window_size < 1:
        raise ConfigError(f"sliding_window: window_size counts the frame itself and must be >= 1, got {window_size}.")
    rank: list[int] = []  # place within its own clip, so that packed clips keep whole windows
    seen: dict[int, int] = {}
    for clip in layout.clip:
        rank.append(seen.get(clip, 0))
        seen[clip] = rank[-1] + 1
    return _from_rule(layout, lambda i, j: 0 <= rank[i] - rank[j] < window_size)


def fast_slow(layout: FrameLayout) -> FrameMask:
    """Slow frames see all slow frames; fast frames see all slow frames and fast frames up to themselves.

    Slow frames show what comes after: see `leaking_targets`, and prefer `time_causal` for prediction.
    """
    index, stream = layout.frame_index, layout.stream
    return _from_rule(layout, lambda i, j: stream[j] == SLOW or (stream[i] == FAST and index[j] <= index[i]))


def time_causal(layout: FrameLayout) -> FrameMask:
    """Key frame is not later in the source than the query frame, whatever the stream."""
    index = layout.frame_index
    return _from_rule(layout, lambda i, j: index[j] <= index[i])


def fast_slow_causal(layout: FrameLayout) -> FrameMask:
    """`fast_slow & time_causal`."""
    return fast_slow(layout) & time_causal(layout)


def full(layout: FrameLayout) -> FrameMask:
    """Everything sees everything of its own clip (clip-diagonal for packed sequences)."""
    return _from_rule(layout, lambda i, j: True)


RULES: dict[str, Rule] = {
    "frame_causal": frame_causal,
    "sliding_window": sliding_window,
    "fast_slow": fast_slow,
    "time_causal": time_causal,
    "fast_slow_causal": fast_slow_causal,
    "full": full,
}


def make_mask(rule: str | Rule, layout: FrameLayout, **options: Any) -> FrameMask:
    """Apply a rule, by name or as a function of a layout.

    Raises:
        ConfigError: for an unknown name, or a function that returns something else than a `FrameMask`.
    """
    if isinstance(rule, str):
        check_rule(rule)
        return RULES[rule](layout, **options)
    mask = rule(layout, **options)
    if not isinstance(mask, FrameMask):
        raise ConfigError(f"mask rule {rule!r} must return a FrameMask, got {type(mask).__name__}.")
    return mask


def check_rule(rule: str | Rule) -> None:
    """Raise a ConfigError that lists the valid names unless `rule` is one of them or a function."""
    if not callable(rule) and not (isinstance(rule, str) and rule in RULES):
        raise ConfigError(f"mask {rule!r} is unknown; valid names are {', '.join(RULES)}, or pass a function.")


@lru_cache(maxsize=4096)
def leaking_targets(layout: FrameLayout, mask: FrameMask, num_layers: int) -> tuple[bool, ...]:
    """For each frame: can its target, or any frame after the target, reach it through the model's layers?

    A query that can see what it has to predict, be it through a third frame, learns to copy. `mask` is that of
    one clip; targets are `next_frame_targets(layout)`, and frames without a target do not leak.
    """
    if mask.clips is not None:
        raise ConfigError("leaking_targets takes the mask of one clip; use mask[b].")
    reached = mask.patterns[0].reach(num_layers).rows
    leaks = []
    for query, target in enumerate(next_frame_targets(layout)):
        revealing = target >= 0 and any(
            layout.frame_index[j] >= layout.frame_index[target]
            and layout.clip[j] == layout.clip[query]
            and layout.valid[j]
            for j in frames_of(reached[query])
        )
        leaks.append(revealing)
    return tuple(leaks)


def _from_rule(layout: FrameLayout, allowed: Callable[[int, int], bool]) -> FrameMask:
    """Apply a rule to valid pairs of one clip. Invalid frames are seen by nobody and see only themselves."""
    frames = range(layout.num_frames)
    rows = tuple(
        sum(
            1 << j
            for j in frames
            if i == j or (layout.valid[i] and layout.valid[j] and layout.clip[i] == layout.clip[j] and allowed(i, j))
        )
        for i in frames
    )
    return FrameMask((FramePattern(rows, layout.patches),))
