"""What a dry run says of inputs that are rows: their counts are those of the run, and its words are readable."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from framestream.tools.dry_run import SAMPLED_SOURCES, Forecast, dry_run, naming_once
from framestream.tools.shard_options import Cutting, ShardOptions
from framestream.tools.shard_run import build_shards

from shard_setup import write_jsonl
from synthetic import make_video

EMPTY = Forecast(1, 0, 0, {}, 1, 1, 0, {}, 1, 1, 1.0, 0, 1.0, 1.0, 1, {})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows of each of 24 videos, and the first two rows once more."""
    folder = tmp_path_factory.mktemp("rows")
    video = make_video(folder / "0.mp4", num_frames=24, size=(64, 48))
    for number in range(1, 24):
        os.link(video, folder / f"{number}.mp4")
    rows = [
        {"path": f"{n}.mp4", "start": k / 20, "end": k / 20 + 0.5, "text": f"part {k} of {n}"}
        for n in range(24)
        for k in range(10)
    ]
    return write_jsonl(folder / "rows.jsonl", [*rows, *rows[:2]])


def test_rows_are_counted_as_the_run_counts_them(manifest: Path, tmp_path: Path) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=0.5))
    forecast = dry_run([str(manifest)], options, workers=2)
    report = build_shards([str(manifest)], tmp_path / "out", options, workers=2)
    assert (forecast.inputs, forecast.sampled_sources) == (242, SAMPLED_SOURCES)
    assert forecast.named_twice == report.inputs["duplicate"] == 2
    assert forecast.clips == report.clips["written"] == 240
    assert forecast.shards == report.splits[""]["shards"]
    assert forecast.seconds == pytest.approx(report.splits[""]["seconds"], rel=0.05)
    assert forecast.num_bytes == pytest.approx(report.splits[""]["bytes"], rel=1.0)
    assert 0 < forecast.probing_s < forecast.making_s  # of 24 videos, and of 240 clips


def test_rows_that_are_filtered_are_scaled_as_rows(manifest: Path) -> None:
    short = dry_run([str(manifest)], ShardOptions(cutting=Cutting(clip_seconds=2.0)), workers=1)
    assert (short.clips, short.filtered) == (0, {"shorter than half a clip": 240})


def test_open_groups_that_cannot_be_copied_are_foreseen(tmp_path: Path) -> None:
    make_video(tmp_path / "v.mp4", num_frames=96, gop=24, size=(64, 48), open_gop=True)
    cutting = Cutting(clip_seconds=1.0)
    never = dry_run([str(tmp_path)], ShardOptions(cutting=cutting, transcode="never"), workers=1)
    assert never.uncut == never.sampled_clips == 4
    said = "\n".join(never.lines())
    assert "4 of 4 sampled clips cannot be cut out without encoding: with --transcode auto they are encoded" in said
    assert "may build on what comes before it" in said
    auto = dry_run([str(tmp_path)], ShardOptions(cutting=cutting), workers=1)
    assert (auto.uncut, auto.clips) == (0, 4)


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(69_800, "69.8 kB"), (999_000_000, "999 MB"), (1_230_000_000, "1.23 GB"), (4_560_000_000_000, "4.56 TB")],
)
def test_sizes_are_said_in_a_unit_that_fits(num_bytes: int, words: str) -> None:
    assert f"of together {words}" in "\n".join(replace(EMPTY, num_bytes=num_bytes).lines())


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("a/v.mp4: it is no video", "a/v.mp4: it is no video"),
        ("a/v.mp4 (0 to 2 s): a/v.mp4: frame 7 is damaged", "a/v.mp4 (0 to 2 s): frame 7 is damaged"),
        ("a/v.mp4 cannot be read (a/v.mp4 cannot be fetched)", "a/v.mp4 cannot be read (cannot be fetched)"),
        ("it took more than 600 s", "it took more than 600 s"),
    ],
)
def test_a_reason_names_its_source_once(reason: str, words: str) -> None:
    assert naming_once(reason, "a/v.mp4") == words
