"""Where keys lie, and when their places are given to others."""

from __future__ import annotations

import pytest
import torch

from framestream.model.kv_cache import Future, KVCache, SlotTable
from framestream.model.predictor import LayerCache
from framestream.pipeline.errors import ConfigError


def window(frames: int, size: int, steps: int) -> Future:
    """Generated frames that see the last `size` frames, themselves included."""
    return Future(frames, [((1 << size) - 1) << max(frames + k + 1 - size, 0) for k in range(steps)])


def test_what_is_still_needed_follows_from_the_rows() -> None:
    future = Future(2, [0b0101, 0b1000, 0b10010])
    assert [future.needed(k) for k in range(4)] == [0b11111, 0b11010, 0b10010, 0]
    assert Future(2, []).needed(0) == 0


def endless(frames: int, size: int, asked: list[tuple[int, int]]) -> Future:
    """The last `size` frames, of which every third is left out."""

    def more(first: int, count: int) -> list[int]:
        asked.append((first, count))
        clip = [-k for k in range(frames, 0, -1)]
        moments = [*clip, *range(first, first + count)]
        return [
            sum(1 << j for j, m in enumerate(moments) if 0 <= now - m < size and (now == m or m % 3))
            for now in range(first, first + count)
        ]

    return Future(frames, more(0, 64), more)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_rows_without_end_are_learned_in_time_and_old_ones_forgotten(size: int) -> None:
    asked: list[tuple[int, int]] = []
    future = endless(4, size, asked)
    for step in range(1000):
        before = future.base
        assert future.look_ahead(step) == future.base - before
        seen = [n - future.number(0) for n in range(2000) if future.row(step) >> n & 1 and n >= 4]
        assert seen == [k for k in range(max(step - size + 1, 0), step + 1) if k == step or k % 3]
        assert future.known > step + 1
    assert max(count for _, count in asked) <= 8 * max(size, 32)
    assert future.base > 700


def test_nothing_is_forgotten_where_all_of_it_is_seen() -> None:
    asked: list[tuple[int, int]] = []
    future = endless(4, 10**6, asked)
    for step in range(200):
        assert future.look_ahead(step) == 0
    assert asked == [(0, 64), (0, 128), (0, 256), (0, 512)]


def test_nothing_is_forgotten_where_the_rule_would_say_something_else_then() -> None:
    def more(first: int, count: int) -> list[int]:
        """Pairs of neighbours, counted from the beginning of what is given."""
        return [(1 << k) | (1 << (k - k % 2)) for k in range(count)]

    odd = Future(0, more(0, 64), more)
    shifts = [odd.look_ahead(step) for step in range(500)]
    assert all(shift % 2 == 0 for shift in shifts)
    assert all(odd.row(499) >> odd.number(k) & 1 == (k in (498, 499)) for k in range(odd.base, 500))


def test_places_are_a_ring_under_a_window() -> None:
    table = SlotTable([4] * 5, 0b11100, patches=4, reuse=True)
    future = window(5, 3, 50)
    assert table.room(future, 0) == 12
    starts = []
    for step in range(50):
        table.release(future.needed(step))
        starts.append(table.place(5 + step))
        assert table.ranges(future.row(step)) == ((0, 12),)
    assert starts == ([0, 4, 8] * 17)[:50]
    assert table.end == 12
    with pytest.raises(ConfigError, match=r"frame 4 of its sequence again"):
        table.ranges(1 << 4)


def test_a_place_of_many_tokens_is_given_to_several_frames_and_one_too_small_to_none() -> None:
    table = SlotTable([9, 3, 4], 0b111, patches=4, reuse=True)
    table.release(0)
    assert [table.place(frame) for frame in (3, 4, 5, 6)] == [0, 4, 12, 16]
    assert table.ranges(0b1101000) == ((0, 4), (12, 20))
    assert table.end == 20


def test_without_reuse_frames_stand_in_the_order_they_came() -> None:
    table = SlotTable([4, 4], 0b11, patches=4, reuse=False)
    table.release(0)
    assert [table.place(frame) for frame in (2, 3)] == [8, 12]


@torch.no_grad()
def test_buffers_hold_what_is_needed_of_each_clip_and_nothing_else() -> None:
    """Two clips that need other frames of their history; values are the tokens' own numbers."""
    keys = torch.arange(2.0)[:, None, None, None] * 100 + torch.arange(8.0)[None, None, :, None].expand(2, 1, 8, 1)
    lengths = [[2, 4, 2], [4, 2, 2]]
    futures = [Future(3, [0b1001, 0b11000]), Future(3, [0b1110, 0b10010])]
    cache = KVCache([LayerCache((keys, -keys), (keys, keys))], lengths, futures, patches=2)
    assert cache.nbytes == 2 * 2 * 6 * 4  # keys and values, clips, tokens of the fuller one, bytes
    plan, places = cache.advance(0)
    assert places == ((0, 1, 2), (1, 2, 4))
    assert plan.runs == ((0, 1, ((0, 2, ((0, 4),)),)), (1, 2, ((0, 2, ((0, 6),)),)))
    assert cache.key_tokens == 6
    kept, values = cache.layers[0].frames
    assert kept[0, 0, :2, 0].tolist() == [0, 1]
    assert kept[1, 0, :4, 0].tolist() == [104, 105, 106, 107]
    assert torch.equal(values[1, :, :4], -kept[1, :, :4])
    plan, places = cache.advance(1)
    assert places == ((0, 1, 0), (1, 2, 2))  # frame 0 of the one is no longer needed, and frame 2 of the other
    assert plan.runs == ((0, 2, ((0, 2, ((0, 4),)),)),)


def test_where_gradients_are_recorded_everything_is_kept_and_nothing_written_over() -> None:
    keys = torch.randn(1, 1, 6, 1, requires_grad=True)
    cache = KVCache([LayerCache((keys, keys), (keys, keys))], [[2, 2, 2]], [window(3, 2, 3)], patches=2)
    assert cache.layers[0].frames[0] is keys
    for step in range(3):
        plan, places = cache.advance(step)
        assert places is None
        assert plan.runs == ((0, 1, ((0, 2, ((4 + 2 * step, 8 + 2 * step),)),)),)
