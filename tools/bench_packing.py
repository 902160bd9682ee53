"""What `framestream bench packing` measures: clips of unequal length, padded and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from framestream.model.geometry import Geometry
from framestream.model.predictor import FramePredictor
from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.masks import FrameMask
from framestream.pipeline.sampling import DenseSampling

from .bench_attention import backends_on
from .bench_rows import Row, interleaved
from .drawn_batch import drawn_clip

#: Frames of the clips that are packed; the longest has `tokens`.
CLIP_FRAMES = (16, 12, 8, 5)


def packing(tokens: int, repeats: int, device: str) -> list[Row]:
    """The predictor's forward pass over clips of unequal length: padded to the longest, and all in one sequence."""
    patches = tokens // CLIP_FRAMES[0]
    clips = [_clip(frames) for frames in CLIP_FRAMES]
    predictor = FramePredictor(256, context_dim=256).to(device).eval()
    runs: dict[str, Callable[[], object]] = {}
    for name, pack_to in (("padded", None), ("packed", sum(CLIP_FRAMES) * patches)):
        batch = ClipCollator(patches_per_frame=patches, pack_to=pack_to)(clips)
        mask, time, stream = (batch[key].to(device) for key in ("frame_mask", "frame_time", "frame_stream"))
        geometry = Geometry.build([(patches,) * time.shape[1]] * len(time), time, stream, torch.zeros_like(time))
        x = torch.randn(len(time), mask.num_tokens, 256, device=device)
        for backend in backends_on(device):
            runs[f"{name} {backend}"] = lambda x=x, g=geometry, m=mask, b=backend: _forward(predictor, x, g, m, b)  # type: ignore[misc]
    ms = interleaved(runs, repeats, device)
    ours = "flex" if device == "cuda" else "ranges"
    facts = {
        "fill rate padded": sum(CLIP_FRAMES) / (len(CLIP_FRAMES) * CLIP_FRAMES[0]),
        f"padded / packed {ours}": ms[f"padded {ours}"] / ms[f"packed {ours}"],
        f"padded dense / packed {ours}": ms["padded dense"] / ms[f"packed {ours}"],
    }
    return [Row(f"clips of {', '.join(map(str, CLIP_FRAMES))} frames, longest N={tokens}", ms, facts)]


def _clip(frames: int) -> dict[str, Any]:
    plan = DenseSampling(CLIP_FRAMES[0]).plan(frames)
    return drawn_clip(torch.zeros(plan.num_frames, 3, 1, 1, dtype=torch.uint8), plan, fps=30)


@torch.no_grad()
def _forward(predictor: FramePredictor, x: torch.Tensor, geometry: Geometry, mask: FrameMask, backend: str) -> None:
    predictor.attention_backend = backend
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        predictor(x, geometry, mask)
