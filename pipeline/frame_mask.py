"""A mask over tokens as what it really is: a small frame matrix `[F, F]` and the tokens of each frame.

Every other form (dense, FlexAttention's `BlockMask`, key ranges, a picture) follows from it. `FrameMask` therefore
holds no tensor: it is one bitset per query frame, frozen and hashable, a few hundred bytes on its way out of a
worker process, and the heavy forms are cached per mask on the side that uses them. True = may attend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Ranges = tuple[tuple[int, int], ...]  # disjoint, ascending (start, stop) in tokens


class QueryGroup(NamedTuple):
    """Query tokens `start:stop` attend to exactly the tokens of `keys`, disjoint ascending (start, stop) pairs."""

    start: int
    stop: int
    keys: Ranges


@dataclass(frozen=True)
class FramePattern:
    """One `[F, F]` frame matrix: bit j of `rows[i]` says that query frame i may attend to key frame j."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    def offsets(self) -> tuple[int, ...]:
        """First token of each frame, and N: `[F + 1]`."""
        return tuple(accumulate(self.lengths, initial=0))

    def matrix(self) -> np.ndarray:
        """bool `[F, F]`."""
        frames = len(self.lengths)
        width = (frames + 7) // 8
        packed = np.frombuffer(b"".join(row.to_bytes(width, "little") for row in self.rows), dtype=np.uint8)
        return np.unpackbits(packed.reshape(frames, width), axis=1, count=frames, bitorder="little").astype(bool)

    def allowed_pairs(self) -> int:
        """Token pairs that may attend, out of N * N."""
        return sum(
            length * sum(self.lengths[j] for j in frames_of(row))
            for row, length in zip(self.rows, self.lengths, strict=True)
        )

    def reach(self, num_layers: int) -> FramePattern:
        """Who can be influenced by whom through `num_layers` layers with residuals: `(A | I)^L`."""
        reached = tuple(1 << i for i in range(len(self.rows)))
        for _ in range(num_layers):
            step = []
            for i, row in enumerate(self.rows):
                seen = reached[i]
                for j in frames_of(row):
                    seen |= reached[j]
                step.append(seen)
            if tuple(step) == reached:
                break
            reached = tuple(step)
        return FramePattern(reached, self.lengths)


