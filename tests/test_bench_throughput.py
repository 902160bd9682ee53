"""`framestream bench loader`: every loader serves the same clips. How fast it was is nobody's assertion."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from framestream.pipeline.decode import available_backends
from framestream.pipeline.shards import ShardSet
from framestream.tools import bench_throughput
from framestream.tools.bench_baselines import SAMPLING, SNAPPED, Ours, WebDatasetDecord
from framestream.tools.bench_throughput import AS_IT_IS, CONVERTED, EVERYTHING, NAMES, WANTED
from framestream.tools.cli import main
from framestream.tools.shard_options import ShardOptions
from framestream.tools.shard_run import build_shards

from synthetic import video_bytes

needs_decord = pytest.mark.skipif(bool(available_backends()["decord"]), reason="Decord is not installed here")


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    monkeypatch.setattr(bench_throughput, "EPOCH_S", 0.05)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three clips of different lengths, one to a shard."""
    folder = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((20, 40, 60)):
        (folder / f"clip{number}.mp4").write_bytes(video_bytes(".mp4", num_frames=frames, size=(128, 96), gop=50))
    build_shards([str(folder)], folder / "shards", ShardOptions(samples_per_shard=1), workers=1)
    return folder / "shards"


@needs_decord
@pytest.mark.parametrize("workers", [1, 2])
def test_all_loaders_serve_the_same_clips(shards, workers):
    loaders = {
        "ours": Ours(shards, 64, workers, 12, SAMPLING),
        "wanted": WebDatasetDecord(shards, 64, workers, 12, "wanted"),
        "everything": WebDatasetDecord(shards, 64, workers, 12, "everything"),
    }
    served: dict[str, dict[str, torch.Tensor]] = {}
    for name, loader in loaders.items():
        for _ in range(2):  # workers stay, and every epoch is a full one
            counts: dict[str, int] = {}
            for keys, frames in loader.batches():
                assert frames.dtype == torch.uint8
                assert frames.shape[1:] == (16, 3, 64, 64)
                for key, clip in zip(keys, frames, strict=True):
                    counts[key] = counts.get(key, 0) + 1
                    served.setdefault(name, {})[key] = clip.clone()
            assert counts == dict.fromkeys(("clip0", "clip1", "clip2"), 4)
        loader.close()
    for name in ("wanted", "everything"):
        assert bench_throughput._compared(served["ours"], served[name]) == ""
    assert all(torch.equal(served["wanted"][key], served["everything"][key]) for key in served["wanted"])
    other = {key: clip.flip(0) for key, clip in served["ours"].items()}
    assert "wrong frames" in bench_throughput._compared(served["ours"], other)


def test_ours_says_what_took_its_time(shards):
    loader = Ours(shards, 64, 1, 6, SNAPPED)
    assert sum(len(keys) for keys, _ in loader.batches()) == 6
    stages = loader.stages()
    loader.close()
    assert stages.keys() == {"read", "decode", "transform", "collate", "transfer"}
    assert all(value > 0 for value in stages.values())


@needs_decord
def test_generated_sets(tmp_path, capsys):
    assert importlib.util.find_spec("webdataset")
    arguments = ["bench", "loader", "--output", str(tmp_path), "--seconds", "1", "--gops", "30", "--heights", "96",
                 "--short-side", "64", "--workers", "1", "2", "--repeats", "1"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads((tmp_path / "loader.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["1 s, 96p, GOP 30, 1 worker", "1 s, 96p, GOP 30, 2 workers"]
    for row in result["rows"]:
        assert set(row["ms"]) == set(NAMES)
        assert row["notes"] == {}
        assert all(value > 0 for value in (*row["ms"].values(), *row["facts"].values()))
        assert {"converted / everything", "as it is / everything", "slow_snap, converted"} <= row["facts"].keys()
        stages = row["stages"][CONVERTED]
        assert row["facts"]["outside decoding, converted"] == pytest.approx(1 - stages["decode"] / sum(stages.values()))
    assert {"2 / 1 workers, converted", "2 / 1 workers, as it is"} <= result["rows"][1]["facts"].keys()
    assert (tmp_path / "loader.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "loader: clips per second" in said
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.tar")}
    assert len(made) == 8, "four clips, as they are and converted"


@needs_decord
def test_a_folder_of_the_users_with_a_broken_file(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(video_bytes(".mp4", num_frames=30, size=(128, 96)))
    (videos / "b.mkv").write_bytes(video_bytes(".mkv", num_frames=24, size=(128, 96)))
    (videos / "broken.mp4").write_bytes(video_bytes(".mp4", num_frames=30)[:900])
    arguments = ["bench", "loader", "--output", str(tmp_path / "out"), "--videos", str(videos), "--short-side", "64",
                 "--workers", "1", "--repeats", "1"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "loader.json").read_text())
    (row,) = result["rows"]
    assert row["case"] == "videos, 1 worker"
    assert {AS_IT_IS, CONVERTED, WANTED, EVERYTHING} <= row["ms"].keys()
    (skipped,) = result["skipped"]
    assert skipped.endswith("broken.mp4")


class _Quiet:
    def say(self, what: str) -> None:
        pass


def test_changed_videos_are_sharded_anew(tmp_path):
    video = tmp_path / "a.mp4"
    frames = []
    for count in (16, 24):
        video.write_bytes(video_bytes(".mp4", num_frames=count, size=(128, 96)))
        skipped: dict[str, str] = {}
        both = bench_throughput._shards(tmp_path / "out", [video], _Quiet(), skipped)
        frames.append([ShardSet.open(folder).read(0, 0).info.num_frames for folder in both])
        assert skipped == {}
    assert frames == [[16, 16], [24, 24]]
