"""Rejects, spares, limits and errors of the loader: recorded, replaced or raised in one sentence, and no hang."""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from framestream.pipeline.errors import ConfigError, RejectLimitError, SampleError, ShardError
from framestream.pipeline.prefetch import ReadAhead
from framestream.pipeline.sampling import DenseSampling
from framestream.pipeline.shards import ShardSet, ShardWriter

from loader_setup import BAD, keys, make_loader, write_shards
from synthetic import damaged as damaged_bytes
from synthetic import read_indices
from synthetic_shards import clip_key, make_shards, small_video

# -- rejects and spares ----------------------------------------------------------------------------------


def test_rejects_are_replaced_marked_and_written_down(damaged: Path, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rejects.jsonl"
    loader = make_loader(damaged, batch_size=3, rejects_path=path, max_reject_share=1.0)
    metas, seen = [], []
    for batch in loader:
        assert len(batch["keys"]) == 3
        metas += batch["meta"]
        seen += batch["keys"]
    bad = {clip_key(number) for number in BAD}
    spares = {meta["spare_for"]: meta["rejects"] for meta in metas if "spare_for" in meta}
    assert set(spares) == bad
    assert not set(seen) & bad
    assert set(seen) == {clip_key(number) for number in range(12)} - bad
    for key, rejects in spares.items():
        assert rejects[0]["key"] == key
        assert rejects[0]["shard"].endswith(".tar")
        assert key in rejects[0]["reason"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["key"] for line in lines} == bad
    assert all(set(line) == {"shard", "key", "reason"} for line in lines)
    stats = loader.stats()
    assert (stats["samples"], stats["batches"], stats["spares"]) == (12, 4, 2)
    assert stats["rejects"] == sum(map(len, spares.values()))
    assert stats["reject_share"] == stats["rejects"] / (12 + stats["rejects"])
    list(loader)
    assert len(path.read_text().splitlines()) == 2  # once each, however many epochs


def test_too_many_rejects_stop_the_run_after_a_hundred_samples(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 130, 26, bad=range(0, 130, 10))
    loader = make_loader(folder, num_workers=1, sampling=DenseSampling(1))
    with pytest.raises(RejectLimitError, match=r"of 1\d\d samples were rejected.*max_reject_share=0\.05.*clip-0"):
        list(loader)
    delivered = loader.state_dict()["consumed"]
    stats = loader.stats()
    assert stats["samples"] + stats["rejects"] >= 100
    assert 80 <= delivered < 100
    assert len(list(make_loader(folder, max_reject_share=0.2, sampling=DenseSampling(1)))) == 65


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"decode_on": "trainer"}], ids=str)
def test_data_of_rejects_only_ends_with_the_reasons(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_shards(tmp_path / "shards", 40, 10, bad=range(40))
    loader = make_loader(folder, rejects_path=tmp_path / "rejects.jsonl", **options)
    with pytest.raises(RejectLimitError, match=r"32 samples in a row .* clip-00\d\d in .*readable") as caught:
        next(iter(loader))
    assert "Traceback" not in str(caught.value)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 32


def test_damage_of_any_kind_costs_only_its_own_sample(tmp_path: Path) -> None:
    kinds = ("flip", "cut", "zero", "header", "random")
    with ShardWriter(tmp_path, samples_per_shard=10) as writer:
        for number in range(30):
            video, info = small_video(number % 3, 32, (96, 64), ".mp4")
            data = video if number % 2 else damaged_bytes(video, kinds[number // 2 % 5], seed=number)
            writer.write(clip_key(number), data, "mp4", info, None)
    loader = make_loader(tmp_path, max_reject_share=1.0, batch_size=5)
    epoch = list(loader)
    assert [len(batch["keys"]) for batch in epoch] == [5] * 6
    assert loader.stats()["rejects"] > 4
    for batch in epoch:
        for key, frames, index in zip(batch["keys"], batch["video_frames"], batch["frame_index"], strict=True):
            if int(key.split("-")[1]) % 2:  # what is damaged and decodes nevertheless may look like anything
                assert read_indices(frames) == index.tolist()
    again = make_loader(tmp_path, max_reject_share=1.0, batch_size=5, num_workers=1)
    assert keys(again) == [batch["keys"] for batch in epoch]


def test_samples_without_metadata_are_counted_and_used(tmp_path: Path) -> None:
    video, _ = small_video(0, 32, (96, 64), ".mp4")
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for name, data in [("a.mp4", video), ("b.json", b"{damaged"), ("b.mp4", video)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    loader = make_loader(tmp_path / "plain.tar", batch_size=1)
    for batch in loader:
        assert read_indices(batch["video_frames"][0]) == batch["frame_index"][0].tolist()
        assert batch["meta"] == [{}]
    assert loader.stats()["without_meta"] == 2
    assert loader.stats()["rejects"] == 0


# -- errors ----------------------------------------------------------------------------------------------


def broken(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    raise ZeroDivisionError("the hook is broken")


def reshaping(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return frames[:, :1]


def choosy(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if int(torch.randint(0, 2, (), generator=generator)):
        raise SampleError("the hook does not like this clip")
    return frames


WHERE = [{}, {"num_workers": 1}, {"decode_on": "trainer", "num_workers": 1}]


@pytest.mark.parametrize("options", WHERE, ids=str)
def test_errors_of_a_hook_reach_the_loop(shards: Path, options: dict[str, Any]) -> None:
    loader = make_loader(shards, transform=broken, **options)
    with pytest.raises(ZeroDivisionError, match="the hook is broken"):
        next(iter(loader))
    with pytest.raises(ZeroDivisionError):
        list(loader)
    framed = make_loader(shards, transform=reshaping, **options)
    with pytest.raises(ConfigError, match=r"transform returned torch.uint8 \[8, 1, 48, 48\]") as caught:
        next(iter(framed))
    assert "Traceback" not in str(caught.value)


def test_a_hook_may_reject_a_sample(shards: Path) -> None:
    loader = make_loader(shards, transform=choosy, max_reject_share=1.0, batch_size=1)
    reasons = [r["reason"] for batch in loader for r in batch["meta"][0].get("rejects", [])]
    assert len(reasons) == loader.stats()["rejects"] > 2
    assert all("the hook does not like this clip" in reason for reason in reasons)


def test_no_thread_is_left_behind(shards: Path) -> None:
    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("framestream")]

    loader = make_loader(shards, decode_on="trainer")
    loop = iter(loader)
    next(loop)
    assert threads()
    loop.close()  # type: ignore[attr-defined]
    assert not threads()
    list(loader)
    assert not threads()
    next(iter(loader))
    del loader, loop
    assert not threads()


def test_no_process_is_left_behind(shards: Path) -> None:
    before = set(multiprocessing.active_children())
    loader = make_loader(shards, transform=broken, num_workers=1)
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader)
    assert set(multiprocessing.active_children()) - before
    del caught, loader
    gc.collect()  # the error of a worker stands in a reference cycle
    assert not set(multiprocessing.active_children()) - before


def test_reading_ahead_keeps_order_depth_and_errors() -> None:
    made: list[int] = []
    got: list[int] = []

    def source() -> Any:
        for number in range(6):
            made.append(number)
            yield number
        raise KeyError("six")

    def consume() -> None:
        for number in ReadAhead(source(), depth=2):
            got.append(number)
            time.sleep(0.02)
            assert len(made) <= number + 3

    with pytest.raises(KeyError, match="six"):
        consume()
    assert got == list(range(6))
    assert list(ReadAhead(iter(range(4)))) == [0, 1, 2, 3]
    assert list(ReadAhead(iter(()))) == []


def test_a_shard_cut_after_indexing_costs_its_lost_samples_only(tmp_path: Path) -> None:
    shards = ShardSet.open(make_shards(tmp_path, num_samples=8, samples_per_shard=4))
    for shard in (0, 1):
        shards.read(shard, 0)  # the indexes are in memory from now on
    loader = make_loader(shards, max_reject_share=1.0, shuffle=False, batch_size=1)
    tar = tmp_path / "clips-000001.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    batches = list(loader)
    assert len(batches) == 8
    lost = {r["key"] for batch in batches for r in batch["meta"][0].get("rejects", [])}
    assert lost
    assert lost < {clip_key(number) for number in range(4, 8)}
    assert not lost & {key for batch in batches for key in batch["keys"]}


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """12 clips in 3 shards, the second of which was cut in the middle after it had been written."""
    folder = make_shards(tmp_path / "set", num_samples=12, samples_per_shard=4)
    tar = folder / "clips-000001.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    return folder


@pytest.mark.parametrize("told_by", ["index.json", "the index beside it"])
@pytest.mark.parametrize("remote", [False, True])
def test_samples_that_a_cut_shard_has_lost_are_counted_and_written_down(
    cut: Path, tmp_path: Path, told_by: str, remote: bool
) -> None:
    (cut / ("index.json" if told_by != "index.json" else "clips-000001.idx.json")).unlink()
    place = str(cut)
    if remote:
        place = f"memory://{tmp_path.name}-{told_by[:5]}"
        for path in cut.iterdir():
            fsspec.filesystem("memory").pipe_file(f"{place}/{path.name}", path.read_bytes())
    path = tmp_path / "rejects.jsonl"
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "rejects_path": path, "batch_size": 1}
    for times in (1, 2):  # the second time from the index that was built and kept
        loader = make_loader(place, max_reject_share=0.5, **options)
        lost = loader.stats()["lost_samples"]
        assert lost == 12 - len(loader) > 0
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == times
        assert lines[-1]["shard"].endswith("clips-000001.tar")
        assert f"{lost:.0f} of its 4 samples are lost: clips-000001.tar has" in lines[-1]["reason"]
    other_rank = make_loader(place, max_reject_share=1.0, rank=1, world_size=2, **options)
    assert other_rank.stats()["lost_samples"] == lost
    assert len(path.read_text().splitlines()) == 2


def test_more_lost_samples_than_rejects_are_allowed_end_at_opening(cut: Path, tmp_path: Path) -> None:
    words = r"\d of 12 samples are lost, .*share=0\.05 .*clips-000001\.tar holds \d of the 4 .*framestream verify"
    mixture = {"cut": {"shards": cut}, "whole": {"shards": make_shards(tmp_path / "whole", num_samples=4)}}
    with pytest.raises(ShardError, match=words) as caught:
        make_loader(cut)
    with pytest.raises(ShardError, match=words.replace("12", "16")):
        make_loader(mixture)
    assert "\n" not in str(caught.value)
    with pytest.raises(ShardError, match="max_reject_share=0 "):
        make_loader(cut, max_reject_share=0)
    assert make_loader(cut, max_reject_share=1.0).stats()["lost_samples"] > 0
    assert make_loader(mixture, max_reject_share=0.5).stats()["lost_samples"] > 0


def test_a_whole_tar_in_the_place_of_a_larger_one_has_lost_nothing(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "set", num_samples=8, samples_per_shard=4)
    smaller = make_shards(tmp_path / "smaller", num_samples=2, samples_per_shard=4)
    (folder / "clips-000001.tar").write_bytes((smaller / "clips-000000.tar").read_bytes())
    loader = make_loader(folder, batch_size=1)
    assert (len(loader), loader.stats()["lost_samples"]) == (6, 0)


def test_a_vanished_shard_is_an_error_and_no_reject(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, num_samples=6, samples_per_shard=3)
    loader = make_loader(folder, num_workers=1)
    (folder / "clips-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"clips-000001\.tar"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"batch_size": 14}, r"batch_size=14 on 1 rank\(s\) needs 14 samples, but there are 13.*drop_last=False"),
        ({"batch_size": 7, "rank": 0, "world_size": 2}, r"on 2 rank\(s\) needs 14"),
        ({"prefetch_factor": 65}, "prefetch_factor is 65, at most 64"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": "x"}, "seed is 'x'; it must be a whole number"),
        ({"prefetch_factor": 0}, "prefetch_factor is 0"),
        ({"window_shards": 0}, "window_shards is 0"),
        ({"multiprocessing_context": "thread"}, "multiprocessing_context is 'thread'; valid values are None, fork"),
        ({"decode_on": "gpu"}, "decode_on is 'gpu'; valid values are auto, workers, trainer"),
        ({"attention_backend": "fast"}, "attention_backend is 'fast'"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"decoder": "vlc"}, "decoder 'vlc' is unknown"),
        ({"mask": "causal"}, "mask 'causal' is unknown"),
        ({"image_size": -3}, "image_size is -3"),
        ({"patches_per_frame": 0}, "patches_per_frame is 0"),
        ({"sampling": {"kind": "dense", "num_frames": 0}}, "num_frames must be a whole number >= 1, got 0"),
        ({"sampling": 8}, "sampling must be"),
        ({"max_reject_share": 2}, "max_reject_share is 2"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2; it must be from 0 to 1"),
        ({"rank": 0}, "give both or neither"),
        ({"fields": ("x.pickle",)}, "fields names 'x.pickle'"),
        ({"shards": []}, "."),
        ({"shards": 5}, "shards is 5; give a folder"),
        ({"mask": ["x"]}, r"mask \['x'\] is unknown"),
        ({"window_size": "3"}, "window_size is '3'"),
        ({"patches_per_frame": None}, "patches_per_frame is None"),
        ({"fields": 5}, "fields is 5"),
        ({"fields": (1,)}, "fields names 1"),
        ({"timeout_s": "x"}, "timeout_s is 'x'"),
        ({"max_reject_share": "x"}, "max_reject_share is 'x'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_at_once(shards: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_loader(**{"shards": shards, **options})


def test_what_spawned_workers_cannot_take_is_said_at_once(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"'spawn' need `transform`, .* picklable"):
        make_loader(shards, transform=lambda f, g: f, num_workers=1, multiprocessing_context="spawn")


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=str(tmp_path)):
        make_loader(tmp_path)
