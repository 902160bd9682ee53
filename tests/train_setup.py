"""What the tests of training share: a small configuration, and the command line as users call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "data": {
        "sampling": {"kind": "fast_slow", "num_fast": 5, "num_slow": 3},
        "image_size": 32,
        "augment": True,
        "random_end": True,
        "batch_size": 2,
        "workers": 0,
    },
    "model": {
        "tower": {"kind": "pixel", "patch_size": 8},
        "embedding_dim": 192,
        "predictor_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "loss_weight": 1.0,
    },
    "train": {
        "steps": 12,
        "lr": 1e-3,
        "warmup_steps": 2,
        "eval_every": 0,
        "checkpoint_every": 3,
        "log_every": 1,
        "rollout_steps": 2,
        "tensorboard": False,
        "device": "cpu",
    },
}


def write_config(path: Path, shards: Path, output: Path, held_out: Path | None = None, **train: Any) -> Path:
    """A small configuration file; keywords change the section `train`."""
    values = {**SMALL, "output": str(output)}
    values["data"] = {**SMALL["data"], "shards": str(shards), "held_out": str(held_out) if held_out else None}
    values["train"] = {**SMALL["train"], **train}
    path.write_text(yaml.safe_dump(values))
    return path


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`framestream ARGUMENTS` in a process of its own, on one thread, as the tests themselves run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "framestream.tools.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def losses(output: Path) -> dict[int, float]:
    """Loss by step, from metrics.jsonl."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """Until the run has logged `step`. AssertionError when it ends or hangs before."""
    deadline = time.monotonic() + 120
    path = output / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= step):
        assert process.poll() is None, f"the run ended early: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "the run never came to that step"
        time.sleep(0.005)
