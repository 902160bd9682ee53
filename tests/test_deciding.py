"""What is filtered, what is held out, and which shard a clip goes to."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.probe import VideoInfo
from framestream.tools.clips import Clip
from framestream.tools.deciding import ShardFilling, clip_bytes, filtered, held_out
from framestream.tools.inputs import Source
from framestream.tools.shard_options import Filters

# Shared machines stall now and then; nothing here is about time.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

INFO = VideoInfo(250, 30000 / 1001, 8.34, 1080, 1920, "h264")
WHOLE = Source("/v/a.mp4", "a.mp4", "a")


@pytest.mark.parametrize(
    ("filters", "rule", "reason"),
    [
        (Filters(min_seconds=9), "min_seconds", "its 8.34 s are fewer than min_seconds 9"),
        (Filters(max_seconds=8), "max_seconds", "its 8.34 s are more than max_seconds 8"),
        (Filters(min_side=1081), "min_side", "its 1080 pixels of the shorter side are fewer than min_side 1081"),
        (Filters(max_side=720), "max_side", "its 1080 pixels of the shorter side are more than max_side 720"),
        (Filters(min_fps=30), "min_fps", "its 29.97 frames per second are fewer than min_fps 30"),
        (Filters(max_fps=25), "max_fps", "its 29.97 frames per second are more than max_fps 25"),
    ],
)
def test_a_filter_names_itself_the_value_and_the_limit(filters: Filters, rule: str, reason: str) -> None:
    assert filtered(INFO, WHOLE, filters) == (rule, reason)


def test_limits_include_what_is_equal_to_them_and_rounded_rates() -> None:
    exact = Filters(min_seconds=8.34, max_seconds=8.34, min_side=1080, max_side=1080, min_fps=29.97, max_fps=29.97)
    assert filtered(INFO, WHOLE, exact) is None
    assert filtered(INFO, WHOLE, Filters()) is None


def test_the_part_that_a_row_asks_for_counts() -> None:
    row = Source("/v/a.mp4", "a.mp4", "a", start=8.0, end=8.8)  # a row may ask for a little more than there is
    assert filtered(INFO, row, Filters(min_seconds=0.5)) == (
        "min_seconds",
        "its 0.34 s are fewer than min_seconds 0.5",
    )
    assert filtered(INFO, Source("", "", "", end=2.0), Filters(max_seconds=3)) is None


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_what_is_held_out_stays_so_when_more_is(name: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert held_out(name, low) <= held_out(name, high)
    assert not held_out(name, 0.0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_that_is_held_out_is_the_one_asked_for(share: float) -> None:
    n = 20_000
    count = sum(held_out(f"folder/video-{number}.mp4", share) for number in range(n))
    assert abs(count - n * share) < 5 * (n * share * (1 - share)) ** 0.5


def test_which_videos_are_held_out_is_the_same_in_every_version() -> None:
    """A change would move videos that were trained on into the held-out set of somebody's next run."""
    names = [f"video-{number}.mp4" for number in range(40)]
    assert [number for number, name in enumerate(names) if held_out(name, 0.1)] == [0, 9, 28]


SIZES = st.lists(st.integers(0, 60), max_size=80)


@given(SIZES, st.integers(1, 9), st.none() | st.integers(1, 100))
def test_shards_are_full_and_never_too_full(sizes: list[int], samples: int, most: int | None) -> None:
    filling = ShardFilling(samples, most)
    placed = [(filling.place(size), size) for size in sizes]
    shards = [[size for _, size in shard] for _, shard in groupby(placed, key=lambda each: each[0])]
    assert [number for number, _ in groupby(number for number, _ in placed)] == list(range(len(shards)))
    for shard in shards:
        assert len(shard) <= samples
        assert most is None or sum(shard) <= most or len(shard) == 1
    for shard, after in pairwise(shards):
        assert len(shard) == samples or (most is not None and sum(shard) + after[0] > most)


def test_a_clip_counts_for_its_share_of_the_file() -> None:
    assert clip_bytes(Clip(WHOLE, "a", 0.0, 8.34, None), INFO, 1000) == 1000
    assert clip_bytes(Clip(WHOLE, "a", 0.0, 4.17, (0, 125)), INFO, 1000) == 500
    assert clip_bytes(Clip(WHOLE, "a", 8.33, 8.34, (249, 250)), INFO, 1000) == 2
