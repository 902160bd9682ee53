"""Plain webdataset reads our shards, and we read what its writers write."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from framestream.pipeline.errors import ShardError
from framestream.pipeline.shards import ShardSet, ShardWriter
from framestream.tools.shard_options import Cutting, ShardOptions
from framestream.tools.shard_run import build_shards
from framestream.tools.verify import verify_folder

from synthetic import make_video
from tars import load, number_of, tiny_meta, tiny_video


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


def read(pattern: str | list[str]) -> wds.WebDataset:
    return wds.WebDataset(pattern, shardshuffle=False)


def by_key(pattern: str | list[str]) -> dict[str, dict[str, bytes]]:
    """Members of every sample, as the plain reader gives them."""
    return {
        sample["__key__"]: {ext: data for ext, data in sample.items() if not ext.startswith("__")}
        for sample in read(pattern)
    }


# Ours, read by webdataset


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Three shards of five samples: of each with an even number there is a text."""
    with ShardWriter(tmp_path / "ours", samples_per_shard=2) as writer:
        for number in range(5):
            text = f"clip {number}, 猫" if number % 2 == 0 else None
            writer.write(f"k{number}", tiny_video(number % 3), "mp4", {**tiny_meta(number % 3), "n": number}, text)
    return tmp_path / "ours"


def test_our_shards_by_a_brace_pattern(ours: Path) -> None:
    rows = list(read(f"{ours}/clips-{{000000..000002}}.tar").decode().to_tuple("__key__", "mp4", "json"))
    assert [row[0] for row in rows] == [f"k{number}" for number in range(5)]
    for number, (_, video, meta) in enumerate(rows):
        assert video == tiny_video(number % 3)
        assert meta["n"] == number
        assert meta["sha256"] == hashlib.sha256(video).hexdigest()


def test_our_texts_where_there_are_some(ours: Path) -> None:
    samples = read(f"{ours}/clips-{{000000..000002}}.tar").decode().select(lambda sample: "txt" in sample)
    assert list(samples.to_tuple("__key__", "txt")) == [(f"k{number}", f"clip {number}, 猫") for number in (0, 2, 4)]
    videos = read(f"{ours}/clips-000000.tar").rename(video="mp4;webm;mkv", keep=False).to_tuple("video")
    assert list(videos) == [(tiny_video(0),), (tiny_video(1),)]


def test_every_member_of_ours_is_there_and_nothing_else(ours: Path) -> None:
    theirs = by_key([str(path) for path in sorted(ours.glob("*.tar"))])
    shards = ShardSet.open(ours)
    samples = [shards.read(*shards.locate(index)) for index in range(len(shards))]
    assert {sample.key: dict(sample.members) for sample in samples} == theirs


def test_our_samples_in_a_pipeline_of_theirs(ours: Path) -> None:
    """Batches, shuffling and splitting by worker are theirs; every sample comes once."""
    pipeline = (
        wds.WebDataset(f"{ours}/clips-{{000000..000002}}.tar", shardshuffle=3, seed=1)
        .shuffle(4)
        .to_tuple("__key__", "mp4")
        .batched(2)
    )
    keys = [key for batch in wds.WebLoader(pipeline, batch_size=None, num_workers=2) for key in batch[0]]
    assert sorted(keys) == [f"k{number}" for number in range(5)]


