"""Which rectangles of the attention matrix are computed in one call, forward and backward (pure).

The kernel pays for shape as well as for area: a strip of 256 queries over 4,096 keys takes a quarter longer, backward,
than its share of the whole square does, and every strip adds its gradient to all its keys once more. Forward, each
query needs all its keys in one call, so there are strips: one for each set of keys. Backward, softmax sums and outputs
are known, a query's keys may come in several calls, and the strips of neighbouring frames are cut into tall
rectangles over the keys that they share and short ones over what is left (tiling as in FlashAttention-2, Dao 2023, on
the level above the kernel).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from framestream.pipeline.frame_mask import Ranges, frames_of, merged_ranges

# Queries of one interval that see the same keys: (q_start, q_stop, keys).
Group = tuple[int, int, Ranges]

SHARED = 0.5  # a tall rectangle must hold this share of what its groups still have to see
LONG = 2048  # more keys than this, under fewer queries than this, are taken in several calls ...
PIECE = 1024  # ... of so many keys


class Tile(NamedTuple):
    """Every query of `queries` attends to every key of `keys`, in one call."""

    queries: Ranges
    keys: Ranges


@lru_cache(maxsize=512)
def forward_tiles(groups: tuple[Group, ...]) -> tuple[Tile, ...]:
    """One tile for each set of keys: groups that see the same keys are computed together, wherever they stand."""
    queries: dict[Ranges, list[tuple[int, int]]] = {}
    for start, stop, keys in groups:
        queries.setdefault(keys, []).append((start, stop))
    return tuple(Tile(merged_ranges(parts), keys) for keys, parts in queries.items())


@lru_cache(maxsize=512)
def backward_tiles(groups: tuple[Group, ...]) -> tuple[Tile, ...]:
    """Tiles that cover each allowed pair of query and key exactly once, in shapes that the kernel likes."""
    strips = forward_tiles(groups)
    cuts = sorted({edge for strip in strips for pair in strip.keys for edge in pair})
    segments = list(pairwise(cuts))
    place = {edge: i for i, edge in enumerate(cuts)}
    # One bitset of segments for each strip: those that it still has to see.
    left = [sum((1 << place[stop]) - (1 << place[start]) for start, stop in strip.keys) for strip in strips]
    tiles: list[Tile] = []

    def emit(first: int, last: int, found: int) -> None:
        queries = merged_ranges(pair for strip in strips[first:last] for pair in strip.queries)
        keys = merged_ranges(segments[s] for s in frames_of(found))
        short = count(queries) < LONG < count(keys)
        tiles.extend(Tile(queries, part) for part in (_pieces(keys) if short else (keys,)))

    def cover(first: int, last: int) -> None:
        if last - first == 1:
            if left[first]:
                emit(first, last, left[first])
            return
        shared = left[first]
        for row in left[first + 1 : last]:
            shared &= row
        if shared:
            heights = [count(strip.queries) for strip in strips[first:last]]
            area = sum(heights) * _width(shared, segments)
            rest = sum(h * _width(row, segments) for h, row in zip(heights, left[first:last], strict=True))
            if area >= SHARED * rest:
                emit(first, last, shared)
                for i in range(first, last):
                    left[i] &= ~shared
        if any(left[first:last]):
            middle = (first + last) // 2
            cover(first, middle)
            cover(middle, last)

    if strips:
        cover(0, len(strips))
    return tuple(tiles)


def count(ranges: Ranges) -> int:
    """Tokens in all."""
    return sum(stop - start for start, stop in ranges)


def _width(row: int, segments: Sequence[tuple[int, int]]) -> int:
    return sum(segments[s][1] - segments[s][0] for s in frames_of(row))


def _pieces(keys: Ranges) -> Iterable[Ranges]:
    """`keys` cut after every `PIECE` tokens."""
    piece: list[tuple[int, int]] = []
    room = PIECE
    for start, stop in keys:
        while start < stop:
            taken = min(room, stop - start)
            piece.append((start, start + taken))
            start, room = start + taken, room - taken
            if not room:
                yield tuple(piece)
                piece, room = [], PIECE
    if piece:
        yield tuple(piece)
