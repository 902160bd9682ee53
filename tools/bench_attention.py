"""What `framestream bench` measures of attention under frame masks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from framestream.model.attention import frame_attention
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import RULES, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from .bench_rows import Row, computed
from .peak_memory import peak_bytes

FRAMES, HEADS, HEAD_DIM, WINDOW = 16, 8, 64, 4


def attention(tokens: int, repeats: int, device: str) -> list[Row]:
    """Every rule over 16 frames of `tokens / 16` patches: by key ranges, dense, unmasked, and on CUDA by FlexAttention.

    "Ideal" is unmasked time multiplied by the share of pairs that may attend. Ratios are medians over rounds of the
    ratio within a round; memory is the peak of one forward and backward pass, over that without a mask.
    """
    patches = tokens // FRAMES
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, FRAMES * patches, HEAD_DIM)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    dense = FrameLayout.from_plan(DenseSampling(FRAMES).plan(64), patches=patches)
    merged = FrameLayout.from_plan(FastSlowSampling(FRAMES // 2, FRAMES // 2).plan(64), patches=patches)
    ours = "flex" if device == "cuda" else "ranges"

    def step(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(attend(*inputs), inputs, grad)

    unmasked = partial(step, torch.nn.functional.scaled_dot_product_attention)
    bare = peak_bytes(unmasked, device)
    rows = []
    for rule in RULES:
        options = {"window_size": WINDOW} if rule == "sliding_window" else {}
        mask = make_mask(rule, dense if rule in ("frame_causal", "sliding_window") else merged, **options)
        runs = {name: partial(step, partial(frame_attention, mask=mask, backend=name)) for name in backends_on(device)}
        memory = {name: peak_bytes(run, device) for name, run in runs.items()}
        row = computed(f"{rule}, N={shape[2]}", {"unmasked": unmasked, **runs}, repeats, device)
        row.facts = {
            "density": mask.density,
            f"{ours} / ideal": row.over(ours, "unmasked") / mask.density,
            f"dense / {ours}": row.over("dense", ours),
            f"{ours} memory": memory[ours] / bare,
            "dense memory": memory["dense"] / bare,
        }
        rows.append(row)
    return rows


def backends_on(device: str) -> list[str]:
    """Attention backends that can train there."""
    return ["dense", "ranges", *(["flex"] if device == "cuda" else [])]
