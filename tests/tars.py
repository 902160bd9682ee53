"""Tars as others write them, and small shards of real video in which every sample is another clip."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from framestream.pipeline.loader import ClipLoader, build_loader
from framestream.pipeline.probe import probe_video
from framestream.pipeline.raw_sample import sample_from_members
from framestream.pipeline.sampling import FastSlowSampling
from framestream.pipeline.transforms import ClipTransform

from synthetic import video_bytes

SAMPLING, IMAGE_SIZE = FastSlowSampling(num_fast=2, num_slow=2), 32
Member = tuple[str, bytes] | tarfile.TarInfo


@cache
def tiny_video(number: int) -> bytes:
    """Clip `number`, of 6 + `number` frames, so that the plan of each clip is another one."""
    return video_bytes(num_frames=6 + number, size=(64, 48), gop=6, b_frames=0)


@cache
def tiny_meta(number: int) -> dict[str, Any]:
    """What a writer knows of `tiny_video(number)`."""
    data = tiny_video(number)
    return {
        **probe_video(data, packets=True).to_json(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "text": f"clip {number}",
    }


@cache
def tiny_clip(number: int) -> dict[str, Any]:
    """The clip that a loader of `load` has to give for `tiny_video(number)`."""
    members = {"mp4": tiny_video(number), "json": json.dumps(tiny_meta(number)).encode()}
    return ClipTransform(SAMPLING, image_size=IMAGE_SIZE)(sample_from_members(str(number), "", members))


def write_tar(path: Path, members: Iterable[Member], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes) pairs, and of headers of special members."""
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """The header of a folder, link or device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def load(shards: Any, **options: Any) -> ClipLoader:
    """A loader over every sample, one by one, in stored order."""
    settings: dict[str, Any] = {
        "sampling": SAMPLING,
        "image_size": IMAGE_SIZE,
        "patches_per_frame": 4,
        "batch_size": 1,
        "shuffle": False,
        "drop_last": False,
        "max_reject_share": 1.0,
    }
    return build_loader(shards, **{**settings, **options})


def number_of(batch: dict[str, Any], clips: int) -> int:
    """Which of the first `clips` clips a batch of one holds, by its pixels. Raises ValueError where none."""
    for number in range(clips):
        expected = tiny_clip(number)
        same = torch.equal(batch["frame_index"][0], expected["frame_index"])
        if same and torch.equal(batch["video_frames"][0], expected["frames"]):
            return number
    raise ValueError(f"{batch['keys']} holds none of {clips} clips: frames {batch['frame_index'][0].tolist()}")
