"""How a clip goes on: which frames are its history, and what each generated frame sees of them and of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from framestream.pipeline.frame_mask import frames_of
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, FramePattern
from framestream.pipeline.sampling import FAST

from .kv_cache import Future

HORIZON = 64  # frames that a generation without end looks ahead in the beginning
MOST_AT_ONCE = 1024  # frames whose rows are made at once; more are generated as if there were no end


@dataclass(frozen=True)
class Continuation:
    """What is generated of a clip, from where, and what it may see.

    Attributes:
        start: position of the last true fast frame.
        positions: where in the clip the generated frames stand, in time; empty beyond its end.
        history: the clip's mask without everything from the first generated frame on.
        future: what generated frames see.
    """

    start: int
    positions: tuple[int, ...]
    history: FrameMask
    future: Future


def fast_frames(layout: FrameLayout) -> list[int]:
    """Positions of the valid fast frames of one clip, in time."""
    fast = [i for i in range(layout.num_frames) if layout.valid[i] and layout.stream[i] == FAST]
    return sorted(fast, key=layout.frame_index.__getitem__)


def within_clip(layout: FrameLayout, mask: FrameMask, steps: int) -> Continuation | None:
    """The last `steps` fast frames of a clip generated anew; None where no fast frame would be left before them."""
    fast = fast_frames(layout)
    if len(fast) < steps + 1:
        return None
    positions = tuple(fast[-steps:])
    known = _before(layout, layout.frame_index[positions[0]])
    rows = mask.patterns[0].rows
    future = []
    for k, position in enumerate(positions[:-1]):  # nothing is predicted from the last one
        row = rows[position] & known
        for j, other in enumerate(positions[: k + 1]):
            row |= (rows[position] >> other & 1) << layout.num_frames + j
        future.append(row)
    history = _history(layout, known, dict(enumerate(rows)))
    return Continuation(fast[-steps - 1], positions, history, Future(layout.num_frames, future))


def index_step(layout: FrameLayout) -> int:
    """Source frames from the last but one fast frame of a clip to the last; 1 where there is one only."""
    fast = fast_frames(layout)
    return max(layout.frame_index[fast[-1]] - layout.frame_index[fast[-2]], 1) if len(fast) > 1 else 1


def extended_layout(layout: FrameLayout, count: int, first: int = 0) -> FrameLayout:
    """The clip's known frames and `count` further fast ones behind them, at the pace of its last fast frames.

    Known are valid frames before the first new one; padding has no place in a clip that goes on.

    Args:
        layout: of the clip.
        count: new frames.
        first: number of the first of them; those before it are left out.
    """
    start, step = fast_frames(layout)[-1], index_step(layout)
    last = layout.frame_index[start]
    kept = list(frames_of(_before(layout, last + step)))
    new = range(last + step * (first + 1), last + step * (first + count + 1), step)
    return FrameLayout(
        frame_index=(*(layout.frame_index[i] for i in kept), *new),
        stream=(*(layout.stream[i] for i in kept), *(FAST,) * count),
        valid=(True,) * (len(kept) + count),
        clip=(layout.clip[start],) * (len(kept) + count),
        patches=(*(layout.patches[i] for i in kept), *(layout.patches[start],) * count),
    )


def beyond_clip(layout: FrameLayout, rule: Callable[[FrameLayout], FrameMask], steps: int | None) -> Continuation:
    """`steps` frames behind the last fast frame of a clip that has one, or frames without end.

    Args:
        layout: of the clip.
        rule: the mask of a longer clip.
        steps: frames to generate; with None, or very many, the rule is asked anew on the way.
    """
    start, frames = fast_frames(layout)[-1], layout.num_frames
    known = _before(layout, layout.frame_index[start] + index_step(layout))
    kept = list(frames_of(known))

    def moved(row: int) -> int:
        return sum(1 << kept[m] for m in frames_of(row & (1 << len(kept)) - 1))

    def rows(first: int, count: int) -> list[int]:
        found = rule(extended_layout(layout, count, first)).patterns[0].rows[len(kept) :]
        # What stands behind a frame does not exist yet when its turn comes, whatever the mask says.
        return [moved(row) | (row >> len(kept) & (2 << k) - 1) << frames for k, row in enumerate(found)]

    own = rule(extended_layout(layout, 0)).patterns[0].rows
    history = _history(layout, known, {i: moved(row) for i, row in zip(kept, own, strict=True)})
    if steps is None or steps > MOST_AT_ONCE:
        return Continuation(start, (), history, Future(frames, rows(0, HORIZON), rows))
    return Continuation(start, (), history, Future(frames, rows(0, steps - 1)))


def _before(layout: FrameLayout, index: int) -> int:
    """Bitset of the valid frames before a source frame."""
    return sum(1 << i for i in range(layout.num_frames) if layout.valid[i] and layout.frame_index[i] < index)


def _history(layout: FrameLayout, known: int, rows: dict[int, int]) -> FrameMask:
    """The mask of the known frames among themselves; all others see and are seen by nobody."""
    kept = tuple(rows[i] & known if known >> i & 1 else 1 << i for i in range(layout.num_frames))
    return FrameMask((FramePattern(kept, layout.patches),))
