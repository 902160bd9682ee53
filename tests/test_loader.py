"""The loader: the frames that were asked for, one stream whatever the workers, honest errors, no hang."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from framestream.pipeline.errors import ConfigError, StateError
from framestream.pipeline.loader import build_loader
from framestream.pipeline.masks import FrameMask
from framestream.pipeline.sampling import DenseSampling
from framestream.pipeline.shards import ShardSet

from loader_setup import FRAMES, IMAGE_SIZE, PATCHES, SAMPLING, keys, make_loader, stream
from synthetic import read_indices
from synthetic_shards import clip_key


def noisy(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randint(0, 9, (frames.shape[0], 1, 1, 1), generator=generator, dtype=torch.uint8)
    return frames // 2 + noise


# -- what comes ------------------------------------------------------------------------------------------


def test_an_epoch_holds_the_planned_frames_of_every_clip_once(shards: Path) -> None:
    loader = make_loader(shards, drop_last=False)
    seen = []
    for batch in loader:
        rows = len(batch["keys"])
        assert batch["video_frames"].shape == (rows, FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["frame_position_ids"].shape == (rows, FRAMES * PATCHES)
        assert isinstance(batch["frame_mask"], FrameMask)
        for row in range(rows):
            plan = SAMPLING.plan(32)
            assert read_indices(batch["video_frames"][row]) == batch["frame_index"][row].tolist()
            assert batch["frame_index"][row].tolist() == plan.frame_index.tolist()
            assert batch["text"][row] == f"clip number {batch['meta'][row]['user']['number']}"
        seen += batch["keys"]
    assert sorted(seen) == [clip_key(number) for number in range(13)]
    assert len(loader) == 7


def test_unshuffled_is_the_stored_order(shards: Path) -> None:
    loader = make_loader(shards, shuffle=False)
    stored = [[clip_key(2 * i), clip_key(2 * i + 1)] for i in range(6)]
    assert keys(loader) == keys(loader) == stored


def test_each_epoch_has_its_own_order_and_seeds_differ(shards: Path) -> None:
    loader = make_loader(shards, drop_last=False)
    epochs = [keys(loader) for _ in range(3)] + [keys(make_loader(shards, drop_last=False, seed=4))]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert len({str(sorted(chain(*epoch))) for epoch in epochs}) == 1


def test_leaving_early_goes_on_with_the_next_epoch(shards: Path) -> None:
    whole, left = make_loader(shards), make_loader(shards)
    epochs = [keys(whole) for _ in range(3)]
    assert next(iter(left))["keys"] == epochs[0][0]
    for number, batch in enumerate(left):
        assert batch["keys"] == epochs[1][number]
        if number == 2:
            break
    assert keys(left) == epochs[2]
    assert left.epoch == 2


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"decode_on": "trainer"}], ids=str)
def test_a_new_loop_ends_the_one_before_which_says_so(shards: Path, options: dict[str, Any]) -> None:
    loader = make_loader(shards, **options)
    first = iter(loader)
    next(first)
    second = iter(loader)
    for _ in range(2):
        with pytest.raises(StateError, match=r"ended by another one .* build a second loader"):
            next(first)
    assert loader.state_dict()["epoch"] == 1
    assert len(list(second)) == len(loader)
    loader.close()


def test_looking_at_a_batch_within_a_loop_is_no_silent_end_of_the_epoch(shards: Path) -> None:
    loader = make_loader(shards)
    seen = []

    def look_within() -> None:
        for batch in loader:
            seen.append(batch["keys"])
            next(iter(loader))

    with pytest.raises(StateError, match="ended by another one"):
        look_within()
    assert len(seen) == 1
    assert len(list(loader)) == len(loader)


def test_a_loop_that_was_over_before_the_next_one_stays_over(shards: Path) -> None:
    loader = make_loader(shards)
    whole = iter(loader)
    assert len(list(whole)) == len(loader)
    closed = iter(loader)
    next(closed)
    closed.close()  # type: ignore[attr-defined]
    next(iter(loader))
    assert next(whole, None) is None
    assert next(closed, None) is None
    stopped = iter(loader)
    next(stopped)
    loader.close()
    assert next(stopped, None) is None


def test_a_dataloader_over_the_loader_is_told_to_iterate_over_it(shards: Path) -> None:
    for options in ({"batch_size": None}, {"batch_size": 2}):
        with pytest.raises(ConfigError, match=r"goes into no DataLoader.* iterate over the loader"):
            next(iter(DataLoader(make_loader(shards), **options)))


def test_random_moments_change_by_epoch_and_not_by_run(shards: Path) -> None:
    loader = make_loader(shards, random_end=True, shuffle=False)
    first, second = ([b["frame_index"].tolist() for b in loader] for _ in range(2))
    assert first != second
    again = make_loader(shards, random_end=True, shuffle=False, num_workers=1)
    for expected in (first, second):
        batches = list(again)
        assert [b["frame_index"].tolist() for b in batches] == expected
        for batch in batches:
            assert [read_indices(frames) for frames in batch["video_frames"]] == batch["frame_index"].tolist()


def test_settings_reach_the_batch(shards: Path) -> None:
    loader = make_loader(
        shards,
        sampling={"kind": "dense", "num_frames": 3, "stride": 2},
        patches_per_frame=(2, 5),
        mask="sliding_window",
        window_size=2,
        position_ids="sequence",
        normalize=(0.5, 0.5),
        block_mask=True,
        fields=("json",),
    )
    batch = next(iter(loader))
    assert batch["frame_index"][0].tolist() == [27, 29, 31]
    assert batch["frame_mask"].matrix()[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert batch["frame_position_ids"][0].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert batch["video_frames"].dtype == torch.float32
    assert batch["video_frames"].min() < -0.5
    assert batch["block_mask"].shape[-2:] == (15, 15)
    assert [j["source"] for j in batch["json"]] == [m["source"] for m in batch["meta"]]


def test_loading_leaves_the_global_random_state_alone(shards: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(make_loader(shards, transform=noisy, num_workers=1))
    assert torch.equal(torch.rand(3), expected)


def test_ranks_come_from_the_environment(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert keys(make_loader(shards)) == keys(make_loader(shards, rank=1, world_size=2))
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="RANK and WORLD_SIZE must be numbers"):
        make_loader(shards)
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 and no RANK"):
        make_loader(shards)


def test_statistics_are_flat_numbers(shards: Path) -> None:
    loader = make_loader(shards)
    assert loader.stats()["samples"] == 0
    list(loader)
    stats = loader.stats()
    assert json.loads(json.dumps(stats)) == stats
    assert stats["samples"] == 12
    assert stats["decode_ms"] > 0
    assert stats["read_ms"] > 0
    assert stats["samples_per_s"] > 0
    assert 0 < stats["wait_share"] <= 1
    assert stats["transform_ms"] > 0
    assert stats["collate_ms"] > 0
    assert (stats["cache_hits"], stats["cache_misses"], stats["worker_restarts"]) == (0, 0, 0)  # local, and all well
    assert (stats["transfer_ms"], stats["worker_busy_share"]) == (0, 0)  # no workers
    loader = make_loader(shards, num_workers=1)
    for _ in loader:
        time.sleep(0.05)
    stats = loader.stats()
    assert stats["transfer_ms"] > 0
    assert 0 < stats["worker_busy_share"] < 0.9
    assert stats["wait_share"] < 0.9
    loader.close()


def test_build_loader_takes_what_the_guide_shows(shards: Path) -> None:
    loader = build_loader(str(shards), sampling=DenseSampling(4), patches_per_frame=9, batch_size=3, image_size=32)
    batch = next(iter(loader))
    assert batch["video_frames"].shape == (3, 4, 3, 32, 32)
    assert (loader.decoder, loader.decode_on, loader.epoch) == ("pyav", "workers", 0)


# -- one stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2, "pin_memory": True},
        {"num_workers": 1, "prefetch_factor": 4},
        {"decode_on": "trainer"},
        {"decode_on": "trainer", "num_workers": 2, "pin_memory": True},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
        {"num_workers": 1, "multiprocessing_context": "forkserver"},
    ],
    ids=str,
)
def test_the_stream_is_the_same_whoever_does_the_work(damaged: Path, options: dict[str, Any]) -> None:
    settings = {"transform": noisy, "random_end": True, "max_reject_share": 0.5, "normalize": (0.5, 0.2)}
    alone, other = make_loader(damaged, **settings), make_loader(damaged, **settings, **options)
    for _ in range(2):
        expected = stream(alone)
        assert len(expected) == len(alone) == 6
        assert stream(other) == expected
    assert other.stats()["rejects"] == alone.stats()["rejects"] > 0
    other.close()


def test_more_workers_than_shards_and_a_bare_tar(shards: Path) -> None:
    tar = shards / "clips-000000.tar"
    assert sorted(chain(*keys(make_loader(tar, batch_size=1, num_workers=2)))) == [clip_key(i) for i in range(5)]


def test_open_shards_are_taken_as_they_are(shards: Path) -> None:
    assert keys(make_loader(ShardSet.open(shards))) == keys(make_loader(shards))


def test_the_stream_survives_leaving_early_with_workers(damaged: Path) -> None:
    for options in ({"num_workers": 2}, {"num_workers": 1, "decode_on": "trainer"}):
        alone, loader = make_loader(damaged), make_loader(damaged, **options)
        stream(alone)
        next(iter(loader))
        assert stream(loader) == stream(alone)
        loader.close()
        assert stream(loader) == stream(alone)


@pytest.fixture
def bucket(shards: Path) -> Iterator[str]:
    """The shards behind a URL."""
    fs = fsspec.filesystem("memory")
    for path in shards.iterdir():
        fs.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def test_remote_shards_give_the_same_stream(bucket: str, shards: Path, tmp_path: Path) -> None:
    loader = make_loader(bucket, cache_dir=tmp_path, num_workers=1)
    local = make_loader(shards)
    assert stream(loader) == stream(local)
    assert stream(loader) == stream(local)


def test_the_next_window_is_fetched_ahead(bucket: str, tmp_path: Path) -> None:
    loader = make_loader(bucket, cache_dir=tmp_path, window_shards=1, batch_size=1)
    loop = iter(loader)
    next(loop)
    until = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.tar"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(list(tmp_path.rglob("*.tar"))) == 2
    assert len(list(loop)) == 12
    assert len(list(tmp_path.rglob("*.tar"))) == 3
