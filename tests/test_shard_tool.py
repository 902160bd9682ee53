"""`framestream shard` on real videos: what comes out, what is refused, and that it is the same every time."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.errors import ConfigError, SampleError
from framestream.pipeline.remote import Remote
from framestream.tools import engines
from framestream.tools.cli import main
from framestream.tools.clips import Clip
from framestream.tools.inputs import Source
from framestream.tools.making import ClipTask, make_clip
from framestream.tools.probing import ProbeTask, probe_source
from framestream.tools.shard import summary
from framestream.tools.shard_options import Cutting, Encoding, Filters, ShardOptions
from framestream.tools.shard_report import ShardReport
from framestream.tools.shard_run import build_shards
from framestream.tools.verify import verify_folder

from shard_setup import adds_up, frames, make_folder, samples, write_jsonl
from synthetic import make_video, vfr_ticks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos") / "in")


def of_rows(videos: Path, rows: list[Any], out: Path) -> ShardReport:
    """What becomes of a manifest beside the videos."""
    manifest = write_jsonl(videos / "m.jsonl", rows)
    try:
        report = build_shards([str(manifest)], out, workers=1)
    finally:
        manifest.unlink()
    adds_up(report)
    return report


# --- what comes out ---------------------------------------------------------------------------------------------


def test_whole_files_are_copied_untouched(videos: Path, tmp_path: Path) -> None:
    report = build_shards([str(videos)], tmp_path / "out", workers=1)
    adds_up(report)
    assert report.inputs == {"found": 4, "sampled": 3, "rejected": 1, "filtered": 0, "duplicate": 0}
    assert report.other_files == {".md": 1, ".txt": 1}
    assert (report.with_text, report.num_rejects) == (1, 1)
    got = samples(tmp_path / "out")
    assert [s.meta["source"] for s in got] == ["a.mp4", "b.c d.MOV", "sub/фильм №1.mkv"]
    assert [s.video_ext for s in got] == ["mp4", "mov", "mkv"]
    for sample in got:
        assert sample.video == (videos / sample.meta["source"]).read_bytes()
        assert "." not in sample.key
        assert sample.key.isascii()
    assert got[0].key == "a"
    assert got[0].text == "a caption"
    assert got[1].meta["has_audio"] is True
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [r["source"] for r in rejects] == ["broken.mp4"]
    assert rejects[0]["reason"]
    on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
    assert on_disk["inputs"] == report.inputs
    assert on_disk["clips"] == report.clips
    assert verify_folder(tmp_path / "out", decode="all", workers=1).problems == []
    assert summary(report, "out")[2] == "inputs with a text: 1"
    (tmp_path / "out" / "rejects.jsonl").write_text("")
    assert "rejects.jsonl has 0 lines, report.json says 1." in verify_folder(tmp_path / "out", workers=1).problems


def test_clips_hold_exactly_their_frames(videos: Path, tmp_path: Path) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=1.0), samples_per_shard=2)
    report = build_shards([str(videos / "a.mp4"), str(videos / "b.c d.MOV")], tmp_path / "out", options, workers=1)
    adds_up(report)
    got = samples(tmp_path / "out")
    assert [s.key for s in got] == ["a-00000", "a-00001", "a-00002", "b_c_d-00000", "b_c_d-00001"]
    assert [frames(s) for s in got[:3]] == [list(range(24)), list(range(24, 48)), list(range(48, 60))]
    for sample in got:
        assert sample.meta["fps"] == 24.0
        assert sample.meta["key_frames"] == list(range(0, sample.meta["num_frames"], 16))
        assert sample.meta["has_audio"] is False
    assert (got[2].meta["clip_start"], got[2].meta["clip_end"]) == (2.0, 2.5)
    assert verify_folder(tmp_path / "out", decode="all", workers=1).problems == []


def test_a_short_rest_is_dropped_and_counted(videos: Path, tmp_path: Path) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=1.2))  # 2.5 s: the rest is 0.1 s
    report = build_shards([str(videos / "a.mp4")], tmp_path / "out", options, workers=1)
    assert report.clips["written"] == 2
    assert report.clips["dropped"] == {"remainder shorter than half a clip": 1}
    report = build_shards([str(videos / "a.mp4")], tmp_path / "o2", ShardOptions(cutting=Cutting(9.0)), workers=1)
    adds_up(report)
    assert report.filtered == {"shorter than half a clip": 1}


def test_overlapping_clips_resized_at_another_rate(videos: Path, tmp_path: Path) -> None:
    cutting = Cutting(clip_seconds=1.0, stride_seconds=0.5)
    options = ShardOptions(cutting=cutting, encoding=Encoding(short_side=48, fps=12, gop=4))
    build_shards([str(videos / "a.mp4")], tmp_path / "out", options, workers=1)
    got = samples(tmp_path / "out")
    assert [s.meta["clip_start"] for s in got] == [0.0, 0.5, 1.0, 1.5]
    assert frames(got[1]) == list(range(12, 36, 2))
    assert (got[1].meta["width"], got[1].meta["height"], got[1].meta["fps"]) == (72, 48, 12.0)
    assert got[1].meta["key_frames"] == [0, 4, 8]


def test_a_variable_rate_keeps_its_times_and_rotation_is_applied(tmp_path: Path) -> None:
    make_video(tmp_path / "v.mp4", num_frames=40, size=(64, 96), rotation=90, vfr=True)
    options = ShardOptions(cutting=Cutting(clip_seconds=1.0))
    build_shards([str(tmp_path / "v.mp4")], tmp_path / "out", options, workers=1)
    ticks = [t / 4 / 24 for t in vfr_ticks(40)]
    first = [i for i, t in enumerate(ticks) if t < 1.0 - 1e-9]
    sample = samples(tmp_path / "out")[0]
    assert frames(sample) == first
    assert sample.info is not None
    assert sample.info.times() == pytest.approx([ticks[i] for i in first], abs=1e-4)
    assert (sample.meta["width"], sample.meta["height"], sample.meta["rotation"]) == (64, 96, 0)


def test_the_tail_of_every_source_is_held_out_with_a_gap(videos: Path, tmp_path: Path) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=0.25, val_tail=0.3, val_gap=0.3))
    report = build_shards([str(videos)], tmp_path / "out", options, workers=1)
    adds_up(report)
    assert report.clips["dropped"]["in the gap before the held-out part"] == 6  # two clips of each of three sources
    train, val = (samples(tmp_path / "out" / split) for split in ("train", "val"))
    assert {s.meta["source"] for s in train} == {s.meta["source"] for s in val}
    for source in {s.meta["source"] for s in train}:
        last = max(s.meta["clip_end"] for s in train if s.meta["source"] == source)
        first = min(s.meta["clip_start"] for s in val if s.meta["source"] == source)
        end = max(s.meta["clip_end"] for s in val if s.meta["source"] == source)
        assert first - last >= 0.3 - 1e-6
        assert (end - first) / end <= 0.3 + 1e-6
    assert verify_folder(tmp_path / "out", decode="none", workers=1).problems == []


# --- inputs -----------------------------------------------------------------------------------------------------


def test_a_manifest_brings_text_keys_splits_and_parts(videos: Path, tmp_path: Path) -> None:
    manifest = write_jsonl(
        videos / "m.jsonl",
        [
            {"path": "a.mp4", "text": "first part", "key": "one.x", "end": 1.0, "score": 3, "tags": ["x"]},
            {"path": "a.mp4", "start": 1.5, "split": "test"},
            {"path": str(videos / "sub" / "фильм №1.mkv")},
            {"path": "gone.mp4"},
            {"path": "a.mp4", "start": 7},
            {"path": "a.mp4", "start": "x"},
            {"path": "a.mp4", "start": 2, "end": 1},
            {"path": "notes.md"},
            {"text": "no path"},
            {"path": "a.mp4", "split": "../x"},
            "{broken",
            "[1]",
        ],
    )  # fmt: skip
    try:
        report = build_shards([str(manifest)], tmp_path / "out", workers=1)
    finally:
        manifest.unlink()
    adds_up(report)
    assert report.inputs["found"] == 12
    assert report.inputs["sampled"] == 3
    train, test = samples(tmp_path / "out" / "train"), samples(tmp_path / "out" / "test")
    assert train[0].text == "first part"
    assert train[0].meta["user"] == {"score": 3, "tags": ["x"]}
    assert "." not in train[0].key
    assert frames(train[0]) == list(range(24))
    assert frames(test[0]) == list(range(36, 60))
    assert test[0].text == "a caption"
    reasons = " | ".join(f"{r['source']}: {r['reason']}" for r in report.rejects)
    for words in ("gone.mp4: cannot be read", "the video has 2.500 s", "not a number", "not after its start",
                  "row 9: it has no path", "'../x'", "row 11: it is no JSON", "row 12: it is a list"):  # fmt: skip
        assert words in reasons


def test_csv_and_the_ways_it_breaks(videos: Path, tmp_path: Path) -> None:
    csv = videos / "m.csv"
    try:
        csv.write_bytes('\ufeffpath,text,score\na.mp4,"a, quoted",7\nb.c d.MOV,x,1,2,3\n'.encode())
        report = build_shards([str(csv)], tmp_path / "out", workers=1)
        assert [(s.text, s.meta["user"]) for s in samples(tmp_path / "out")] == [("a, quoted", {"score": "7"})]
        assert "more than the header" in report.rejects[0]["reason"]
        csv.write_text("file,text\na.mp4,x\n")
        with pytest.raises(ConfigError, match="no column 'path'"):
            build_shards([str(csv)], tmp_path / "o2", workers=1)
    finally:
        csv.unlink()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        build_shards([str(tmp_path / "m.parquet")], tmp_path / "out", workers=1)


def test_parquet_is_read_as_other_manifests_are(videos: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"path": [str(videos / "a.mp4"), None], "text": ["x", "y"], "score": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    report = build_shards([str(tmp_path / "m.parquet")], tmp_path / "out", workers=1)
    adds_up(report)
    assert [s.meta["user"] for s in samples(tmp_path / "out")] == [{"score": 1}]


def test_parquet_cells_become_what_metadata_can_hold_or_their_row_is_rejected(videos: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [
        {"path": str(videos / "a.mp4"), "start": Decimal("0.5"), "when": datetime(2024, 5, 6, 7, 8), "day": None,
         "price": Decimal("1.25"), "exact": Decimal("0.1234567890123456789"), "blob": None},
        {"path": str(videos / "b.c d.MOV"), "start": None, "when": None, "day": date(2024, 5, 6),
         "price": None, "exact": None, "blob": None},
        {"path": str(videos / "a.mp4"), "start": None, "when": None, "day": None,
         "price": None, "exact": None, "blob": b"\x00"},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    report = build_shards([str(tmp_path / "m.parquet")], tmp_path / "out", workers=1)
    adds_up(report)
    first, second = samples(tmp_path / "out")
    assert first.meta["user"] == {"when": "2024-05-06T07:08:00", "price": 1.25, "exact": "0.1234567890123456789"}
    assert first.meta["clip_start"] == 0.5
    assert second.meta["user"] == {"day": "2024-05-06"}
    assert "row 3" in report.rejects[0]["source"]
    assert "of the kind bytes" in report.rejects[0]["reason"]


def test_rows_that_differ_in_a_column_of_their_own_are_all_samples(videos: Path, tmp_path: Path) -> None:
    """As questions about one video; the split alone makes no other sample of it."""
    rows: list[Any] = [{"path": "a.mp4", "question": f"{k}?", "answer": k} for k in range(3)]
    rows += [rows[0], {**rows[1], "split": "val"}]
    report = of_rows(videos, rows, tmp_path / "out")
    assert (report.inputs["sampled"], report.inputs["duplicate"]) == (3, 2)
    assert [s.meta["user"]["answer"] for s in samples(tmp_path / "out")] == [0, 1, 2]


def test_rows_that_metadata_cannot_hold_cost_themselves_only(videos: Path, tmp_path: Path) -> None:
    lone, deep = "\ud800", json.loads("[" * 200 + "]" * 200)
    rows: list[Any] = [{"path": "b.c d.MOV", "start": 1.0}]
    rows += [
        {"path": "a.mp4", **row} for row in ({"text": lone}, {"x": lone}, {"x": [{lone: 1}]}, {lone: 1}, {"key": lone})
    ]
    rows += [{"path": f"{lone}.mp4"}, {"path": f"{lone}.doc"}, {"path": "a.mp4", "x": deep}]
    rows += [{"path": "a.mp4", "start": 10**400}, {"path": "a.mp4", "x": float("nan")}]
    report = of_rows(videos, rows, tmp_path / "out")
    assert (report.inputs["sampled"], report.inputs["rejected"]) == (1, 10)
    reasons = " | ".join(reject["reason"] for reject in report.rejects)
    for words in ("no Unicode: '\\ud800'", "nested deeper", "not a number of seconds", "cannot hold: nan"):
        assert words in reasons


def test_metadata_that_cannot_be_written_is_a_reject_of_its_clip(videos: Path) -> None:
    """Inputs are checked when they are read; what still comes here must not end a run of a million others."""
    path = videos / "a.mp4"
    source = Source(str(path), "a.mp4", "a", user={"x": b"bytes"}, size=path.stat().st_size)
    info = probe_source(ProbeTask(source, None, Remote())).info
    task = ClipTask(Clip(source, "a", 0.0, info.duration, None), info, False, Encoding(), Remote())
    known = replace(task, clip=replace(task.clip, source=replace(source, sha256="0" * 64)))
    for each in (task, known):
        with pytest.raises(SampleError, match=r"a\.mp4: metadata cannot become JSON"):
            make_clip(each)


def test_linked_folders_are_followed_once(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.symlink(videos / "sub", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    report = build_shards([str(tmp_path / "in")], tmp_path / "out", workers=1)
    assert [s.meta["source"] for s in samples(tmp_path / "out")] == ["linked/фильм №1.mkv"]
    assert report.inputs["found"] == 1


def test_equal_names_get_different_keys(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "s").mkdir(parents=True)
    video = make_video(tmp_path / "x" / "s" / "v.mp4", num_frames=8, size=(64, 48)).read_bytes()
    for name in ("y/s/v.mp4", "x/s_v.mp4", "x/s/v.m4v", "x/" + "long" * 30 + ".mp4"):
        (tmp_path / name).write_bytes(video)
    inputs = [str(tmp_path / "x"), str(tmp_path / "y"), f"{tmp_path}/x/*.mp4"]
    report = build_shards(inputs, tmp_path / "out", workers=1)
    adds_up(report)
    assert report.inputs["duplicate"] == 2
    keys = [s.key for s in samples(tmp_path / "out")]
    assert len(set(keys)) == len(keys) == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: [str(d)], "there is no video"),
        (lambda d: [str(d / "nothing")], "does not exist"),
        (lambda d: ["nothing://bucket/videos"], "cannot be opened by fsspec"),
    ],
)
def test_no_video_is_exit_code_2_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, words: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.md").write_text("")
    assert main(["shard", *make(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_all_rejected_is_still_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.mp4").write_bytes(b"")
    os.symlink(tmp_path / "nowhere.mp4", tmp_path / "y.mp4")
    inputs = [str(tmp_path / "x.mp4"), str(tmp_path / "y.mp4"), __file__]
    assert main(["shard", *inputs, "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "3 rejected" in capsys.readouterr().out
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 3
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cutting(clip_seconds=0),
        lambda: Cutting(clip_seconds=-1.0),
        lambda: Cutting(clip_seconds=1e-300),
        lambda: Cutting(clip_seconds=1.0, stride_seconds=1e-300),
        lambda: Cutting(val_tail=0.2),
        lambda: Cutting(clip_seconds=1, val_tail=1.0),
        lambda: Cutting(clip_seconds=1, val_gap=1.0),
        lambda: Cutting(stride_seconds=1.0),
        lambda: Encoding(short_side=65),
        lambda: Encoding(gop=0),
        lambda: Encoding(crf=60),
        lambda: Encoding(fps=0),
        lambda: ShardOptions(samples_per_shard=0),
        lambda: ShardOptions(prefix="a/b"),
        lambda: ShardOptions(transcode="perhaps"),  # type: ignore[arg-type]
        lambda: ShardOptions(transcode="never", cutting=Cutting(1.0, 0.5)),
        lambda: ShardOptions(transcode="never", encoding=Encoding(fps=5.0)),
        lambda: ShardOptions(bytes_per_shard=0),
        lambda: ShardOptions(val_share=1.0),
        lambda: ShardOptions(val_share=0.1, cutting=Cutting(1.0, val_tail=0.1)),
        lambda: Cutting(scene_threshold=1.5),
        lambda: Encoding(codec="mpeg2"),  # type: ignore[arg-type]
        lambda: Encoding(audio="loud"),  # type: ignore[arg-type]
        lambda: Filters(min_seconds=2.0, max_seconds=1.0),
        lambda: Filters(min_side=0),
    ],
)
def test_impossible_options_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


@pytest.mark.slow
def test_an_encode_that_takes_too_long_costs_its_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENCODED_S", 0.001)  # more for each second of a clip
    make_video(tmp_path / "a.mp4", num_frames=24, size=(64, 48))
    make_video(tmp_path / "b.mp4", num_frames=600, size=(480, 360), b_frames=0)
    options = ShardOptions(transcode="always")
    inputs = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    report = build_shards(inputs, tmp_path / "out", options, workers=1, timeout_s=0.6)
    adds_up(report)
    assert [s.meta["source"] for s in samples(tmp_path / "out")] == ["a.mp4"]
    assert "took longer than 0.625 s and was stopped; --timeout-seconds gives it more" in report.rejects[0]["reason"]
