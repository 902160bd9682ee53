"""Small shards of real video, quickly: a few distinct clips are encoded once per process and used again."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from framestream.pipeline.probe import probe_video
from framestream.pipeline.shards import ShardWriter

from synthetic import video_bytes

VARIANTS = (6, 12, 16)  # GOP lengths of the distinct clips


@lru_cache(maxsize=64)
def small_video(variant: int, num_frames: int, size: tuple[int, int], suffix: str) -> tuple[bytes, dict[str, Any]]:
    """(bytes, metadata) of a clip whose frame i carries the index i."""
    data = video_bytes(suffix, num_frames=num_frames, size=size, gop=VARIANTS[variant % len(VARIANTS)], b_frames=0)
    return data, probe_video(data, packets=True).to_json()


def clip_key(number: int) -> str:
    """Key of clip `number`, in every set that `make_shards` writes."""
    return f"clip-{number:04d}"


def make_shards(
    folder: str | Path,
    *,
    num_samples: int = 12,
    samples_per_shard: int = 5,
    num_frames: int = 32,
    size: tuple[int, int] = (96, 64),
    suffix: str = ".mp4",
    prefix: str = "clips",
    text: bool = True,
) -> Path:
    """Write shards with index files and `index.json` into `folder` and return it.

    Clip n has the key `clip_key(n)`, the text `clip number n` (with `text`), and `{"number": n}` under `user` in
    its metadata; its frame i carries the index i in its pixels.
    """
    with ShardWriter(folder, prefix=prefix, samples_per_shard=samples_per_shard) as writer:
        for number in range(num_samples):
            video, info = small_video(number, num_frames, size, suffix)
            caption = f"clip number {number}"
            meta = {**info, "source": f"clip-{number}{suffix}", "text": caption, "user": {"number": number}}
            writer.write(clip_key(number), video, suffix[1:], meta, caption if text else None)
    return Path(folder)


def make_project(folder: Path, code: str) -> Path:
    """A folder as the code of a page assumes it, made once: `shards/` with a few clips, and `more/` with some.

    Code that reads `shards/train` gets what `framestream shard --val-share` makes: tars in `shards/train` and
    `shards/val`, and none in `shards/` itself.
    """
    split = "shards/train" in code
    project = folder / ("split" if split else "plain")
    if not project.exists():
        make_shards(project / "more", num_samples=4, samples_per_shard=2, prefix="more")
        train = project / "shards" / ("train" if split else "")
        make_shards(train, num_samples=6, samples_per_shard=3, num_frames=32)
        if split:
            make_shards(project / "shards" / "val", num_samples=2, samples_per_shard=2, prefix="val")
    return project
