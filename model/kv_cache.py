"""Keys and values of the frames that later frames may still look at, in memory that does not grow with the others.

Which frames those are follows from the mask alone: a frame leaves as soon as no frame to come may see it, and its
place goes to the next one. Under a sliding window the places form a ring.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import or_

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.frame_mask import Ranges, frames_of, merged_ranges

from .attention import AttentionPlan, Run, equal_runs, ranges_plan
from .predictor import LayerCache, Place

MARGIN = 32  # generated frames that are remembered beyond those that can be seen


class Future:
    """What the generated frames of one clip see, and for how long each frame is seen at all.

    Frames are numbered as in the clip, 0 to F - 1; F + j is the j-th generated one, counted from `base`. A row is a
    bitset of these.

    Args:
        num_frames: F.
        rows: of generated frame 0, 1, …; all of them, or as many as are known yet.
        more: for a generation without end, gives the rows of so many generated frames from the given one on, by a clip
            in which the generated frames before it are left out. None: `rows` are all.
    """

    def __init__(
        self, num_frames: int, rows: Sequence[int], more: Callable[[int, int], Sequence[int]] | None = None
    ) -> None:
        self.num_frames = num_frames
        self.base = 0
        self._more = more
        self._set(rows)

    @property
    def known(self) -> int:
        """The first generated frame whose row is not known yet."""
        return self.base + len(self._rows)

    def number(self, step: int) -> int:
        """The number of generated frame `step`."""
        return self.num_frames + step - self.base

    def row(self, step: int) -> int:
        """The frames that generated frame `step` sees."""
        return self._rows[step - self.base]

    def needed(self, step: int) -> int:
        """The frames that generated frame `step` or a later one may see."""
        return self._needed[step - self.base]

    def look_ahead(self, step: int) -> int:
        """Learns more rows where fewer are known after `step` than before it. Returns by how much `base` moved.

        Generated frames that nobody has looked at for long are forgotten, so that a window never costs more than at
        its first turn. That is right for every rule that compares times or counts frames from the query back; it is
        checked against the rows that are known already, and not done where these would change.
        """
        local = step - self.base
        if self._more is None or 2 * local < len(self._rows):
            return 0
        generated = self._needed[local] >> self.num_frames
        oldest = min((generated & -generated).bit_length() - 1, local) if generated else local
        dropped = oldest - (local - oldest) - MARGIN
        if dropped > 0:
            rows = self._more(self.base + dropped, len(self._rows))
            clip = (1 << self.num_frames) - 1
            told = [row & clip | row >> self.num_frames + dropped << self.num_frames for row in self._rows[local:]]
            if told == list(rows[local - dropped : len(rows) - dropped]):
                self.base += dropped
                self._set(rows)
                return dropped
        self._set(self._more(self.base, 2 * len(self._rows)))
        return 0

    def _set(self, rows: Sequence[int]) -> None:
        self._rows = tuple(rows)
        self._needed = [*accumulate(reversed(self._rows), or_)][::-1] + [0]


class SlotTable:
    """Where in a key buffer the frames of one clip lie, as starts and stops of tokens.

    Args:
        lengths: tokens of each frame of the clip.
        kept: bitset of the frames that are in the buffer from the beginning, one behind the other.
        patches: tokens of a generated frame.
        reuse: give places of frames that nobody needs to new ones. Without it frames stand in the order they came.
    """

    def __init__(self, lengths: Sequence[int], kept: int, patches: int, *, reuse: bool) -> None:
        self.patches = patches
        self.reuse = reuse
        self.end = 0  # tokens that have ever been used
        self._places: dict[int, tuple[int, int]] = {}
        self._present = 0
        self._free: list[int] = []  # starts of places for one generated frame each, a heap
        for frame in frames_of(kept):
            self._add(frame, self.end, lengths[frame])

    def release(self, needed: int) -> None:
        """Gives up all frames that are not in the bitset `needed`."""
        for frame in frames_of(self._present & ~needed):
            start, stop = self._places.pop(frame)
            self._present ^= 1 << frame
            if self.reuse:
                for place in range(start, stop - self.patches + 1, self.patches):
                    heapq.heappush(self._free, place)

    def place(self, frame: int) -> int:
        """First token of the place of a new generated frame."""
        start = heapq.heappop(self._free) if self._free else self.end
        self._add(frame, start, self.patches)
        return start

    def renumber(self, num_frames: int, dropped: int) -> None:
        """Counts generated frames, which begin at `num_frames`, from a later one; those before it must be gone."""
        self._places = {f if f < num_frames else f - dropped: place for f, place in self._places.items()}
        self._present = sum(1 << frame for frame in self._places)

    def ranges(self, row: int) -> Ranges:
        """The tokens of the frames in the bitset `row`.

        Raises:
            ConfigError: one of them was given up.
        """
        if lost := row & ~self._present:
            raise ConfigError(
                f"the mask lets a frame see frame {next(iter(frames_of(lost)))} of its sequence again, which none of "
                "many frames before saw: give the number of steps, and it is kept until its last use"
            )
        return merged_ranges(self._places[frame] for frame in frames_of(row))

    def room(self, future: Future, step: int) -> int:
        """Tokens that a buffer needs for generated frame `step` and all later ones that are known."""
        trial = SlotTable((), 0, self.patches, reuse=self.reuse)
        trial.end, trial._places, trial._present = self.end, dict(self._places), self._present
        trial._free = list(self._free)
        for k in range(step, future.known):
            trial.release(future.needed(k))
            trial.place(future.number(k))
        return trial.end

    def _add(self, frame: int, start: int, length: int) -> None:
        self._places[frame] = (start, start + length)
        self._present |= 1 << frame
        self.end = max(self.end, start + length)


class KVCache:
    """The cache of a batch of clips.

    Where no gradients are recorded the keys lie in buffers that are as large as the most frames that are ever needed
    at once, and new frames are written in place. Where they are, keys are concatenated, and all are kept: the
    backward pass wants them anyway.

    Args:
        layers: keys and values of the clips' frames, as the predictor's first call returns them.
        lengths: tokens of each frame, clip by clip.
        futures: what is to come, clip by clip.
        patches: tokens of a generated frame.
        token_causal: see `plan_attention`; a frame's own tokens must then be the last of its keys.
    """

    def __init__(
        self,
        layers: list[LayerCache],
        lengths: Sequence[Sequence[int]],
        futures: Sequence[Future],
        patches: int,
        *,
        token_causal: bool = False,
    ) -> None:
        self.layers = layers
        self.key_tokens = 0  # keys that each token of the last frame saw, in the clip where they were most
        self.futures = futures
        self._patches = patches
        self._token_causal = token_causal
        self._in_place = not torch.is_grad_enabled()
        kept = [future.needed(0) if self._in_place else -1 for future in futures]
        kept = [bits & (1 << future.num_frames) - 1 for bits, future in zip(kept, futures, strict=True)]
        reuse = self._in_place and not token_causal
        self._tables = [SlotTable(own, bits, patches, reuse=reuse) for own, bits in zip(lengths, kept, strict=True)]
        if self._in_place:
            sources = []
            for own, bits in zip(lengths, kept, strict=True):
                offsets = tuple(accumulate(own, initial=0))
                sources.append(tuple((offsets[f], offsets[f + 1]) for f in frames_of(bits)))
            self._move(sources, self._room(0))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of frames, over all layers."""
        return sum(part.numel() * part.element_size() for layer in self.layers for part in layer.frames)

    def advance(self, step: int) -> tuple[AttentionPlan, tuple[Place, ...] | None]:
        """Makes room for generated frame `step`: what it attends to, and where its keys are to be written."""
        both = list(zip(self._tables, self.futures, strict=True))
        known = [future.known for future in self.futures]
        if self._in_place:
            for table, future in both:
                table.release(future.needed(step))
        moved = {future: future.look_ahead(step) for future in dict.fromkeys(self.futures)}  # clips may share one
        for table, future in both:
            if moved[future]:
                table.renumber(future.num_frames, moved[future])
        if self._in_place and known != [future.known for future in self.futures]:
            room = self._room(step)
            if room > self.layers[0].frames[0].shape[2]:
                self._move([((0, table.end),) for table in self._tables], room)
        starts = [table.place(future.number(step)) for table, future in both]
        seen = [table.ranges(future.row(step)) for table, future in both]
        self.key_tokens = max(sum(stop - start for start, stop in ranges) for ranges in seen)
        runs: list[Run] = [(first, last, ((0, self._patches, ranges),)) for first, last, ranges in equal_runs(seen)]
        plan = ranges_plan(tuple(runs), token_causal=self._token_causal)
        return plan, tuple(equal_runs(starts)) if self._in_place else None

    def _room(self, step: int) -> int:
        return max(table.room(future, step) for table, future in zip(self._tables, self.futures, strict=True))

    def _move(self, sources: Sequence[Ranges], room: int) -> None:
        """New buffers for `room` tokens, with the tokens of `sources` of each clip at their beginning."""

        def moved(old: Tensor) -> Tensor:
            new = old.new_empty(*old.shape[:2], room, old.shape[3])
            for first, last, ranges in equal_runs(sources):
                at = 0
                for start, stop in ranges:
                    new[first:last, :, at : at + stop - start] = old[first:last, :, start:stop]
                    at += stop - start
            return new

        # One layer after the other, so that what is let go of is free before the next is made.
        for i, layer in enumerate(self.layers):
            self.layers[i] = LayerCache((moved(layer.frames[0]), moved(layer.frames[1])), layer.context)
