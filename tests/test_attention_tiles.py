"""Tiles of the attention matrix: each allowed pair once, no other, in shapes that suit the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.model.attention import frame_attention
from framestream.model.attention_tiles import LONG, PIECE, Group, Tile, backward_tiles, count, forward_tiles
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import RULES, FrameMask, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling


def groups_of(mask: FrameMask) -> tuple[Group, ...]:
    return tuple((g.start, g.stop, g.keys) for g in mask.ranges()[0])


def times_computed(tiles: tuple[Tile, ...], tokens: int) -> np.ndarray:
    """How often each pair of query and key is in a tile."""
    pairs = np.zeros((tokens, tokens), dtype=int)
    for tile in tiles:
        queries = np.concatenate([np.arange(*pair) for pair in tile.queries])
        keys = np.concatenate([np.arange(*pair) for pair in tile.keys])
        pairs[np.ix_(queries, keys)] += 1
    return pairs


@given(frames=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_allowed_pair_is_in_one_tile_and_no_other_pair_in_any(frames: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=frames**2, max_size=frames**2))
    matrix = np.array(bits).reshape(frames, frames) | np.eye(frames, dtype=bool)
    mask = FrameMask.from_matrix(matrix, data.draw(st.lists(st.integers(1, 4), min_size=frames, max_size=frames)))
    groups = groups_of(mask)
    for tiles in (forward_tiles(groups), backward_tiles(groups)):
        np.testing.assert_array_equal(times_computed(tiles, mask.num_tokens), mask.dense().numpy())


@pytest.mark.parametrize("order", ["concat", "interleave"])
@pytest.mark.parametrize("rule", RULES)
def test_forward_has_one_call_for_each_set_of_keys(rule: str, order: str) -> None:
    plan = FastSlowSampling(num_fast=6, num_slow=6, order=order).plan(40)  # type: ignore[arg-type]
    mask = make_mask(rule, FrameLayout.from_plan(plan, patches=3))
    tiles = forward_tiles(groups_of(mask))
    assert len(tiles) == len(set(mask.patterns[0].rows))
    assert sum(count(tile.queries) for tile in tiles) == mask.num_tokens


def test_slow_frames_that_stand_apart_are_one_call() -> None:
    plan = FastSlowSampling(num_fast=8, num_slow=8, order="interleave").plan(64)
    tiles = forward_tiles(groups_of(make_mask("fast_slow", FrameLayout.from_plan(plan, patches=16))))
    assert len(tiles) == 9
    assert max(count(tile.queries) for tile in tiles) == 8 * 16


def test_backward_tiles_are_tall_and_never_long_strips() -> None:
    mask = make_mask("frame_causal", FrameLayout.from_plan(DenseSampling(32).plan(32), patches=256))
    strips, tiles = forward_tiles(groups_of(mask)), backward_tiles(groups_of(mask))
    # What is added up for queries and keys besides the products themselves, in tokens.
    assert _added(tiles) < 0.5 * _added(strips)
    assert all(count(tile.queries) >= LONG or count(tile.keys) <= LONG for tile in tiles)


def test_a_long_strip_is_cut_into_pieces() -> None:
    matrix = np.eye(3, dtype=bool)
    matrix[0] = True
    mask = FrameMask.from_matrix(matrix, [256, 1500, 1044])
    tiles = [tile for tile in backward_tiles(groups_of(mask)) if tile.queries == ((0, 256),)]
    assert [count(tile.keys) for tile in tiles] == [PIECE, PIECE, 2800 - 2 * PIECE]
    q, k, v = (torch.randn(1, 1, 2800, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grads = [
        torch.autograd.grad(frame_attention(q, k, v, mask, backend).square().sum(), (q, k, v))
        for backend in ("ranges", "dense")
    ]
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-8)


def _added(tiles: tuple[Tile, ...]) -> int:
    return sum(count(tile.queries) + 2 * count(tile.keys) for tile in tiles)
