"""Several clips of different length in one sequence: which go together, and how all sequences get one shape.

Pure functions of the clips of one batch and their order, so that the result is the same in any worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .errors import ConfigError
from .frame_mask import FrameMask
from .layout import FrameLayout


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Which items share a bin: the largest first, each into the first bin that has room for it.

    Never more than 11/9 of the fewest bins possible, and 6/9 of a bin (Dósa 2007). Of equal sizes the first comes
    first; within a bin items keep their order, and bins stand in the order of their first items.

    Args:
        sizes: of each item, none larger than `capacity`.
        capacity: of each bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found = next((k for k, left in enumerate(room) if sizes[item] <= left), None)
        if found is None:
            found = len(bins)
            bins.append([])
            room.append(capacity)
        bins[found].append(item)
        room[found] -= sizes[item]
    return tuple(sorted(tuple(sorted(items)) for items in bins))


@dataclass(frozen=True)
class Packing:
    """Where the clips of a batch stand: B sequences of F frames and N tokens.

    Attributes:
        sequences: for each sequence the clips in it, by their place in the batch, ascending.
        padding: for each sequence the tokens of each frame that fills it up, behind its clips.
        num_frames: F.
        num_tokens: N.
        fill_rate: share of the B x N tokens that belong to clips, 0 to 1.
    """

    sequences: tuple[tuple[int, ...], ...]
    padding: tuple[tuple[int, ...], ...]
    num_frames: int
    num_tokens: int
    fill_rate: float

    @classmethod
    def of(cls, layouts: Sequence[FrameLayout], pack_to: int) -> Packing:
        """Pack clips, each of at most `pack_to` tokens.

        Where all frames have one number of tokens, every sequence has as many frames as fit into `pack_to`, whatever
        the batch. Where streams differ in it, N is `pack_to` and F depends on the batch; only where a sequence
        that is full has fewer frames than another, N is larger, by a token for each frame that it lacks.
        """
        counts = {count for layout in layouts for count in layout.patches}
        sequences = first_fit_decreasing([layout.num_tokens for layout in layouts], pack_to)
        lengths = [tuple(n for clip in clips for n in layouts[clip].patches) for clips in sequences]
        frames, tokens = _common_shape(lengths, counts, pack_to)
        padding = tuple(_spread(tokens - sum(own), frames - len(own), max(counts)) for own in lengths)
        fill_rate = sum(map(sum, lengths)) / (len(sequences) * tokens)
        return cls(sequences, padding, frames, tokens, fill_rate)

    def lay_out(self, values: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        """`[f, ...]` of the frames of each clip to `[B, F, ...]`; `fill` stands in frames that are padding."""
        packed = values[0].new_empty((len(self.sequences), self.num_frames, *values[0].shape[1:]))
        for row, clips in zip(packed, self.sequences, strict=True):
            stop = 0
            for clip in clips:
                start, stop = stop, stop + len(values[clip])
                row[start:stop] = values[clip]
            row[stop:] = fill
        return packed

    def token_ids(self, ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[n]` of the tokens of each clip to `[B, N]`; 0 stands in tokens that are padding."""
        packed = ids[0].new_zeros(len(self.sequences), self.num_tokens)
        for row, clips in zip(packed, self.sequences, strict=True):
            own = torch.cat([ids[clip] for clip in clips])
            row[: len(own)] = own
        return packed

    def mask(self, masks: Sequence[FrameMask]) -> FrameMask:
        """The masks of clips to that of the sequences: no clip sees another, and padding only itself."""
        rows = []
        for clips, padding in zip(self.sequences, self.padding, strict=True):
            parts = [masks[clip] for clip in clips]
            if padding:
                parts.append(FrameMask.from_matrix(np.eye(len(padding), dtype=bool), padding))
            rows.append(FrameMask.diagonal(parts))
        return FrameMask.stack(rows)


def check_clip_fits(num_tokens: int, pack_to: int, what: str) -> None:
    """Raise a ConfigError that names `what` and the numbers where a clip alone is longer than a sequence."""
    if num_tokens > pack_to:
        raise ConfigError(
            f"{what} has {num_tokens} tokens, and a packed sequence holds pack_to={pack_to}; a clip is never cut, so "
            f"set pack_to to at least {num_tokens}, or sample fewer frames."
        )


def _common_shape(lengths: Sequence[tuple[int, ...]], counts: set[int], pack_to: int) -> tuple[int, int]:
    """Frames and tokens that every sequence can have, with padding frames of 1 to `max(counts)` tokens."""
    widest = max(counts)
    if len(counts) == 1:
        return pack_to // widest, pack_to // widest * widest
    frames = max(map(len, lengths))
    while True:
        tokens = max(pack_to, *(sum(own) + frames - len(own) for own in lengths))
        if all(tokens - sum(own) <= (frames - len(own)) * widest for own in lengths):
            return frames, tokens
        frames += 1


def _spread(tokens: int, frames: int, widest: int) -> tuple[int, ...]:
    """`tokens` over `frames`: the widest first, and at least one for each."""
    counts = []
    for after in reversed(range(frames)):
        counts.append(min(widest, tokens - after))
        tokens -= counts[-1]
    return tuple(counts)
