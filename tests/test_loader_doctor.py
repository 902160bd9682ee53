"""`framestream doctor --loader`: what limits a loader, found by running it, and what it says about made-up ones."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import framestream.tools.train
from framestream.tools.cli import main
from framestream.tools.config import load_config
from framestream.tools.loader_advice import Examination, advice, limit_of
from framestream.tools.loader_doctor import examine

from loader_setup import write_shards
from synthetic_shards import make_shards


def seen(read: float = 1, decode: float = 1, transform: float = 1, transfer: float = 1, **facts: Any) -> Examination:
    ms = {"read": read, "decode": decode, "transform": transform, "transfer": transfer}
    return Examination(samples=100, seconds=2.0, ms=ms, **{"workers": 2, "cores": 2, **facts})


@pytest.mark.parametrize(
    ("case", "limit", "said"),
    [
        (seen(decode=40, gop=250), "decode", "key frame every 250 frames.*--gop 16"),
        (seen(decode=40, could_snap=True), "decode", "slow_snap: keyframe"),
        (seen(decode=40, short_side=1080), "decode", "1080 pixels.*model sees 224.*--short-side 224"),
        (seen(decode=40, cores=8), "decode", "2 worker.* on 8 cores: try --data.workers 8"),
        (seen(decode=40, workers=8), "decode", "8 workers share 2 cores"),
        (seen(decode=40, busy_share=0.97), "decode", "All 2 cores are at work"),
        (seen(decode=40, gpu=True), "decode", "A GPU is here"),
        (seen(decode=40, epoch_batches=3), "decode", "3 batch.*too few to keep 2 worker"),
        (seen(read=40), "read", "local disk"),
        (seen(read=40, remote=True, misses=0.4), "read", "40% of the clips waited for a download.*cache_gb"),
        (seen(transform=40), "transform", "augment"),
        (seen(transfer=9, floats=True), "transfer", "floats"),
        (seen(transfer=2.1, bytes_per_clip=2e6), "transfer", "2.0 MB a clip"),
        (seen(decode=4, transfer=9, decode_on="trainer"), "transfer", "MB a clip"),
        (seen(decode=9, transfer=4, decode_on="trainer"), "decode", "stands out"),
        (seen(decode=3, transfer=2, workers=0), "decode", "no worker"),
        (seen(rejects=0.2), "transfer", "20% of the clips are rejected"),
        (seen(restarts=3), "transfer", r"3 worker\(s\) died"),
    ],
)
def test_what_limits_and_what_to_change(case: Examination, limit: str, said: str) -> None:
    # With two workers, transfer costs as much as what is made beside it in half the time.
    case.ms["transfer"] += 0.6 if limit == "transfer" else 0
    assert limit_of(case) == limit
    assert re.search(said, " ".join(advice(case)))


TINY = ["--data.image_size=32", "--data.workers=1", "--data.batch_size=2", "--model.tower.kind=pixel"]


def config_of(shards: Path, *more: str) -> Any:
    return load_config("medium", [f"--data.shards={shards}", *TINY, "--model.embedding_dim=768", *more])


class Slow:
    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        time.sleep(0.05)
        return frames


def test_a_slow_transform_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framestream.tools.train, "Augment", Slow)
    shards = make_shards(tmp_path / "s", num_samples=8, num_frames=64)
    found = examine(config_of(shards, "--data.augment=true"), 0.8)
    assert limit_of(found) == "transform"
    assert found.ms["transform"] > 45
    assert found.samples > 4
    assert (found.workers, found.epoch_batches, found.short_side) == (1, 4, 64)
    assert 6 < found.gop < 17
    assert found.bytes_per_clip > 16 * 3 * 32 * 32


def test_the_command_prints_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "s", 12, 4, bad={2, 9}, num_frames=40)
    options = [f"--data.shards={shards}", *TINY, "--data.max_reject_share=1", "--model.embedding_dim=768"]
    output = tmp_path / "run"
    assert main(["doctor", "--loader", "medium", "--seconds", "0.5", *options, f"--output={output}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("clips/s", "read", "decode", "transform", "transfer", "What limits it", "Rejected,", "1 worker(s)"):
        assert words in text
    assert not output.exists()  # looking at a loader is no run


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--seconds", "1", "--data.workers", "2"]) == 2
    assert "go with --loader" in capsys.readouterr().err
    assert main(["doctor", "--loader", "medium", "--seconds", "0"]) == 2
    assert "seconds is 0" in capsys.readouterr().err
    assert main(["doctor", "--loader", "no_such"]) == 2
    assert "There is no config file no_such" in capsys.readouterr().err
