"""What `framestream bench scaling` measures: the formulas of `scaling` beside what a training step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from framestream.model.autoregressive_reconstruction import create_autoregressive_reconstruction_module
from framestream.model.towers import PixelTower
from framestream.pipeline.sampling import DenseSampling

from .bench_rows import Row, computed
from .drawn_batch import drawn_batch
from .peak_memory import peak_bytes
from .scaling import StepSize

Shape = Sequence[int]

#: From small to what a CPU core does in seconds.
SIZES = (
    StepSize(clips=4, frames=8, patches=16, embedding_dim=192, width=128, layers=2, heads=4),
    StepSize(clips=2, frames=16, patches=64, embedding_dim=192, width=256, states=16),
    StepSize(clips=1, frames=16, patches=256, embedding_dim=768, width=256),
    StepSize(clips=1, frames=16, patches=64, embedding_dim=768, width=768, layers=6, gradient_checkpointing=True),
)


def training_step(size: StepSize, device: str = "cpu", attention: str = "auto") -> Callable[[], None]:
    """One step of AdamW at this size on random pixels, under the mask `frame_causal`; gradients are let go at its end.

    Args:
        size: its `embedding_dim` must be `3 p^2` for a patch of `p` pixels, its `patches` a square number.
        attention: the module's `attention_backend`.
    """
    side, patch = round(size.patches**0.5), round((size.embedding_dim / 3) ** 0.5)
    torch.manual_seed(0)
    config = {
        "embedding_dim": size.embedding_dim,
        "predictor_dim": size.width,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "gradient_checkpointing": size.gradient_checkpointing,
        "attention_backend": attention,
    }
    tower = PixelTower(side * patch, patch)
    module = create_autoregressive_reconstruction_module(tower, size.context_dim, config).to(device)
    shape = (size.clips, size.frames, 3, side * patch, side * patch)
    video = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    batch = drawn_batch(video, DenseSampling(size.frames).plan(size.frames), "frame_causal", size.patches, fps=30)
    states = torch.randn(size.clips, size.states, size.context_dim, device=device) if size.states else None
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=size.product_bytes == 2):
            loss = module(batch, states).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def scaling(repeats: int, device: str, sizes: Sequence[StepSize] = SIZES) -> list[Row]:
    """For each size: formula, measurement and their ratio, for operations and peak bytes; tokens per second.

    `matmul` is a plain product of two 1024 x 1024 matrices: what the processor can do at most, near enough.
    """
    left, right = torch.randn(2, 1024, 1024, device=device)
    rows = []
    for size in sizes:
        step = training_step(size, device)
        row = computed(name_of(size), {"step": step, "matmul": lambda: left @ right}, repeats, device)
        flops, counted = size.flops().total, counted_flops(training_step(size, device, attention="ranges"))
        peak = peak_bytes(step, device)
        row.facts = {
            "GFLOP": flops / 1e9,
            "GFLOP measured": counted / 1e9,
            "GFLOP formula / measured": flops / counted,
            "peak MB": size.peak_bytes() / 2**20,
            "peak MB measured": peak / 2**20,
            "peak formula / measured": size.peak_bytes() / peak,
            "tokens/s": size.tokens / row.ms["step"] * 1e3,
            "GFLOP/s": flops / row.ms["step"] / 1e6,
            "speed / matmul": flops / (2 * 1024**3) / row.over("step", "matmul"),
        }
        rows.append(row)
    return rows


def name_of(size: StepSize) -> str:
    """The sizes in one line."""
    name = f"B={size.clips}, F={size.frames}, P={size.patches}, D={size.embedding_dim}, W={size.width}, L={size.layers}"
    return name + f", S={size.states}" * bool(size.states) + ", checkpointing" * size.gradient_checkpointing


def counted_flops(step: Callable[[], object]) -> int:
    """Operations of `step` as torch counts them."""
    # Given by us, because torch has no formula for the CPU's attention kernels; these are those of its GPU kernels.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(display=False, custom_mapping={kernel: _forward, backward: _backward}) as counter:
        step()
    return counter.get_total_flops()


def _forward(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)