def test_splits_of_framestream_shard(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b", "c"):
        make_video(tmp_path / "videos" / f"{name}.mp4", num_frames=48, size=(64, 48), gop=12)
    (tmp_path / "videos" / "a.txt").write_text("a text\n")
    options = ShardOptions(samples_per_shard=4, cutting=Cutting(clip_seconds=0.5, val_tail=0.25))
    report = build_shards([str(tmp_path / "videos")], tmp_path / "out", options, workers=2)
    assert report.rejects == []
    assert set(report.splits) == {"train", "val"}
    for split, facts in report.splits.items():
        last = facts["shards"] - 1
        samples = list(read(f"{tmp_path}/out/{split}/clips-{{000000..{last:06d}}}.tar").decode())
        assert len(samples) == facts["samples"]
        assert all({"mp4", "json"} <= sample.keys() for sample in samples)
        assert {sample["json"]["source"] for sample in samples} == {"a.mp4", "b.mp4", "c.mp4"}
        for sample in samples:
            assert sample["json"]["sha256"] == hashlib.sha256(sample["mp4"]).hexdigest()
            assert sample.get("txt") == ("a text" if sample["json"]["source"] == "a.mp4" else None)
    both = by_key([str(path) for path in sorted((tmp_path / "out").glob("*/*.tar"))])
    assert len(both) == report.clips["written"]  # no key is in both splits


# Theirs, read by us


def write_theirs(folder: Path, samples: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    with wds.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=2, verbose=0) as sink:
        for sample in samples:
            sink.write(sample)
    return folder


def test_what_their_writer_writes(tmp_path: Path) -> None:
    folder = write_theirs(
        tmp_path / "theirs",
        [
            {"__key__": "plain", "mp4": tiny_video(0), "txt": "a text "},
            {"__key__": "folder/of/some", "mp4": tiny_video(1), "json": {"text": "out of the json", "fps": "odd"}},
            {"__key__": "dotted.0001", "mp4": tiny_video(2), "cls": 3},
            {"__key__": "half", "txt": "no video"},
            {"__key__": "more", "mp4": tiny_video(0), "txt": "first", "json": {"text": "second"}, "pyd": {"a": 1}},
        ],
    )
    loader = load(folder)
    batches = {batch["keys"][0]: batch for batch in loader}
    assert {key: number_of(batch, 3) for key, batch in batches.items()} == {
        "plain": 0,
        "folder/of/some": 1,
        "dotted": 2,
        "more": 0,
    }
    assert not loader.stats()["rejects"]
    shards = ShardSet.open(folder)
    samples = {s.key: s for s in (shards.read(*shards.locate(index)) for index in range(len(shards)))}
    assert {key: sample.text for key, sample in samples.items()} == {
        "plain": "a text",
        "folder/of/some": "out of the json",
        "dotted": "",
        "more": "first",
    }
    assert "pyd" not in samples["more"].members  # a pickle is never touched
    assert "'half' has no video" in " ".join(shards.problems)


def test_verify_takes_their_shards_as_they_are(tmp_path: Path) -> None:
    samples = [{"__key__": f"s{n}", "mp4": tiny_video(n % 3), "json": {"score": n, "width": "odd"}} for n in range(5)]
    folder = write_theirs(tmp_path / "theirs", samples)
    before = sorted(path.name for path in folder.iterdir())
    report = verify_folder(folder, decode="all", workers=1)
    assert report.problems == []
    assert (report.num_samples, report.num_decoded) == (5, 5)
    assert len(report.notices) == 2
    assert "not written by framestream" in report.notices[0]
    assert "3 shards have no index file" in report.notices[1]
    assert sorted(path.name for path in folder.iterdir()) == before
    repaired = verify_folder(folder, decode="none", repair_index=True, workers=1)
    assert (repaired.problems, repaired.num_repaired) == ([], 4)
    assert json.loads((folder / "index.json").read_text())["num_samples"] == 5
    assert verify_folder(folder, decode="none", workers=1).problems == []


def test_verify_finds_damage_in_their_shards(tmp_path: Path) -> None:
    video = tiny_video(0)
    folder = write_theirs(
        tmp_path / "theirs",
        [
            {"__key__": "sound", "mp4": video},
            {"__key__": "cut", "mp4": video[: len(video) // 2]},
            {"__key__": "json", "mp4": video, "json": b"{"},
            {"__key__": "whole", "mp4": video},
            {"__key__": "late", "mp4": video},
        ],
    )
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:2000])
    report = verify_folder(folder, decode="none", workers=1)
    text = " ".join(report.problems)
    assert "sample 'cut' has no readable video" in text
    assert "sample 'json' has no usable metadata: the .json of sample 'json'" in text
    assert "shard-000002.tar is cut" in text
    assert not {"sound", "whole"} & set(text.split("'"))


def test_their_compressed_tars_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "x.tar.gz"), compress="gz") as sink:
        sink.write({"__key__": "a", "mp4": tiny_video(0)})
    with pytest.raises(ShardError, match="a compressed one has to be unpacked first"):
        ShardSet.open(tmp_path / "x.tar.gz")
