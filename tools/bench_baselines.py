"""Whole loaders to compare: ours, and plain WebDataset with Decord as one would write it.

All give the same thing: uint8 `[16, 3, S, S]` per clip, 8 slow and 8 fast frames, short side resized to S and cropped
in the middle, in batches, from worker processes of which each decodes on one thread.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from framestream.pipeline.decode import fit_short_side
from framestream.pipeline.loader import build_loader
from framestream.pipeline.sampling import FastSlowSampling
from framestream.pipeline.shard_index import VIDEO_EXTENSIONS

Take = Literal["everything", "wanted"]
BATCH = 2
SAMPLING = FastSlowSampling(8, 8)
SNAPPED = FastSlowSampling(8, 8, slow_snap="keyframe")
_CHUNK = 32  # decoded frames in memory at a time


class Epochs(Protocol):
    """A loader whose epochs all have the same number of clips, and whose workers stay."""

    def batches(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """One epoch: keys, and uint8 [b, 16, 3, S, S]."""
        ...

    def stages(self) -> dict[str, float]:
        """Mean milliseconds per clip by stage so far, where the loader counts them."""
        ...

    def close(self) -> None: ...


class Ours:
    """`build_loader` on a folder of shards; an epoch is `clips` draws from it."""

    def __init__(self, folder: Path, size: int, workers: int, clips: int, sampling: FastSlowSampling) -> None:
        self._loader = build_loader(
            {"clips": {"shards": folder}},  # a mixture of one, whose epochs may be longer than the set
            sampling=sampling,
            patches_per_frame=256,
            batch_size=BATCH,
            image_size=size,
            num_workers=workers,
            epoch_samples=clips,
            drop_last=False,
            decoder="pyav",
            device="cpu",
        )

    def batches(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        for batch in self._loader:
            yield batch["keys"], batch["video_frames"]

    def stages(self) -> dict[str, float]:
        stats = self._loader.stats()
        return {name: stats[f"{name}_ms"] for name in ("read", "decode", "transform", "collate", "transfer")}

    def close(self) -> None:
        self._loader.close()


class WebDatasetDecord:
    """`wds.WebDataset(...).map(...)` in torch's `DataLoader`; an epoch is `clips` samples.

    Args:
        folder: shards of one sample each, so that they divide evenly among workers.
        take: "everything" decodes all frames and samples afterwards, "wanted" asks Decord for the wanted ones.
    """

    def __init__(
        self, folder: Path, size: int, workers: int, clips: int, take: Literal["everything", "wanted"]
    ) -> None:
        import webdataset as wds

        shards = sorted(map(str, folder.glob("*.tar")))
        # The same mixed order for everybody, so that no worker has all the long clips.
        order = np.random.default_rng(0).permutation(np.arange(clips) % len(shards))
        dataset = wds.WebDataset([shards[i] for i in order], shardshuffle=False, empty_check=False)
        self._loader: Any = torch.utils.data.DataLoader(
            dataset.map(DecordClip(size, take)), batch_size=BATCH, num_workers=workers, persistent_workers=True
        )

    def batches(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        for batch in self._loader:
            yield batch["key"], batch["frames"]

    def stages(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._loader = None  # its workers end with it


class DecordClip:
    """A WebDataset sample to a clip. The size of the video is taken from the sample's JSON, which spares Decord
    opening the file twice."""

    def __init__(self, size: int, take: Take) -> None:
        self.size, self.take = size, take

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        data = next(sample[ext] for ext in VIDEO_EXTENSIONS if ext in sample)
        meta = json.loads(sample["json"])
        width, height = fit_short_side(meta["width"], meta["height"], self.size)
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), width=width, height=height, num_threads=1)
        plan = SAMPLING.plan(len(reader))
        if self.take == "wanted":
            frames = reader.get_batch(plan.unique.tolist()).asnumpy()
        else:
            frames = self._sampled(reader, plan.unique)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        frames = frames[plan.gather, top : top + self.size, left : left + self.size]
        return {"key": sample["__key__"], "frames": torch.from_numpy(frames).permute(0, 3, 1, 2)}

    def _sampled(self, reader: Any, wanted: np.ndarray) -> np.ndarray:
        """Every frame decoded and resized; only the wanted ones kept, because all of them would not fit."""
        kept = []
        for begin in range(0, len(reader), _CHUNK):
            end = min(begin + _CHUNK, len(reader))
            frames = reader.get_batch(range(begin, end)).asnumpy()
            kept.append(frames[wanted[(wanted >= begin) & (wanted < end)] - begin])
        return np.concatenate(kept)
