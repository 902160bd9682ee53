"""What the tests of order, loader and resume share: small shards, loaders over them, comparable streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from framestream.pipeline.loader import ClipLoader, build_loader
from framestream.pipeline.sampling import FastSlowSampling
from framestream.pipeline.shards import ShardWriter

from synthetic_shards import VARIANTS, clip_key, small_video

SAMPLING = FastSlowSampling(num_fast=4, num_slow=4)
IMAGE_SIZE = 48
FRAMES = 8  # of SAMPLING
PATCHES = 4
BAD = {2, 9}  # the samples of the fixture `damaged` that are no video


def make_loader(shards: Any, **options: Any) -> ClipLoader:
    """A loader with small settings; `options` win."""
    settings: dict[str, Any] = {
        "sampling": SAMPLING,
        "image_size": IMAGE_SIZE,
        "patches_per_frame": PATCHES,
        "batch_size": 2,
        "seed": 3,
    }
    return build_loader(shards, **{**settings, **options})


def write_shards(
    folder: Path, num_samples: int, samples_per_shard: int, bad: Iterable[int] = (), num_frames: int = 32
) -> Path:
    """Shards in which the samples of `bad` have metadata that looks right and bytes that are no video."""
    bad = set(bad)
    with ShardWriter(folder, prefix="clips", samples_per_shard=samples_per_shard) as writer:
        for number in range(num_samples):
            video, info = small_video(number % len(VARIANTS), num_frames, (96, 64), ".mp4")
            data = b"this is no video" * 64 if number in bad else video
            writer.write(clip_key(number), data, "mp4", {**info, "user": {"number": number}}, f"clip {number}")
    return folder


def digest(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Everything of a batch, comparable: pixels, plan, masks, keys, text and meta."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    hashed = {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    return (batch["keys"], batch["text"], batch["meta"], batch["frame_mask"], hashed)


def stream(loader: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """One epoch, digested."""
    return [digest(batch) for batch in loader]


def keys(loader: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The keys of one epoch's batches."""
    return [batch["keys"] for batch in loader]
