"""The benchmarks run, and say what they measured. What they measured is nobody's assertion."""

from __future__ import annotations

import json

import pytest
import torch

from framestream.tools.bench_step import training_step
from framestream.tools.cli import main
from framestream.tools.peak_memory import peak_bytes


@pytest.mark.parametrize(("name", "candidates"), [("masks", 4), ("attention", 3), ("packing", 4)])
def test_bench_prints_and_writes(name, candidates, tmp_path, capsys):
    code = main(["bench", name, "--output", str(tmp_path), "--repeats", "2", "--tokens", "256", "512"])
    assert code == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert result["device"] == "cpu"
    assert {row["case"].rpartition("=")[2] for row in result["rows"]} == {"256", "512"}
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert len(row["ms"]) == candidates
        assert all(value > 0 for value in (*row["ms"].values(), *row["facts"].values()))
        assert row["case"].split(",")[0] in printed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("step", 1), ("rollout", 2)])
def test_bench_of_the_model_prints_and_writes(name, rows, tmp_path, capsys):
    assert main(["bench", name, "--output", str(tmp_path), "--repeats", "2", "--tokens", "256"]) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["rows"]) == rows
    assert all(row["case"].split(",")[0] in capsys.readouterr().out for row in result["rows"][:1])


def test_the_usual_design_leaks_without_a_memory_mask_and_ours_does_not():
    row = training_step(64, 1, "cpu")[0]
    assert row.facts["framestream leaks"] == 0
    assert row.facts["decoder, memory_mask leaks"] == 0
    assert row.facts["decoder leaks"] == 15


def test_peak_memory_is_what_was_held_at_once():
    def work() -> None:
        first = torch.zeros(1000)
        del first
        second, third = torch.zeros(500), torch.zeros(700)
        del second, third

    assert 4 * 1200 <= peak_bytes(work) < 4 * 1200 + 512


@pytest.mark.parametrize(("name", "rows"), [("order", 5), ("workers", 1), ("resume", 2)])
def test_the_loader_is_measured_too(name, rows, tmp_path, capsys):
    assert main(["bench", name, "--output", str(tmp_path), "--repeats", "1"]) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["rows"]) == rows
    assert all(value > 0 for row in result["rows"] for value in row["ms"].values())
    printed = capsys.readouterr().out
    assert all(row["case"].split(",")[0] in printed for row in result["rows"])


def test_impossible_benchmarks_stop_at_once(capsys):
    assert main(["bench", "masks", "--repeats", "0"]) == 2
    assert "at least one repeat" in capsys.readouterr().err
    assert main(["bench", "masks", "--device", "foo"]) == 2
    assert "device is 'foo', it has to be cpu or cuda" in capsys.readouterr().err
    assert main(["bench", "masks", "--threads", "0"]) == 2
    assert "threads is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "speed"])
    assert "masks" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said_before_measuring(tmp_path, capsys):
    assert main(["bench", "masks", "--device", "cuda", "--output", str(tmp_path / "out")]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
