"""What `framestream bench` measures of generation: frame by frame from a cache, against doing everything again.

Both use the same model, the same attention (`ranges`) and the same masks, and make the same frames, which is checked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.generation import generate_frames
from framestream.model.geometry import Geometry
from framestream.pipeline.layout import FrameLayout

from .bench_rows import Row, computed

FRAMES = 16  # generated from one true frame
LONG = 48  # generated to compare the cost of late frames with that of early ones
WIDTH, HEADS, LAYERS, FPS = 512, 8, 3, 30
CASES: dict[str, dict[str, Any]] = {
    "frame_causal": {"mask": "frame_causal"},
    "sliding_window 4": {"mask": "sliding_window", "window_size": 4},
}


def rollout(tokens: int, repeats: int, device: str) -> list[Row]:
    """Generating 16 frames of `tokens / 16` patches from one true frame, and the cost of a frame late and early."""
    return [_row(f"{name}, N={tokens // 16 * 16}", CASES[name], tokens // 16, repeats, device) for name in CASES]


def _row(case: str, settings: dict[str, Any], patches: int, repeats: int, device: str) -> Row:
    module, batch = _module(settings, device), _batch(patches, device)
    late: list[float] = []
    runs: dict[str, Callable[[], object]] = {
        "recomputed": lambda: recomputed(module, batch, FRAMES),
        "cached": lambda: cached(module, batch, FRAMES),
        f"cached, {LONG} frames": lambda: late.append(late_over_early(module, batch, device)),
    }
    want, got = recomputed(module, batch, FRAMES), cached(module, batch, FRAMES)
    row = computed(case, runs, repeats, device)
    facts = {
        "recomputed / cached": row.over("recomputed", "cached"),
        "late / early frame": statistics.median(late[1:]),
        "largest difference / largest value": float((want - got).abs().max() / want.abs().max()),
    }
    row.facts = facts
    return row


def cached(module: AutoregressiveReconstruction, batch: dict[str, Tensor], frames: int) -> Tensor:
    """`[B, frames, P, D]`."""
    return torch.stack([f.embeddings for f in generate_frames(module, batch, frames, frame_step=1 / FPS)], dim=1)


@torch.no_grad()
def recomputed(module: AutoregressiveReconstruction, batch: dict[str, Tensor], frames: int) -> Tensor:
    """The same by a parallel pass over all frames so far for each new one."""
    clips = module.prepare(batch)
    sequence = clips.pack()
    patches = sequence.shape[1]
    for count in range(1, frames + 1):
        layout = FrameLayout.from_arrays(range(count), patches=patches)
        now = (torch.arange(count, dtype=torch.float64, device=sequence.device) / FPS).expand(len(sequence), -1)
        geometry = Geometry.build(
            [layout.patches] * len(sequence),
            now,
            torch.ones_like(now, dtype=torch.int64),
            torch.full_like(now, 1 / FPS),
            clips.grids,
        )
        predicted, _ = module.predictor(sequence, geometry, module.plan(module.config.make_mask(layout), sequence))
        sequence = torch.cat([sequence, predicted[:, -patches:]], dim=1)
    return sequence[:, patches:].unflatten(1, (frames, patches))


def late_over_early(module: AutoregressiveReconstruction, batch: dict[str, Tensor], device: str) -> float:
    """Seconds of a frame in the last sixth of a long generation over one in the second sixth, by medians."""
    stream = generate_frames(module, batch, LONG, frame_step=1 / FPS)
    seconds = []
    for _ in range(LONG):
        start = time.perf_counter()
        next(stream)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    part = LONG // 6
    return statistics.median(seconds[-part:]) / statistics.median(seconds[part : 2 * part])


class _Projection(nn.Module):
    """A tower that costs next to nothing: each pixel is a patch, by a fixed random projection."""

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3, dim))

    def forward(self, frames: Tensor) -> Tensor:
        return frames.flatten(2).transpose(1, 2) @ self.weight


def _module(settings: dict[str, Any], device: str) -> AutoregressiveReconstruction:
    torch.manual_seed(0)
    config = {"embedding_dim": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "attention_backend": "ranges"}
    module = AutoregressiveReconstruction(_Projection(WIDTH), WIDTH, {**config, **settings})
    for head in (module.predictor.appear, module.predictor.fade):  # untrained, it would repeat the frame
        nn.init.normal_(head.weight, std=0.002)
    return module.to(device).eval()


def _batch(patches: int, device: str) -> dict[str, Tensor]:
    one = torch.zeros(1, 1, device=device)
    return {
        "video_frames": torch.rand(1, 1, 3, 1, patches, generator=torch.Generator().manual_seed(0)).to(device),
        "frame_index": one.long(),
        "frame_time": one,
        "frame_stream": one.long() + 1,
        "frame_valid": one == 0,
    }
