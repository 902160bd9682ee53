"""The benchmarks run, and say what they measured. What they measured is nobody's assertion."""

from __future__ import annotations

import json

import pytest

from framestream.tools.cli import main


@pytest.mark.parametrize(("name", "candidates"), [("masks", 2), ("attention", 3)])
def test_bench_prints_and_writes(name, candidates, tmp_path, capsys):
    code = main(["bench", name, "--output", str(tmp_path), "--repeats", "2", "--tokens", "[256]"])
    assert code == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert result["device"] == "cpu"
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert len(row["ms"]) == candidates
        assert all(value > 0 for value in (*row["ms"].values(), *row["facts"].values()))
        assert row["case"].split(",")[0] in printed


def test_impossible_benchmarks_stop_at_once(capsys):
    assert main(["bench", "masks", "--repeats", "0"]) == 2
    assert "at least one repeat" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "speed"])
    assert "masks" in capsys.readouterr().err
