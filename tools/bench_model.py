"""What `framestream bench` measures of the model's basis: block masks, attention under frame masks, packed clips."""

from __future__ import annotations

from collections.abc import Callable

import torch

from framestream.model.attention import frame_attention
from framestream.model.geometry import Geometry
from framestream.model.predictor import FramePredictor
from framestream.pipeline.block_mask import build_block_mask
from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from .bench_rows import Row, interleaved

#: Frames of the clips that are packed; the longest has `tokens`.
CLIP_FRAMES = (16, 12, 8, 5)


def masks(tokens: int, repeats: int, device: str) -> list[Row]:
    """Building a block mask, by us and by torch."""
    from torch.nn.attention.flex_attention import create_block_mask

    layout = FrameLayout.from_plan(FastSlowSampling(8, 8).plan(64), patches=tokens // 16)
    mask = make_mask("time_causal", layout)
    rule = build_block_mask(mask, device).mask_mod
    n = mask.num_tokens
    ms = interleaved(
        {
            "create_block_mask": lambda: create_block_mask(rule, 1, 1, n, n, device=device),
            "FrameMask.block_mask": lambda: build_block_mask(mask, device),
        },
        repeats,
        device,
    )
    return [Row(f"time_causal, N={n}", ms, {"times faster": ms["create_block_mask"] / ms["FrameMask.block_mask"]})]


def attention(tokens: int, repeats: int, device: str) -> list[Row]:
    """Attention under frame masks, forward and backward."""
    shape = (1, 8, tokens // 16 * 16, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    dense = FrameLayout.from_plan(DenseSampling(16).plan(64), patches=tokens // 16)
    merged = FrameLayout.from_plan(FastSlowSampling(8, 8).plan(64), patches=tokens // 16)
    cases = {
        "frame_causal": make_mask("frame_causal", dense),
        "sliding_window 4": make_mask("sliding_window", dense, window_size=4),
        "time_causal": make_mask("time_causal", merged),
    }

    def step(attend: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(attend().sum(), (q, k, v))

    rows = []
    for name, mask in cases.items():
        ms = interleaved(_candidates(q, k, v, mask, step, device), repeats, device)
        ideal = mask.density * ms["unmasked"]
        ours = "flex" if device == "cuda" else "ranges"
        facts = {
            "density": mask.density,
            f"{ours} / ideal": ms[ours] / ideal,
            f"dense / {ours}": ms["dense"] / ms[ours],
        }
        rows.append(Row(f"{name}, N={shape[2]}", ms, facts))
    return rows


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
        for backend in _backends(device):
            runs[f"{name} {backend}"] = lambda x=x, g=geometry, m=mask, b=backend: _forward(predictor, x, g, m, b)  # type: ignore[misc]
    ms = interleaved(runs, repeats, device)
    ours = "flex" if device == "cuda" else "ranges"
    facts = {
        "fill rate padded": sum(CLIP_FRAMES) / (len(CLIP_FRAMES) * CLIP_FRAMES[0]),
        f"padded / packed {ours}": ms[f"padded {ours}"] / ms[f"packed {ours}"],
        f"padded dense / packed {ours}": ms["padded dense"] / ms[f"packed {ours}"],
    }
    return [Row(f"clips of {', '.join(map(str, CLIP_FRAMES))} frames, longest N={tokens}", ms, facts)]


def _clip(frames: int) -> dict[str, object]:
    plan = DenseSampling(CLIP_FRAMES[0]).plan(frames)
    return {
        "frames": torch.zeros(plan.num_frames, 3, 1, 1, dtype=torch.uint8),
        "frame_index": torch.from_numpy(plan.frame_index),
        "frame_time": torch.from_numpy(plan.frame_index / 30).float(),
        "frame_stream": torch.from_numpy(plan.stream),
        "frame_valid": torch.from_numpy(plan.valid),
        **{"key": str(frames), "text": "", "meta": {}},
    }


@torch.no_grad()
def _forward(predictor: FramePredictor, x: torch.Tensor, geometry: Geometry, mask: FrameMask, backend: str) -> None:
    predictor.attention_backend = backend
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        predictor(x, geometry, mask)


def _backends(device: str) -> list[str]:
    return ["dense", "ranges", *(["flex"] if device == "cuda" else [])]


def _candidates(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: FrameMask,
    step: Callable[[Callable[[], torch.Tensor]], None],
    device: str,
) -> dict[str, Callable[[], None]]:
    runs: dict[str, Callable[[], None]] = {
        "unmasked": lambda: step(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    }
    for name in _backends(device):
        runs[name] = lambda name=name: step(lambda: frame_attention(q, k, v, mask, name))  # type: ignore[misc]
    return runs
