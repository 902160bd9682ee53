"""Mixtures: shares held to within one draw, nothing lost or repeated, and exact resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.batches import RankBatches
from framestream.pipeline.clip_order import ClipOrder, part_seed
from framestream.pipeline.errors import ConfigError, StateError
from framestream.pipeline.mixture import MAX_PERIOD, MixtureSchedule, whole_weights
from framestream.pipeline.order import SampleOrder

from loader_setup import keys, make_loader, stream, write_shards
from synthetic_shards import make_shards

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(tuple)
SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


# -- the schedule ----------------------------------------------------------------------------------------


@given(WEIGHTS)
def test_every_dataset_is_within_one_draw_of_its_share_at_every_moment(weights: tuple[int, ...]) -> None:
    schedule = MixtureSchedule(weights)
    counts = [0] * len(weights)
    for draw in range(schedule.period + 7):
        assert schedule.counts(draw) == tuple(counts)
        part, before = schedule.at(draw)
        assert before == counts[part]
        counts[part] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - (draw + 1) * weight / schedule.period) < 1
    assert MixtureSchedule(weights).counts(schedule.period * 10**9) == tuple(10**9 * weight for weight in weights)


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([3, 1], (3, 1)),
        ([30, 10.0], (3, 1)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([0.05], (1,)),
        ([1e-9, 1], (1, MAX_PERIOD - 1)),
        ([1e9, 1, 1, 1], (MAX_PERIOD - 3, 1, 1, 1)),
        ([2.5e-3, 0.9975], (1, 399)),
    ],
)
def test_weights_are_taken_as_written(weights: list[float], whole: tuple[int, ...]) -> None:
    assert whole_weights(weights) == whole


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_any_weights_become_whole_numbers_close_to_them(weights: list[float]) -> None:
    whole = whole_weights(weights)
    assert sum(whole) <= MAX_PERIOD
    for weight, number in zip(weights, whole, strict=True):
        assert number >= 1
        assert abs(number / sum(whole) - weight / sum(weights)) < 2 * len(weights) / MAX_PERIOD


# -- the order -------------------------------------------------------------------------------------------

MIXTURES = st.lists(st.tuples(SIZES, st.integers(1, 9)), min_size=1, max_size=4)


def order_of(parts: list[tuple[list[int], int]], seed: int, shuffle: bool, samples: int | None = None) -> ClipOrder:
    orders = [
        SampleOrder(sizes, seed=part_seed(seed, number), shuffle=shuffle, window_shards=2)
        for number, (sizes, _) in enumerate(parts)
    ]
    return ClipOrder(orders, seed, MixtureSchedule(whole_weights([weight for _, weight in parts])), samples)


@given(MIXTURES, st.integers(0, 99), st.booleans(), st.integers(1, 40), st.data())
def test_each_dataset_walks_through_all_of_itself_before_it_repeats(
    parts: list[tuple[list[int], int]], seed: int, shuffle: bool, samples: int, data: st.DataObject
) -> None:
    order = order_of(parts, seed, shuffle, samples)
    assert len(order) == samples
    drawn: list[list[tuple[int, int]]] = [[] for _ in parts]
    for epoch in range(1 + 100 // samples):
        for position in range(samples):
            reached = order.reached(epoch, position)
            assert reached == [divmod(len(d), sum(sizes)) for d, (sizes, _) in zip(drawn, parts, strict=True)]
            place = order.at(epoch, position)
            drawn[place.part].append((place.shard, place.sample))
            assert order.spare(epoch, position, data.draw(st.integers(0, 3))).part == place.part
    for (sizes, _), walk in zip(parts, drawn, strict=True):
        total = sum(sizes)
        everything = [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
        for start in range(0, len(walk) - total + 1, total):
            assert sorted(walk[start : start + total]) == everything
        rest = walk[len(walk) // total * total :]
        assert len(set(rest)) == len(rest)


@given(
    st.one_of(SIZES.map(lambda sizes: [(sizes, 1)]), MIXTURES),
    st.integers(0, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_all_ranks_together_deliver_an_epoch_as_one_would(
    parts: list[tuple[list[int], int]], seed: int, world_size: int, batch_size: int, drop_last: bool, shuffle: bool
) -> None:
    """Shard sizes, ranks, batch sizes, drop_last and mixtures: nothing lost, nothing twice, equal batch counts."""
    order: ClipOrder
    if len(parts) == 1:
        order = ClipOrder([SampleOrder(parts[0][0], seed=seed, shuffle=shuffle, window_shards=2)], seed)
    else:
        order = order_of(parts, seed, shuffle)
    size = batch_size * world_size
    ranks = [RankBatches(len(order), size, rank, world_size, drop_last) for rank in range(world_size)]
    drawn = []
    for rows in zip(*ranks, strict=True):  # strict: no rank has a batch that another lacks
        drawn += [order.at(0, p) for part in rows if not part.padding for p in part.positions]
    count = len(order) // size * size if drop_last else len(order)
    assert drawn == [order.at(0, position) for position in range(count)]
    if len(parts) == 1:
        assert len(set(drawn)) == count


def test_datasets_of_one_shape_have_orders_of_their_own() -> None:
    order = order_of([([8] * 4, 1), ([8] * 4, 1)], 3, True)
    walks: list[list[tuple[int, int]]] = [[], []]
    for position in range(64):
        place = order.at(0, position)
        walks[place.part].append((place.shard, place.sample))
    assert walks[0] != walks[1]
    assert sorted(walks[0]) == sorted(walks[1])


# -- the loader ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("films"), num_samples=9, samples_per_shard=4, prefix="films")


@pytest.fixture(scope="module")
def cooking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 clips of 16 frames, one of them damaged."""
    folder = tmp_path_factory.mktemp("cooking")
    return write_shards(folder, 4, 3, bad={1}, num_frames=16)


