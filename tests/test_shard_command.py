"""`framestream shard` at the terminal: dry run, logs, exit codes, filters and duplicates in its words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.probe import probe_video
from framestream.tools.cli import main

from shard_setup import make_folder, samples, tree, write_jsonl
from synthetic import make_video


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos") / "in")


def run(*argv: Any) -> int:
    return main(["shard", *map(str, argv), "--workers", "1"])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dry_run_writes_nothing_and_its_estimates_come_true(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--output", out, "--clip-seconds", 0.5, "--short-side", 48, "--samples-per-shard", 3, "--log", "json")
    assert run(videos, *options, "--dry-run") == 0
    assert not out.exists()
    expected = json.loads(capsys.readouterr().out)
    assert run(videos, *options) == 0
    done = json.loads(capsys.readouterr().out)
    assert expected["inputs"] == done["inputs"]["found"] == 4
    assert expected["rejected"] == done["inputs"]["rejected"] == 1
    assert expected["clips"] == done["clips"]["written"]  # all four were in the sample
    facts = done["splits"][""]
    assert expected["shards"] == facts["shards"]
    assert expected["seconds"] == pytest.approx(facts["seconds"], rel=0.05)
    assert 0.5 < expected["num_bytes"] / sum(len(s.video) for s in samples(out)) < 2
    assert expected["making_s"] > 0
    assert any("broken.mp4" in reason for reason in expected["reasons"])


def test_a_split_that_stays_empty_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = make_video(tmp_path / "a.mp4", num_frames=24, size=(64, 48))
    for share, said in ((0.01, "no clip came into val: hold out more"), (0.99, "no clip came into train")):
        assert run(video, "--output", tmp_path / str(share), "--val-share", share, "--log", "plain") == 0
        assert said in capsys.readouterr().out
    assert run(video, "--output", tmp_path / "whole", "--log", "plain") == 0
    assert "no clip came" not in capsys.readouterr().out


@pytest.mark.parametrize(("decode", "rejected"), [("none", 0), ("first", 0), ("all", 1)])
def test_how_much_is_decoded_decides_what_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decode: str, rejected: int
) -> None:
    video = make_video(tmp_path / "a.mp4", num_frames=24, gop=8, b_frames=0, size=(320, 192))
    places = probe_video(video, packets=True).packets
    assert places is not None
    data = bytearray(video.read_bytes())
    end = int(places.offset[8] + places.size[8])  # of a key frame in the middle
    data[end - 1000 : end] = bytes(range(1, 251)) * 4
    video.write_bytes(data)
    assert run(video, "--output", tmp_path / "out", "--decode", decode, "--log", "json") == 0
    inputs = json.loads(capsys.readouterr().out)["inputs"]
    assert (inputs["sampled"], inputs["rejected"]) == (1 - rejected, rejected)
    assert [("a.mp4" in line["reason"]) for line in lines_of(tmp_path / "out" / "rejects.jsonl")] == [True] * rejected


def test_a_dry_run_in_words(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(videos, "--output", tmp_path / "out", "--min-seconds", 2, "--dry-run") == 0
    said = capsys.readouterr().out
    for words in ("4 inputs", "1 inputs rejected, 2 filtered (2 by min_seconds)", "nothing was written"):
        assert words in said


def test_logs_can_be_read_by_programs_or_be_silent(videos: Path, tmp_path: Path) -> None:
    def log(mode: str) -> subprocess.CompletedProcess[str]:
        argv = ["shard", str(videos), "--output", str(tmp_path / mode), "--workers", "1", "--log", mode]
        command = [sys.executable, "-m", "framestream.tools.cli", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    told = log("json")
    events = [json.loads(line) for line in told.stderr.splitlines()]
    steps = [event["step"] for event in events if event["event"] == "progress"]
    assert list(dict.fromkeys(steps)) == ["listing", "probing", "deciding", "writing"]
    assert json.loads(told.stdout)["clips"]["written"] == 3
    silent = log("quiet")
    assert (silent.stdout, silent.stderr) == ("", "")
    assert tree(tmp_path / "json") == tree(tmp_path / "quiet")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--part", "9/8"], "has to be I/N"),
        (["--part", "1/8", "--dry-run"], "exclude each other"),
        (["--part", "1/8", "--overwrite"], "can overwrite"),
        (["--storage-options", "{"], "has to be a JSON object"),
        (["--storage-options", "[1]"], "has to be a JSON object"),
        (["--megabytes-per-shard", "0"], "bytes_per_shard"),
        (["--val-share", "2"], "val_share"),
        (["--min-fps", "30", "--max-fps", "20"], "nothing lies between"),
        (["--clip-seconds", "0"], "clip_seconds"),
        (["--workers", "-1"], "have to be positive"),
    ],
)
def test_what_cannot_be_done_is_exit_code_2_before_any_work(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(["shard", str(videos), "--output", str(tmp_path / "out"), *argv]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_input_ends_in_exactly_one_way(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    video = make_video(tmp_path / "in" / "first.mp4", num_frames=48, size=(96, 64))
    make_video(tmp_path / "in" / "small.mp4", num_frames=48, size=(48, 32))
    make_video(tmp_path / "in" / "short.mp4", num_frames=6, size=(96, 64))
    make_video(tmp_path / "in" / "tall.mp4", num_frames=48, size=(64, 96))
    (tmp_path / "in" / "renamed.mp4").write_bytes(video.read_bytes())
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video" * 99)
    rows = [{"path": f"{name}.mp4"} for name in ("first", "small", "short", "tall", "renamed", "broken", "gone")]
    rows += [{"path": "./first.mp4"}, {"path": "first.mp4", "start": 1.0}, {"text": "no path"}]
    manifest = write_jsonl(tmp_path / "in" / "m.jsonl", rows)
    out = tmp_path / "out"
    options = ("--min-side", 40, "--min-seconds", 0.5, "--drop-duplicates", "--val-share", 0.4, "--log", "quiet")
    assert run(manifest, "--output", out, *options) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["inputs"] == {"found": 10, "sampled": 3, "rejected": 3, "filtered": 2, "duplicate": 2}
    assert report["filtered"] == {"min_seconds": 1, "min_side": 1}
    left_out = {(line["source"], line["rule"]): line.get("of") for line in lines_of(out / "left_out.jsonl")}
    assert left_out[("renamed.mp4", "same pictures")] == "first.mp4"
    assert left_out[("./first.mp4", "named twice")] == "first.mp4"
    assert left_out.keys() >= {("small.mp4", "min_side"), ("short.mp4", "min_seconds")}
    assert {line["source"] for line in lines_of(out / "rejects.jsonl")} == {"broken.mp4", "gone.mp4", "m.jsonl row 10"}
    for split in ("train", "val"):
        index = json.loads((out / split / "index.json").read_text())
        assert index["inputs"] == report["inputs"]
        assert index["clips"] == report["clips"]
    both = [{s.meta["source"] for s in samples(out / split)} for split in ("train", "val")]
    assert both[0].isdisjoint(both[1])  # the two rows of first.mp4 went the same way
    assert set.union(*both) == {"first.mp4", "tall.mp4"}


def test_shards_are_limited_in_bytes_and_a_large_clip_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, frames in (("a", 10), ("b", 10), ("c", 200), ("d", 10)):
        make_video(tmp_path / "in" / f"{name}.mp4", num_frames=frames, size=(96, 64))
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "in").iterdir()}
    limit = (sizes["a"] + sizes["b"]) / 1e6
    out = tmp_path / "out"
    assert run(tmp_path / "in", "--output", out, "--megabytes-per-shard", limit, "--log", "quiet") == 0
    index = json.loads((out / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [2, 1, 1]


def test_a_shard_whose_clips_are_all_lost_is_no_empty_tar(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        make_video(tmp_path / "in" / f"{name}.mp4", num_frames=48, size=(96, 64))
    spoiled = bytearray((tmp_path / "in" / "b.mp4").read_bytes())
    spoiled[len(spoiled) // 2 : len(spoiled) // 2 + 4000] = bytes(4000)  # which nobody sees before it is decoded
    (tmp_path / "in" / "b.mp4").write_bytes(spoiled)
    out = tmp_path / "out"
    options = ("--transcode", "always", "--samples-per-shard", 1, "--log", "quiet")
    assert run(tmp_path / "in", "--output", out, *options) == 0
    before = tree(out)
    assert sorted(path.name for path in out.glob("*.tar")) == ["clips-000000.tar", "clips-000002.tar"]
    report = json.loads((out / "report.json").read_text())
    assert report["inputs"] == {"found": 3, "sampled": 2, "rejected": 1, "filtered": 0, "duplicate": 0}
    (reject,) = lines_of(out / "rejects.jsonl")
    assert (reject["source"], reject["key"], reject["start"]) == ("b.mp4", "b", 0.0)
    assert run(tmp_path / "in", "--output", out, *options) == 0
    assert tree(out) == before


def test_the_help_page_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shard", "--help"])
    page = capsys.readouterr().out
    for words in ("--dry-run", "--scene-threshold", "--engine {local,ray}", "--part PART", "Exit code: 0", "130"):
        assert words in page
