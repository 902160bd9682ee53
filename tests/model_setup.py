"""Small modules and batches for the tests of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.geometry import Geometry
from framestream.model.predictor import FramePredictor
from framestream.model.towers import PixelTower
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling, Sampling

HIDDEN = 12
SIDE, PATCH = 16, 4
PATCHES = (SIDE // PATCH) ** 2
SMALL: dict[str, Any] = {"embedding_dim": 3 * PATCH**2, "predictor_dim": 32, "num_heads": 2, "num_layers": 2}
FAST_SLOW = FastSlowSampling(num_fast=5, num_slow=4)


def awake(module: nn.Module, seed: int = 0) -> Any:
    """The module whose last layers do something, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "fade" in name or "appear" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return module


def small_module(
    tower: nn.Module | None = None, *, trained: bool = True, **config: Any
) -> AutoregressiveReconstruction:
    torch.manual_seed(0)
    module = AutoregressiveReconstruction(tower or PixelTower(SIDE, PATCH), HIDDEN, {**SMALL, **config})
    return awake(module) if trained else module


def batch_of(
    sampling: Sampling = FAST_SLOW,
    lengths: tuple[int, ...] = (24, 24),
    *,
    mask: str | None = "time_causal",
    patches: int | tuple[int, int] = PATCHES,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """A batch as the collator makes it, of random clips with the given numbers of frames."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {k: [] for k in ("video_frames", "frame_index", "frame_stream", "frame_valid")}
    masks = []
    for length in lengths:
        video = torch.randint(0, 256, (length, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        plan = sampling.plan(length)
        rows["video_frames"].append(video[torch.from_numpy(plan.frame_index)])
        rows["frame_index"].append(torch.from_numpy(plan.frame_index))
        rows["frame_stream"].append(torch.from_numpy(plan.stream))
        rows["frame_valid"].append(torch.from_numpy(plan.valid))
        if mask is not None:
            masks.append(make_mask(mask, FrameLayout.from_plan(plan, patches=patches), **options))
    batch: dict[str, Any] = {name: torch.stack(values) for name, values in rows.items()}
    batch["frame_time"] = (batch["frame_index"] / 30).float()
    if mask is not None:
        batch["frame_mask"] = FrameMask.stack(masks)
    return batch


def dense_batch(frames: int = 6, clips: int = 2, **options: Any) -> dict[str, Any]:
    return batch_of(DenseSampling(frames), (frames,) * clips, **options)


def geometry_of(layout: FrameLayout, batch: int = 1, fps: float = 30.0, start: float = 0.0) -> Geometry:
    """Where the tokens of `layout` stand at a constant frame rate, each frame predicting the next at that rate."""
    time = start + torch.tensor(layout.frame_index, dtype=torch.float64)[None] / fps
    stream = torch.tensor(layout.stream)[None].expand(batch, -1)
    step = torch.full((batch, layout.num_frames), 1 / fps)
    return Geometry.build([layout.patches] * batch, time.expand(batch, -1), stream, step)


def small_predictor(dim: int = 6, layers: int = 2, **options: Any) -> FramePredictor:
    torch.manual_seed(0)
    return awake(FramePredictor(dim, 2, layers, **{"context_dim": HIDDEN, "width": 16, **options}))
