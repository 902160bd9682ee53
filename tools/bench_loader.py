"""What `framestream bench` measures of the loader: its order, its workers, and how it opens and resumes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.dataset import ClipDataset
from framestream.pipeline.loader import build_loader
from framestream.pipeline.order import SampleOrder
from framestream.pipeline.probe import probe_video
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling
from framestream.pipeline.shard_index import ShardIndex, index_path
from framestream.pipeline.shard_writer import ShardWriter, write_folder_index
from framestream.pipeline.shuffle_quality import shuffle_quality

from .bench_rows import Row, interleaved

_CLIPS, _BATCH = 64, 8
_WORKERS = 2


def order(repeats: int) -> list[Row]:
    """How well windows of shards mix 256 shards of 256 samples in batches of 256, and what a position costs."""
    rows = []
    positions = range(10_000, 11_000)
    for window in (1, 4, 16, 64, 256):
        shuffled = SampleOrder([256] * 256, window_shards=window)
        quality = shuffle_quality(shuffled, 256)
        ms = interleaved({"1,000 positions": partial(_walk, shuffled, positions)}, repeats, "cpu")
        facts = {
            "shards within 256": float(shuffled.shards_within(256)),
            "same shard": quality.same_shard,
            "by chance": quality.same_shard_by_chance,
            "batch worth": quality.batch_worth,
        }
        rows.append(Row(f"window of {window}", ms, facts))
    return rows


def _walk(shuffled: SampleOrder, positions: range) -> None:
    for position in positions:
        shuffled.at(0, position)


def workers(repeats: int) -> list[Row]:
    """An epoch of one and the same set: our workers, torch's DataLoader over a ClipDataset, and without checksums."""
    sampling, image_size = FastSlowSampling(num_fast=8, num_slow=8), 112
    common: dict[str, Any] = {"sampling": sampling, "image_size": image_size}
    with _temporary() as folder:
        _write_clips(folder, _CLIPS)
        ours = {
            checksums: build_loader(
                folder, patches_per_frame=49, batch_size=_BATCH, num_workers=_WORKERS, checksums=checksums, **common
            )
            for checksums in (True, False)
        }
        torchs = DataLoader(
            ClipDataset(folder, **common),
            batch_size=_BATCH,
            shuffle=True,
            num_workers=_WORKERS,
            persistent_workers=True,
            collate_fn=ClipCollator(patches_per_frame=49),
        )
        ms = interleaved(
            {
                "DataLoader": lambda: _drain(torchs),
                "framestream": lambda: _drain(ours[True]),
                "without checksums": lambda: _drain(ours[False]),
            },
            repeats,
            "cpu",
        )
        for loader in ours.values():
            loader.close()
    facts = {
        "DataLoader / framestream": ms["DataLoader"] / ms["framestream"],
        "checksums cost": ms["framestream"] / ms["without checksums"] - 1,
        "clips/s": _CLIPS / ms["framestream"] * 1e3,
    }
    return [Row(f"{_CLIPS} clips, {_WORKERS} workers", ms, facts)]


def resume(repeats: int) -> list[Row]:
    """Opening a set of few and of many shards, and the first batch after a resume near its start and its end."""
    rows = []
    with _temporary() as base:
        for count in (10, 10_000):
            folder = base / str(count)
            _write_clips(folder, 1)
            _multiply(folder, count)
            options: dict[str, Any] = {
                "sampling": DenseSampling(1), "image_size": 32, "patches_per_frame": 1, "batch_size": 1,
            }  # fmt: skip
            samples: dict[str, list[float]] = {"open": [], "first batch": [], "first batch at 99 %": []}
            for _ in range(repeats):
                for place in ("first batch", "first batch at 99 %"):
                    start = time.perf_counter()
                    loader = build_loader(folder, **options)
                    opened = time.perf_counter()
                    if place != "first batch":
                        consumed = count * 99 // 100
                        loader.load_state_dict({**loader.state_dict(), "epoch": 3, "consumed": consumed})
                    next(iter(loader))
                    samples["open"].append((opened - start) * 1e3)
                    samples[place].append((time.perf_counter() - opened) * 1e3)
            ms = {name: statistics.median(values) for name, values in samples.items()}
            facts = {"late / early": ms["first batch at 99 %"] / ms["first batch"]}
            rows.append(Row(f"{count:,} shards", ms, facts))
    return rows


@contextmanager
def _temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="framestream-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _write_clips(folder: Path, count: int) -> None:
    """Clips of 2 s, 320 x 180, H.264 with a key frame every 16 frames, in shards of 16."""
    videos = [_video(seed) for seed in range(min(count, 8))]
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for number in range(count):
            video, meta = videos[number % len(videos)]
            writer.write(f"clip-{number:05d}", video, "mp4", meta)


def _video(seed: int) -> tuple[bytes, dict[str, Any]]:
    """A moving pattern, encoded; with the metadata that `framestream shard` would write."""
    import hashlib
    import io

    import av

    generator = np.random.default_rng(seed)
    texture = generator.integers(0, 256, (360, 640, 3), dtype=np.uint8)
    texture = np.repeat(np.repeat(texture[::8, ::8], 8, 0), 8, 1)  # coarse enough to be coded as motion
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"g": "16", "keyint_min": "16", "sc_threshold": "0", "preset": "veryfast"}
        stream: Any = container.add_stream("libx264", rate=Fraction(30), options=options)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for frame in range(60):
            picture = np.ascontiguousarray(texture[frame : frame + 180, 2 * frame : 2 * frame + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = file.getvalue()
    return data, {**probe_video(data, packets=True).to_json(), "sha256": hashlib.sha256(data).hexdigest()}


def _multiply(folder: Path, count: int) -> None:
    """Make `count` shards out of one, by hard links, with their indexes."""
    (tar,) = folder.glob("*.tar")
    index = ShardIndex.from_bytes(index_path(tar).read_bytes(), str(tar))
    indexes = []
    for number in range(count):
        path = folder / f"clips-{number:06d}.tar"
        if path != tar:
            os.link(tar, path)
            named = ShardIndex(path.name, index.num_bytes, index.samples, sha256=index.sha256)
            index_path(path).write_bytes(named.to_bytes())
        indexes.append(ShardIndex(path.name, index.num_bytes, index.samples, sha256=index.sha256))
    write_folder_index(folder, indexes)


MEASURES: dict[str, Callable[[int], list[Row]]] = {"order": order, "workers": workers, "resume": resume}
