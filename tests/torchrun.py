"""Jobs of several real processes: a script of this folder under torchrun, with a limit on its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
LIMIT_S = 120.0  # a job that takes longer hangs
LOG = "job.log"


def start(script: str, ranks: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start `tests/SCRIPT FOLDER` on `ranks` processes of one thread each; what they print goes to FOLDER/job.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    with open(folder / LOG, "wb") as log:
        return subprocess.Popen(
            [*command, str(TESTS / script), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(job: subprocess.Popen[bytes], folder: Path, limit_s: float = LIMIT_S) -> None:
    """Wait for the end of a job that has to succeed."""
    try:
        ended = job.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        job.terminate()  # torchrun takes its ranks with it
        job.wait(timeout=60)
        raise AssertionError(f"The job hangs: no end within {limit_s:g} s.\n{printed(folder)}") from None
    assert ended == 0, printed(folder)


def printed(folder: Path) -> str:
    """The last lines that a job printed."""
    return (folder / LOG).read_text(errors="replace")[-6000:]


def run(script: str, ranks: int, folder: Path) -> list[Any]:
    """Run a job that writes `FOLDER/rankN.json` on each rank, and return what they hold."""
    finish(start(script, ranks, folder), folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
