"""megatron-energon prepares our shards as they are, and reads every sample of them.

Runs with the interpreter that FRAMESTREAM_ENERGON_PYTHON names (energon wants an environment of its own), or with
this one where energon is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.shards import ShardSet, ShardWriter
from framestream.tools.shard_options import Cutting, ShardOptions
from framestream.tools.shard_run import build_shards
from framestream.tools.verify import verify_folder

from synthetic import make_video
from tars import tiny_meta, tiny_video

PREPARE = """
import sys
from megatron.energon.cli.main import main
main(sys.argv[1:])
"""
READ = """
import hashlib, json, sys
from megatron.energon import (
    Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys, edataclass, get_loader, get_val_dataset,
    stateless,
)

@edataclass
class Clip(Sample):
    digest: str
    text: str
    meta: dict

@stateless
def cook(sample):
    return Clip(
        **basic_sample_keys(sample),
        digest=hashlib.sha256(sample["mp4"]).hexdigest(),
        text=sample["txt"].decode() if "txt" in sample else None,
        meta=json.loads(sample["json"]),
    )

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
    decoder = None

found = {}
for split in sys.argv[2:]:
    dataset = get_val_dataset(
        sys.argv[1], split_part=split, batch_size=None, task_encoder=Encoder(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    found[split] = [(s.__key__, s.digest, s.text, s.meta) for s in get_loader(dataset)]
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def energon() -> str:
    """A Python that has megatron-energon."""
    if python := os.environ.get("FRAMESTREAM_ENERGON_PYTHON"):
        return python
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.energon") is None:
        pytest.skip("megatron-energon is not installed; FRAMESTREAM_ENERGON_PYTHON may name a Python that has it")
    return sys.executable


def run(python: str, code: str, *arguments: str) -> str:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def prepare(python: str, folder: Path, *splits: str) -> dict[str, int]:
    """Run `energon prepare` without questions; samples by shard, as it has counted them."""
    parts = [word for split in splits for word in ("--split-parts", rf"{split}:{split}/.*\.tar")]
    options = ["--non-interactive", "--no-progress", "--num-workers", "1", "--sample-type", "CrudeWebdataset"]
    run(python, PREPARE, "prepare", *options, *parts, str(folder))
    counts: dict[str, int] = json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    return counts


def ours(folder: Path) -> list[tuple[str, str, str | None, dict[str, Any]]]:
    shards = ShardSet.open(folder)
    samples = [shards.read(*shards.locate(index)) for index in range(len(shards))]
    return [
        (s.key, hashlib.sha256(s.video).hexdigest(), s.text if "txt" in s.members else None, s.meta) for s in samples
    ]


def same(theirs: list[list[Any]], folder: Path) -> None:
    assert sorted(map(tuple, theirs), key=lambda row: row[0]) == sorted(ours(folder), key=lambda row: row[0])


def test_shards_of_the_writer(energon: str, tmp_path: Path) -> None:
    for split, number in (("train", 7), ("val", 2)):
        with ShardWriter(tmp_path / "set" / split, samples_per_shard=3) as writer:
            for n in range(number):
                text = f"{split} {n}" if n % 2 else None
                writer.write(f"{split}-{n}", tiny_video(n % 3), "mp4", tiny_meta(n % 3), text)
    counts = prepare(energon, tmp_path / "set", "train", "val")
    assert counts == {
        "train/clips-000000.tar": 3,
        "train/clips-000001.tar": 3,
        "train/clips-000002.tar": 1,
        "val/clips-000000.tar": 2,
    }
    found = json.loads(run(energon, READ, str(tmp_path / "set"), "train", "val").splitlines()[-1])
    for split in ("train", "val"):
        same(found[split], tmp_path / "set" / split)
    assert verify_folder(tmp_path / "set", decode="none", workers=1).problems == []  # its own files disturb nobody


def test_splits_of_framestream_shard(energon: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b", "c"):
        make_video(tmp_path / "videos" / f"{name}.mp4", num_frames=48, size=(64, 48), gop=12)
    options = ShardOptions(samples_per_shard=4, cutting=Cutting(clip_seconds=0.5, val_tail=0.25))
    report = build_shards([str(tmp_path / "videos")], tmp_path / "out", options, workers=1)
    assert report.rejects == []
    counts = prepare(energon, tmp_path / "out", "train", "val")
    assert sum(counts.values()) == report.clips["written"]
    assert len(counts) == sum(split["shards"] for split in report.splits.values())
    found = json.loads(run(energon, READ, str(tmp_path / "out"), "train", "val").splitlines()[-1])
    for split in ("train", "val"):
        same(found[split], tmp_path / "out" / split)
