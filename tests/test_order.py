"""The order of samples: every sample once, in windows, from integers alone."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.batches import RankBatches
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.order import WINDOW_ATTEMPTS, SampleOrder, mix, permutation, rank_rows

# Shared machines stall now and then; nothing here is about time.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
ORDERS = st.builds(
    SampleOrder, SIZES, seed=st.integers(-5, 2**70), shuffle=st.booleans(), window_shards=st.integers(1, 14)
)


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    return [order.at(epoch, position) for position in range(len(order))]


def stored(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


@given(ORDERS, st.integers(0, 2**40))
def test_an_epoch_holds_every_sample_once(order: SampleOrder, epoch: int) -> None:
    assert sorted(epoch_of(order, epoch)) == stored(order.sizes)


@given(SIZES, st.integers(0, 9), st.integers(1, 14))
def test_unshuffled_is_the_stored_order_in_every_epoch(sizes: list[int], epoch: int, window: int) -> None:
    order = SampleOrder(sizes, seed=epoch, shuffle=False, window_shards=window)
    assert epoch_of(order, epoch) == stored(order.sizes)


@given(ORDERS, st.integers(0, 9))
def test_windows_tile_the_epoch_and_need_few_shards(order: SampleOrder, epoch: int) -> None:
    position, seen = 0, set()
    while position < len(order):
        window = order.window(epoch, position)
        assert window.start == position < window.stop
        assert len(window.shards) <= order.window_shards
        assert not seen & set(window.shards)
        seen |= set(window.shards)
        for inside in range(window.start, window.stop):
            assert order.window(epoch, inside) == window
            assert order.at(epoch, inside)[0] in window.shards
        position = window.stop
    assert {shard for shard, size in enumerate(order.sizes) if size} <= seen


@given(ORDERS, st.integers(0, 9), st.data())
def test_positions_do_not_depend_on_what_was_asked_before(order: SampleOrder, epoch: int, data: st.DataObject) -> None:
    expected = epoch_of(order, epoch)
    fresh = pickle.loads(pickle.dumps(order))
    asked = data.draw(st.lists(st.integers(0, len(order) - 1), max_size=8))
    for position in asked:
        fresh.at(epoch + position, position)
        assert fresh.at(epoch, position) == expected[position]


@given(ORDERS, st.integers(0, 9), st.integers(1, 40))
def test_neighbouring_positions_touch_as_few_shards_as_is_said(order: SampleOrder, epoch: int, k: int) -> None:
    shards = [shard for shard, _ in epoch_of(order, epoch)]
    touched = max(len(set(shards[start : start + k])) for start in range(len(shards)))
    assert touched <= order.shards_within(k)


def test_the_bound_on_shards_is_reached() -> None:
    order = SampleOrder([2] * 40, window_shards=4)  # windows of 8 samples
    assert [order.shards_within(k) for k in (0, 1, 2, 8, 9, 10, 18, 10**9)] == [0, 1, 2, 8, 8, 10, 16, 40]
    epochs = [[shard for shard, _ in epoch_of(order, epoch)] for epoch in range(60)]
    assert max(len(set(e[start : start + 6])) for e in epochs for start in range(74)) == 6


def test_epochs_seeds_and_windows_give_other_orders() -> None:
    sizes = [25] * 8
    epochs = [tuple(epoch_of(SampleOrder(sizes, seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    epochs.append(tuple(epoch_of(SampleOrder(sizes, window_shards=8), 0)))
    assert len(set(epochs)) == len(epochs)


def test_shuffling_mixes_the_shards_of_a_window_evenly() -> None:
    order = SampleOrder([250] * 4, window_shards=4)
    first_half = [order.at(0, position)[0] for position in range(500)]
    assert all(90 < first_half.count(shard) < 160 for shard in range(4))


def test_every_shard_leads_sometimes() -> None:
    order = SampleOrder([1] * 6, window_shards=1)
    assert {order.at(epoch, 0)[0] for epoch in range(80)} == set(range(6))


def test_the_order_is_the_same_on_every_version() -> None:
    """Numbers frozen on purpose: a change here changes the data order of every saved run."""
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0
    assert mix(1, 2, 3) == 0xEABCFA2C623C5A59
    assert permutation(8, 7).tolist() == [7, 1, 3, 2, 0, 5, 6, 4]
    order = SampleOrder([2, 1, 3, 2], seed=5, window_shards=2)
    assert epoch_of(order, 1) == [(2, 2), (2, 0), (2, 1), (3, 1), (3, 0), (0, 0), (1, 0), (0, 1)]


@given(ORDERS, st.integers(0, 9), st.data())
def test_spares_are_other_samples_from_the_window_first(order: SampleOrder, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(order) - 1))
    failed, window = order.at(epoch, position), order.window(epoch, position)
    others, total = window.stop - window.start - 1, len(order)
    spares = [order.spare(epoch, position, attempt) for attempt in range(total + 2)]
    assert spares == [order.spare(epoch, position, attempt) for attempt in range(total + 2)]
    if total == 1:
        assert set(spares) == {failed}
        return
    assert failed not in spares
    near = others if total == others + 1 else min(others, WINDOW_ATTEMPTS)
    assert all(shard in window.shards for shard, _ in spares[:near])
    assert len(set(spares[:near])) == near
    outside = total - others - 1
    if outside:
        rest = spares[near : near + outside]
        assert len(set(rest)) == len(rest)
        assert not {shard for shard, _ in rest} & set(window.shards)


def test_spares_of_neighbours_are_spread() -> None:
    order = SampleOrder([100])
    first = {order.spare(0, position, 0) for position in range(100)}
    assert len(first) > 40


@given(st.integers(1, 200), st.integers(1, 17))
def test_ranks_partition_the_rows_of_a_global_batch(rows: int, world_size: int) -> None:
    parts = [rank_rows(rows, rank, world_size) for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert rows % world_size or len(set(map(len, parts))) == 1


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5), st.integers(0, 70), st.booleans())
def test_ranks_deliver_the_rest_of_an_epoch_once_and_in_step(
    samples: int, batch_size: int, world_size: int, start: int, drop_last: bool
) -> None:
    size = batch_size * world_size
    ranks = [RankBatches(samples, size, rank, world_size, drop_last) for rank in range(world_size)]
    for rank in ranks:
        rank.epoch, rank.start = 7, start
    delivered = list(zip(*ranks, strict=True))  # strict: all ranks have equally many batches
    ends = list(ranks[0].ends())
    assert len(ends) == len(delivered)
    end = start
    for parts, after in zip(delivered, ends, strict=True):
        positions = [position for rows in parts if not rows.padding for position in rows.positions]
        assert positions == list(range(end, after))
        assert {rows.epoch for rows in parts} == {7}
        assert all(1 <= len(rows.positions) <= batch_size for rows in parts)
        assert all(end <= position < after for rows in parts for position in rows.positions)
        assert len(positions) == size or (after == samples and not drop_last)
        end = after
    assert start >= samples or (0 <= samples - end < size if drop_last else end == samples)
    if not start:
        assert len(delivered) == len(ranks[0])


@given(st.integers(1, 4000), st.integers(0, 99))
def test_permutation_is_one(count: int, seed: int) -> None:
    assert sorted(permutation(count, seed).tolist()) == list(range(count))


def test_random_access_does_not_walk_the_dataset() -> None:
    order = SampleOrder([1000] * 50_000)  # fifty million samples
    shard, sample = order.at(3, 49_999_999)
    assert 0 <= shard < 50_000
    assert 0 <= sample < 1000
    assert len(pickle.dumps(order)) < 400_000


@pytest.mark.parametrize(
    ("sizes", "window", "text"),
    [
        ([], 4, "no sample"),
        ([0, 0], 4, "no sample"),
        ([3, -1], 4, "negative"),
        ([3], 0, "window_shards is 0"),
    ],
)
def test_impossible_orders_are_refused(sizes: list[int], window: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SampleOrder(sizes, window_shards=window)


@pytest.mark.parametrize("position", [-1, 3])
def test_positions_outside_the_epoch_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match="outside an epoch of 3 samples"):
        SampleOrder([3]).at(0, position)
