"""How much a shuffle by windows costs: figures that behave as their definition says."""

from __future__ import annotations

import pytest

from framestream.pipeline.order import SampleOrder
from framestream.pipeline.shuffle_quality import shuffle_quality

SIZES = [64] * 64


def test_one_window_over_everything_is_a_full_shuffle() -> None:
    quality = shuffle_quality(SampleOrder(SIZES, window_shards=64), 32)
    assert quality.same_shard == pytest.approx(quality.same_shard_by_chance, rel=0.1)
    assert quality.batch_worth == pytest.approx(32, rel=0.05)
    assert abs(quality.epoch_correlation) < 0.06


def test_the_stored_order_is_worth_nothing() -> None:
    quality = shuffle_quality(SampleOrder(SIZES, shuffle=False), 32)
    assert (quality.same_shard, quality.batch_worth) == (1, 1)
    assert quality.epoch_correlation == pytest.approx(1)


@pytest.mark.parametrize("window", [1, 2, 4, 8, 16, 32])
def test_a_window_of_w_shards_mixes_w_shards(window: int) -> None:
    """Two samples of a batch share a shard about once in `window` times, whence the worth of a batch."""
    quality = shuffle_quality(SampleOrder(SIZES, window_shards=window), 32)
    own = (64 * window - window) / (64 * window - 1) / window  # pairs of the window that share a shard, exactly
    assert quality.same_shard == pytest.approx(own, rel=0.05)
    by_chance = quality.same_shard_by_chance
    rho = (own - by_chance) / (1 - by_chance)
    assert quality.batch_worth == pytest.approx(32 / (1 + 31 * rho), rel=0.05)


def test_impossible_batches() -> None:
    for batch_size in (1, 9):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
            shuffle_quality(SampleOrder([4, 4]), batch_size)
