"""What the soak tests share: sets of very many shards, made cheaply, and the memory of processes."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from framestream.pipeline.loader import build_loader
from framestream.pipeline.probe import probe_video
from framestream.pipeline.sampling import DenseSampling
from framestream.pipeline.shards import ShardWriter

from synthetic import video_bytes

MB = 1 << 20


def tiny_set(folder: Path, shards: int, samples_per_shard: int, bad: int = 0) -> Path:
    """A folder of `shards` shards with indexes and an `index.json`.

    Few tars are written; the others are further names of the same files. Of every 10 shards, the first has `bad`
    samples that are no video, after its good ones.
    """
    data = video_bytes(num_frames=4, size=(64, 48), gop=4, b_frames=0)
    info = probe_video(data, packets=True).to_json()
    with ShardWriter(folder / "whole", samples_per_shard=samples_per_shard) as writer:
        for kind in ("bad", "good"):
            for number in range(samples_per_shard):
                broken = kind == "bad" and number >= samples_per_shard - bad
                writer.write(f"{kind}-{number:04d}", b"no video" * 99 if broken else data, "mp4", info)
    entries = {entry["name"]: entry for entry in json.loads((folder / "whole" / "index.json").read_bytes())["shards"]}
    many = folder / "many"
    many.mkdir()
    listed = []
    for number in range(shards):
        source = f"clips-{0 if number % 10 == 0 else 1:06d}"
        for suffix in (".tar", ".idx.json"):
            os.link(folder / "whole" / f"{source}{suffix}", many / f"shard-{number:06d}{suffix}")
        listed.append({**entries[f"{source}.tar"], "name": f"shard-{number:06d}.tar"})
    content = {"version": 1, "num_samples": shards * samples_per_shard, "shards": listed}
    (many / "index.json").write_text(json.dumps(content))
    return many


def tiny_loader(shards: Any, **options: Any) -> Any:
    """A loader that does as little as possible per sample: one frame of 32 pixels."""
    settings: dict[str, Any] = {
        "sampling": DenseSampling(1),
        "image_size": 32,
        "patches_per_frame": 4,
        "batch_size": 10,
        "num_workers": 2,
        "max_reject_share": 0.2,
    }
    return build_loader(shards, **{**settings, **options})


def own_memory(pid: int | None = None) -> int:
    """Bytes that a process has written and shares with nobody. Of this process, without its garbage.

    The memory of libraries is not in it: whether that is shared depends on what else runs on the machine.
    """
    if pid in (None, os.getpid()):
        gc.collect()
    return sum(part.private_dirty + part.swap for part in psutil.Process(pid).memory_maps())


def growth(samples: list[int]) -> int:
    """Bytes by which the last half of a row of samples grew: from the median of its first third to that of its last."""
    half = samples[len(samples) // 2 :]
    third = max(1, len(half) // 3)
    return int(median(half[-third:]) - median(half[:third]))


def megabytes(values: list[int]) -> list[float]:
    return [round(value / MB, 1) for value in values]