def mixed(films: Path, cooking: Path, weights: tuple[float, float] = (3, 1), **options: Any) -> Any:
    parts = {
        "films": {"shards": str(films), "weight": weights[0]},
        "cooking": {"shards": str(cooking), "weight": weights[1]},
    }
    return make_loader(parts, max_reject_share=1.0, random_end=True, **options)


def test_batches_keep_the_shares_and_say_where_clips_are_from(films: Path, cooking: Path) -> None:
    loader = mixed(films, cooking, batch_size=4, epoch_samples=24)
    assert len(loader) == 6
    seen: Counter[str] = Counter()
    for number, batch in enumerate(loader, 1):
        names = Counter(meta["dataset"] for meta in batch["meta"])
        assert names == {"films": 3, "cooking": 1}
        for key, meta in zip(batch["keys"], batch["meta"], strict=True):
            assert meta["num_frames"] == (32 if meta["dataset"] == "films" else 16)
            if meta["dataset"] == "films":
                seen[key] += 1
        assert sum(seen.values()) == 3 * number
    assert set(seen.values()) == {2}  # 18 draws of 9 clips
    stats = loader.stats()
    assert (stats["samples/films"], stats["samples/cooking"]) == (18, 6)
    spares = [batch for batch in loader for meta in batch["meta"] if "spare_for" in meta]
    assert spares
    assert stats["rejects"] >= 1


def test_an_epoch_is_as_long_as_all_datasets_together(films: Path, cooking: Path) -> None:
    assert len(mixed(films, cooking, batch_size=1)) == 13
    other_order = {"cooking": {"shards": cooking}, "films": {"shards": films, "weight": 3}}
    loader = make_loader(other_order, max_reject_share=1.0, random_end=True, batch_size=1)
    assert keys(loader) == keys(mixed(films, cooking, batch_size=1))


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("batches", [1, 4, 6])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_is_exact(films: Path, cooking: Path, epochs: int, batches: int, shuffle: bool) -> None:
    whole = mixed(films, cooking, (2, 0.7), shuffle=shuffle)
    expected = [stream(whole) for _ in range(epochs + 2)]
    first = mixed(films, cooking, (2, 0.7), shuffle=shuffle)
    for _ in range(epochs):
        list(first)
    for _, _ in zip(range(batches), first, strict=False):
        pass
    resumed = mixed(films, cooking, (2, 0.7), shuffle=shuffle, num_workers=batches % 3)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert stream(resumed) == expected[epochs][batches:]
    assert stream(resumed) == expected[epochs + 1]
    resumed.close()


def test_ranks_share_a_mixture(films: Path, cooking: Path) -> None:
    expected = keys(mixed(films, cooking, batch_size=4))
    ranks = [keys(mixed(films, cooking, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [list(chain(*rows)) for rows in zip(*ranks, strict=True)] == expected


def test_a_state_of_another_mixture_is_refused(films: Path, cooking: Path) -> None:
    state = mixed(films, cooking).state_dict()
    mixed(films, cooking, (6, 2)).load_state_dict(state)  # the same shares
    with pytest.raises(StateError, match=r"weights was .*'films': 3.*is .*'films': 4"):
        mixed(films, cooking, (4, 1)).load_state_dict(state)
    with pytest.raises(StateError, match="data was"):
        mixed(films, films).load_state_dict(state)
    with pytest.raises(StateError, match="data was"):
        make_loader(films).load_state_dict(state)


@pytest.mark.parametrize(
    ("shards", "options", "text"),
    [
        ({}, {}, "names no dataset"),
        ({"a": "x"}, {}, "Dataset a of the mixture is 'x'"),
        ({"a": {"shard": "x"}}, {}, "unknown key shard"),
        ({"a": {"weight": 2}}, {}, "a of the mixture has no shards"),
        ({"a": {"shards": "x", "weight": 0}}, {}, "weight 0"),
        ({"a": {"shards": "x", "weight": "3"}}, {}, "weight '3'"),
        ({"a": {"shards": "x", "weight": float("nan")}}, {}, "weight nan"),
        ({3: {"shards": "x"}}, {}, "calls a dataset 3"),
    ],
)
def test_impossible_mixtures_are_refused(shards: Mapping[Any, Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_loader(shards, **options)


def test_epoch_samples_is_for_mixtures(films: Path) -> None:
    with pytest.raises(ConfigError, match="epoch_samples is for mixtures"):
        make_loader(films, epoch_samples=4)
    with pytest.raises(ConfigError, match="epoch_samples is 0"):
        make_loader({"films": {"shards": films}}, epoch_samples=0)
