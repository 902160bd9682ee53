"""Data sets in the layout of video2dataset: read, trained on and verified as they are.

That tool writes `00000.tar` with `000000000.mp4`, `.txt` and `.json` for each sample, keeps failed downloads as
samples without a video, and puts a Parquet table and `00000_stats.json` beside each tar.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from framestream.pipeline.shards import ShardSet
from framestream.tools.verify import verify, verify_folder

from synthetic import make_audio
from tars import load, number_of, tiny_video


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


def meta_of(key: str, *, status: str = "success", **more: Any) -> dict[str, Any]:
    return {
        "url": f"https://example.org/{key}",
        "caption": f"caption of {key}",
        "key": key,
        "status": status,
        "error_message": None if status == "success" else "HTTP Error 404: Not Found",
        "yt_meta_dict": {"info": {"id": key, "fps": 24, "duration": 9}, "subtitles": None},
        **more,
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_audio(tmp_path_factory.mktemp("sound") / "sound.m4a").read_bytes()


@pytest.fixture
def dataset(tmp_path: Path, sound: bytes) -> Path:
    """Two shards: a whole video, one that was cut into two clips, one with its sound apart, a failed download."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows: list[list[tuple[dict[str, Any], dict[str, bytes]]]] = [
        [
            (meta_of("000000000"), {"mp4": tiny_video(0)}),
            (meta_of("000000001", status="failed_to_download"), {}),
            (meta_of("000000002"), {"mp4": tiny_video(1), "m4a": sound, "mp3": sound}),
        ],
        [
            (meta_of("000010000_00000", clips=[[0.0, 2.5]]), {"mp4": tiny_video(2)}),
            (meta_of("000010000_00001", clips=[["00:00:02.500", "00:00:05.000"]]), {"mp4": tiny_video(0)}),
        ],
    ]
    for number, samples in enumerate(rows):
        with wds.TarWriter(str(folder / f"{number:05d}.tar")) as sink:
            for meta, streams in samples:
                text = json.dumps(meta, indent=4)
                sink.write({"__key__": meta["key"], **streams, "txt": meta["caption"], "json": text.encode()})
        table = pa.Table.from_pylist([{k: meta[k] for k in ("url", "caption", "key", "status")} for meta, _ in samples])
        pq.write_table(table, folder / f"{number:05d}.parquet")
        stats = {"count": len(samples), "successes": sum(bool(streams) for _, streams in samples)}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def test_a_loader_reads_it(dataset: Path) -> None:
    loader = load(dataset)
    batches = {batch["keys"][0]: batch for batch in loader}
    assert {key: number_of(batch, 3) for key, batch in batches.items()} == {
        "000000000": 0,
        "000000002": 1,
        "000010000_00000": 2,
        "000010000_00001": 0,
    }
    assert batches["000000000"]["text"] == ["caption of 000000000"]
    assert not loader.stats()["rejects"]


def test_texts_and_metadata(dataset: Path) -> None:
    shards = ShardSet.open(f"{dataset}/{{00000..00001}}.tar")
    samples = [shards.read(*shards.locate(index)) for index in range(len(shards))]
    assert [sample.text for sample in samples] == [f"caption of {sample.key}" for sample in samples]
    assert samples[1].members.keys() == {"mp4", "txt", "json"}  # sound is left where it is
    assert samples[2].meta["clips"] == [[0.0, 2.5]]
    assert samples[0].info is None  # what it says of the video is not said in our fields
    assert [problem for problem in shards.problems if "000000001" not in problem] == []


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_verify_is_not_frightened_and_frightens_nobody(
    used: bool, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if used:
        ShardSet.open(dataset)  # leaves index files beside whole tars
    assert verify(str(dataset), decode="all", workers=1) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0]
        == f"{dataset}: 2 shards, 4 samples, {sum(p.stat().st_size for p in dataset.glob('*.tar')) / 1e6:.1f} MB"
    )
    assert said[1] == "all frames of 4 of 4 videos were decoded"
    notes = [line for line in said if line.startswith("note: ")]
    assert "not written by framestream" in notes[0]
    assert "1 samples have no video and are left out" in notes[1]
    assert len(notes) in (2, 3)
    assert len(said) == 3 + len(notes)
    assert said[-1] == "everything agrees"


def test_verify_finds_what_is_really_wrong(dataset: Path) -> None:
    path = dataset / "00001.tar"
    data = path.read_bytes()
    begin = data.index(b"mdat") + 900
    path.write_bytes(data[:begin] + bytes(600) + data[begin + 600 :])
    report = verify_folder(dataset, decode="all", workers=1)
    assert len(report.problems) == 1
    assert "00001.tar: sample '000010000_00000' does not decode" in report.problems[0]
