"""The time of an epoch comes from the loader itself, so it holds all that a loader does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from framestream.pipeline.loader import build_loader
from framestream.tools.inspect_run import InspectOptions
from framestream.tools.inspect_splits import chosen_places, open_splits
from framestream.tools.inspect_timing import Timing, time_loader

from synthetic_shards import make_shards
from tars import write_tar

OPTIONS = InspectOptions(image_size=64, patches=16, seconds=1.0)


def timed(folder: Path, workers: int) -> Timing | None:
    splits = open_splits([str(folder)])
    return time_loader(splits, chosen_places(splits, 100, 16), OPTIONS, workers)


@pytest.mark.slow
def test_the_estimate_is_what_the_loader_gives(tmp_path: Path) -> None:
    """Within a factor of two, measured before and after, since other work may come between."""
    folder = make_shards(tmp_path / "s", num_samples=64, samples_per_shard=16)
    loader = build_loader(
        folder, sampling=OPTIONS.sampling, patches_per_frame=16, image_size=64, batch_size=8, num_workers=1
    )

    def epoch() -> float:
        started = time.perf_counter()
        assert sum(len(batch["keys"]) for batch in loader) == 64
        return time.perf_counter() - started

    epoch()  # the worker starts
    before, seen, after = epoch(), timed(folder, 1), epoch()
    loader.close()
    assert seen is not None
    assert min(before, after) / 2 < seen.epoch(64, 1) < 2 * max(before, after)


def test_more_workers_than_are_started_are_taken_to_be_as_fast() -> None:
    seen = Timing(clips=80, seconds=2.0, rejected=0, workers=8)
    assert seen.rate == 40.0
    assert seen.epoch(400, 8) == pytest.approx(10.0)
    assert seen.epoch(400, 16) == pytest.approx(5.0)


def test_the_training_split_is_timed_and_nothing_where_nothing_can_be_used(tmp_path: Path) -> None:
    make_shards(tmp_path / "s" / "train", num_samples=2, samples_per_shard=2)
    (tmp_path / "s" / "val").mkdir()
    write_tar(tmp_path / "s" / "val" / "a.tar", [(f"k{n}.mp4", b"no video") for n in range(3)])
    seen = timed(tmp_path / "s", 2)
    assert seen is not None
    assert (seen.rejected, seen.split) == (0, "train")
    assert timed(tmp_path / "s" / "val", 1) is None