@dataclass(frozen=True)
class FrameMask:
    """Which frames may attend to which: `[F, F]`, or `[B, F, F]` with a batch axis.

    Clips of a batch that share a pattern share it here too.

    Attributes:
        patterns: the distinct frame matrices.
        clips: for each clip of the batch the index of its pattern; None without a batch axis.
    """

    patterns: tuple[FramePattern, ...]
    clips: tuple[int, ...] | None = None

    @classmethod
    def from_matrix(cls, matrix: torch.Tensor | np.ndarray, patches: int | Sequence[int]) -> FrameMask:
        """From bool `[F, F]` or `[B, F, F]` (query, key) and the tokens per frame (an int, or `[F]`)."""
        array = np.asarray(matrix.cpu() if isinstance(matrix, torch.Tensor) else matrix)
        if array.dtype != bool or array.ndim not in (2, 3) or array.shape[-1] != array.shape[-2]:
            raise ConfigError(
                f"FrameMask.from_matrix needs bool [F, F] or [B, F, F], got {array.dtype} {list(array.shape)}."
            )
        frames = array.shape[-1]
        lengths = (int(patches),) * frames if isinstance(patches, (int, np.integer)) else tuple(map(int, patches))
        if len(lengths) != frames or min(lengths, default=0) < 1:
            raise ConfigError(f"patches must be positive, one entry for each of {frames} frames; got {patches!r}.")
        if array.ndim == 2:
            return cls((FramePattern(_rows(array), lengths),))
        return cls.stack([cls((FramePattern(_rows(one), lengths),)) for one in array])

    @classmethod
    def stack(cls, masks: Sequence[FrameMask]) -> FrameMask:
        """Give masks of single clips a batch axis. All need the same number of frames and of tokens."""
        if not masks or any(mask.clips is not None for mask in masks):
            raise ConfigError("FrameMask.stack needs at least one mask, and masks without a batch axis only.")
        shapes = {(mask.num_frames, mask.num_tokens) for mask in masks}
        if len(shapes) > 1:
            raise ConfigError(
                f"FrameMask.stack needs clips of equal (frames, tokens), got {sorted(shapes)}; "
                "sample them with one sampling, or pack them."
            )
        patterns = list(dict.fromkeys(mask.patterns[0] for mask in masks))
        place = {pattern: k for k, pattern in enumerate(patterns)}
        return cls(tuple(patterns), tuple(place[mask.patterns[0]] for mask in masks))

    @classmethod
    def diagonal(cls, masks: Sequence[FrameMask]) -> FrameMask:
        """Put clips one behind another in one sequence: each keeps its own mask, and none sees another."""
        if not masks or any(mask.clips is not None for mask in masks):
            raise ConfigError("FrameMask.diagonal needs at least one mask, and masks without a batch axis only.")
        rows: list[int] = []
        lengths: list[int] = []
        for pattern in (mask.patterns[0] for mask in masks):
            rows += [row << len(lengths) for row in pattern.rows]
            lengths += pattern.lengths
        return cls((FramePattern(tuple(rows), tuple(lengths)),))

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.patterns[0].lengths)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.patterns[0].num_tokens

    @property
    def batch_size(self) -> int | None:
        """B, or None without a batch axis."""
        return None if self.clips is None else len(self.clips)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(F, F)` or `(B, F, F)`."""
        frames = (self.num_frames, self.num_frames)
        return frames if self.clips is None else (len(self.clips), *frames)

    @property
    def density(self) -> float:
        """Share of token pairs that may attend."""
        allowed = [pattern.allowed_pairs() for pattern in self.patterns]
        each = [allowed[k] for k in self.clips or (0,)]
        return sum(each) / len(each) / self.num_tokens**2

    def __getitem__(self, clip: int) -> FrameMask:
        """The mask of one clip, without a batch axis."""
        if self.clips is None:
            raise ConfigError("this FrameMask has no batch axis to index.")
        return FrameMask((self.patterns[self.clips[clip]],))

    def __len__(self) -> int:
        if self.clips is None:
            raise TypeError("a FrameMask without a batch axis has no length")
        return len(self.clips)

    def __and__(self, other: FrameMask) -> FrameMask:
        return self._combine(other, lambda a, b: a & b)

    def __or__(self, other: FrameMask) -> FrameMask:
        return self._combine(other, lambda a, b: a | b)

    def _combine(self, other: FrameMask, operate: Callable[[int, int], int]) -> FrameMask:
        if not isinstance(other, FrameMask):
            return NotImplemented
        if self.clips is None and other.clips is None:
            a, b = self.patterns[0], other.patterns[0]
            if a.lengths != b.lengths:
                raise ConfigError("masks combine only over the same frames and patches per frame.")
            return FrameMask((FramePattern(tuple(map(operate, a.rows, b.rows)), a.lengths),))
        size = len(self.clips or other.clips or ())
        if {self.batch_size, other.batch_size} - {None, size}:
            raise ConfigError(f"masks of {self.batch_size} and {other.batch_size} clips do not combine.")
        pairs = [(m if m.clips is None else m[i]) for i in range(size) for m in (self, other)]
        return FrameMask.stack([a._combine(b, operate) for a, b in zip(pairs[::2], pairs[1::2], strict=True)])

    def reach(self, num_layers: int) -> FrameMask:
        """The boolean power `(A | I)^L`: what can reach what through the layers of a model."""
        reached = [FrameMask((pattern.reach(num_layers),)) for pattern in self.patterns]
        return reached[0] if self.clips is None else FrameMask.stack([reached[k] for k in self.clips])

    # -- forms -------------------------------------------------------------------------------------------

    def matrix(self) -> torch.Tensor:
        """bool `[F, F]` or `[B, F, F]`."""
        matrices = [torch.from_numpy(pattern.matrix()) for pattern in self.patterns]
        return matrices[0] if self.clips is None else torch.stack([matrices[k] for k in self.clips])

    def dense(self, device: torch.device | str | None = None) -> torch.Tensor:
        """bool `[N, N]` or `[B, 1, N, N]`: the reference, for tests and debugging."""
        return _dense(self, str(device or "cpu"))

    def block_mask(self, device: torch.device | str = "cpu", block_size: int = 128) -> BlockMask:
        """FlexAttention's `BlockMask`, equal to `create_block_mask`'s, without visiting token pairs.

        Where all clips share one pattern its batch axis is 1, which FlexAttention broadcasts.
        """
        return _block_mask(self, str(device), block_size)

    def ranges(self) -> tuple[tuple[QueryGroup, ...], ...]:
        """For each pattern the groups of query tokens with their key ranges, in order and without gaps."""
        return tuple(_ranges(pattern) for pattern in self.patterns)

    def prepare(self, device: torch.device | str, backend: str = "auto", block_size: int = 128) -> FrameMask:
        """Build the form that an attention backend will ask for now, so that it is a cache hit in the step."""
        if backend == "flex" or (backend == "auto" and torch.device(device).type == "cuda"):
            self.block_mask(device, block_size)
        elif backend in ("auto", "ranges"):
            self.ranges()
        return self

    def to(self, *args: Any, **kwargs: Any) -> FrameMask:
        """Itself: there is nothing to move. Exists so that a mask travels in a batch."""
        return self

    def pin_memory(self, *args: Any) -> FrameMask:
        """Itself, as `to`."""
        return self

    def plot(self, path: str | Path, title: str | None = None, streams: Sequence[int] | None = None) -> Path:
        """Write a picture of the frame matrix (of the first clip): rows are queries, columns are keys."""
        from .mask_plot import plot_matrix

        return plot_matrix(self.patterns[0 if self.clips is None else self.clips[0]].matrix(), path, title, streams)


def frames_of(row: int) -> Iterable[int]:
    """The frames whose bits are set in a row, ascending."""
    while row:
        low = row & -row
        yield low.bit_length() - 1
        row ^= low


def merged_ranges(parts: Iterable[tuple[int, int]]) -> Ranges:
    """Disjoint intervals in ascending order, those that adjoin as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)


def _rows(matrix: np.ndarray) -> tuple[int, ...]:
    return tuple(sum(1 << int(j) for j in np.flatnonzero(row)) for row in matrix)


@lru_cache(maxsize=1024)
def _ranges(pattern: FramePattern) -> tuple[QueryGroup, ...]:
    offsets = pattern.offsets()
    groups: list[QueryGroup] = []
    for i, row in enumerate(pattern.rows):
        keys = merged_ranges((offsets[j], offsets[j + 1]) for j in frames_of(row))
        if groups and groups[-1].keys == keys:
            groups[-1] = groups[-1]._replace(stop=offsets[i + 1])
        else:
            groups.append(QueryGroup(offsets[i], offsets[i + 1], keys))
    return tuple(groups)


@lru_cache(maxsize=1)  # the reference is large: keep only what the layers of one model share
def _dense(mask: FrameMask, device: str) -> torch.Tensor:
    each = []
    for pattern in mask.patterns:
        lengths = torch.tensor(pattern.lengths)
        matrix = torch.from_numpy(pattern.matrix())
        each.append(matrix.repeat_interleave(lengths, 0).repeat_interleave(lengths, 1).to(device))
    return each[0] if mask.clips is None else torch.stack([each[k] for k in mask.clips])[:, None]


@lru_cache(maxsize=64)
def _block_mask(mask: FrameMask, device: str, block_size: int) -> BlockMask:
    from .block_mask import build_block_mask

    return build_block_mask(mask, device, block_size)
