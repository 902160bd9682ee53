"""What `framestream bench` measures of the model's basis: building block masks, and attention under frame masks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from framestream.model.attention import frame_attention
from framestream.pipeline.block_mask import build_block_mask
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from .bench_rows import Row, interleaved


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


def _candidates(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: FrameMask,
    step: Callable[[Callable[[], torch.Tensor]], None],
    device: str,
) -> dict[str, Callable[[], None]]:
    names = ["dense", "ranges", *(["flex"] if device == "cuda" else [])]
    runs: dict[str, Callable[[], None]] = {
        "unmasked": lambda: step(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    }
    for name in names:
        runs[name] = lambda name=name: step(lambda: frame_attention(q, k, v, mask, name))  # type: ignore[misc]
    return runs
