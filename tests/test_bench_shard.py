"""`framestream bench shard` and `bench assign`, small: they measure what they say and write it down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from framestream.tools.bench_shard import OURS, PLAIN, bench_shard
from framestream.tools.cli import main


def test_shard_is_measured_beside_the_plain_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = bench_shard(tmp_path, 1, num_clips=1, seconds=8, height=96, workers=1)
    assert len(facts["rows"]) == 6
    for row in facts["rows"]:
        assert row["ms"][OURS] > 0
        if PLAIN in row["ms"]:
            assert row["facts"]["speed"] == pytest.approx(row["ms"][PLAIN] / row["ms"][OURS])
        else:
            assert shutil.which("ffmpeg") is None
            assert "ffmpeg" in row["notes"][PLAIN]
    assert (tmp_path / "shard.png").stat().st_size > 1000
    assert "whole files" in capsys.readouterr().out


def test_assign_counts_what_it_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "assign", "--rows", "3000", "--output", str(tmp_path)]) == 0
    assert "3,000 probed inputs" in capsys.readouterr().out
    cases = json.loads((tmp_path / "assign.json").read_text())["cases"]
    assert 0 < cases["whole files"]["clips"] < 3000  # some are filtered, some are duplicates
    assert cases["clips of 5 s"]["clips"] > cases["whole files"]["clips"]
    assert all(case["peak_mb"] < 500 for case in cases.values())


def test_a_bench_of_nothing_is_refused(tmp_path: Path) -> None:
    assert main(["bench", "assign", "--rows", "0", "--output", str(tmp_path)]) == 2
