"""What `framestream bench step` measures: a training step of the module, and of the usual design it replaces.

The usual design is a `torch.nn.TransformerDecoder` over patch embeddings with learned positions, the frame mask as a
dense `tgt_mask`, and the same embeddings as its memory. Without a `memory_mask` its cross-attention shows every frame
the whole clip, so the row says of both whether a frame's output depends on later frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from framestream.model.autoregressive_reconstruction import create_autoregressive_reconstruction_module
from framestream.model.towers import PixelTower
from framestream.pipeline.sampling import DenseSampling

from .bench_rows import Row, computed
from .drawn_batch import drawn_batch
from .peak_memory import peak_bytes

FRAMES, LAYERS, HEADS, PATCH = 16, 3, 8, 16


class DecoderDesign(nn.Module):
    """The usual design: `TransformerDecoder(tgt=x, memory=x, tgt_mask=…)`, post-norm, as wide as the embeddings.

    Args:
        tower: gives patch embeddings `[n, P, D]`.
        dim: D.
        tokens: N, frames times patches.
        mask: bool `[N, N]`, True = may attend.
        memory_mask: apply the mask to the memory too, which is what makes the design causal.
    """

    hidden: Tensor

    def __init__(self, tower: nn.Module, dim: int, tokens: int, mask: Tensor, *, memory_mask: bool) -> None:
        super().__init__()
        self.tower = tower
        self.positions = nn.Parameter(torch.zeros(1, tokens, dim))
        # No dropout: with it, attention would fall back to a kernel that keeps all its weights.
        layer = nn.TransformerDecoderLayer(dim, HEADS, 4 * dim, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)
        self.register_buffer("hidden", ~mask, persistent=False)  # here True = may not attend
        self.memory_mask = memory_mask

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[B, F, 3, H, W]` -> the loss, and predictions `[B, F, P, D]`."""
        with torch.no_grad():
            target = self.tower(frames.flatten(0, 1) / 255).unflatten(0, frames.shape[:2])
        x = target.flatten(1, 2) + self.positions
        out = self.decoder(x, x, tgt_mask=self.hidden, memory_mask=self.hidden if self.memory_mask else None)
        predicted = out.unflatten(1, target.shape[1:3])
        return nn.functional.mse_loss(predicted[:, :-1], target[:, 1:]), predicted


def training_step(tokens: int, repeats: int, device: str) -> list[Row]:
    """One step of AdamW on one clip of 16 frames with `tokens` patches in all; milliseconds and peak megabytes."""
    side = round((tokens // FRAMES) ** 0.5)
    tower, dim = PixelTower(side * PATCH, PATCH), 3 * PATCH**2
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, FRAMES, 3, side * PATCH, side * PATCH), dtype=torch.uint8)
    plan = DenseSampling(FRAMES).plan(FRAMES)
    batch = drawn_batch(frames.to(device), plan, "frame_causal", side**2, fps=30)
    mask = batch["frame_mask"][0]
    config = {"embedding_dim": dim, "num_layers": LAYERS, "num_heads": HEADS, "loss_weight": 1.0}
    ours = create_autoregressive_reconstruction_module(tower, 32, config).to(device)
    dense = mask.dense()

    def our_pass(video: Tensor) -> tuple[Tensor, Tensor]:
        output = ours({**batch, "video_frames": video})
        return output.loss, output.predictions

    designs: dict[str, tuple[nn.Module, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {"framestream": (ours, our_pass)}
    for name, memory_mask in (("decoder", False), ("decoder, memory_mask", True)):
        design = DecoderDesign(tower, dim, mask.num_tokens, dense, memory_mask=memory_mask).to(device)
        designs[name] = design, design
    frames = batch["video_frames"]
    steps = {name: _step(module, run, frames, device) for name, (module, run) in designs.items()}
    facts: dict[str, float] = {}
    for name, (module, run) in designs.items():
        facts[f"{name} leaks"] = float(leaking_frames(module, run, frames))
    for name, step in steps.items():
        facts[f"{name} MB"] = peak_bytes(step, device) / 2**20
    row = computed(f"{FRAMES} frames, N={mask.num_tokens}, D={dim}", steps, repeats, device)
    for name in list(steps)[1:]:
        facts[f"{name} / framestream"] = row.over(name, "framestream")
        facts[f"{name} / framestream MB"] = facts[f"{name} MB"] / facts["framestream MB"]
    row.facts = facts
    return [row]


def _step(module: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], frames: Tensor, device: str) -> Any:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, _ = run(frames)
        loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def leaking_frames(module: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], frames: Tensor) -> int:
    """How many frames before the last one have another output when the last one changes."""
    module.eval()
    other = frames.clone()
    other[:, -1] = 255 - other[:, -1]
    before, after = run(frames)[1], run(other)[1]
    module.train()
    return sum(not torch.equal(before[:, f], after[:, f]) for f in range(before.shape[1] - 1))
