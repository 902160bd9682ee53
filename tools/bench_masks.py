"""What `framestream bench masks` measures: a block mask from a frame matrix, against torch's, for an equal result."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable

from framestream.pipeline.block_mask import build_block_mask
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, make_mask
from framestream.pipeline.sampling import FastSlowSampling

from .bench_rows import Row, computed
from .peak_memory import peak_bytes

CLIPS = 8


def masks(tokens: int, repeats: int, device: str) -> list[Row]:
    """Time-causal, 8 slow and 8 fast frames: time and peak memory of one mask, and of a batch whose masks differ."""
    from torch.nn.attention.flex_attention import create_block_mask

    each = [
        make_mask("time_causal", FrameLayout.from_plan(FastSlowSampling(8, 8).plan(length), patches=tokens // 16))
        for length in range(9, 9 + 4 * CLIPS, 4)
    ]
    mask, batch = each[-1], FrameMask.stack(each)
    rule, n = build_block_mask(mask, device).mask_mod, mask.num_tokens
    theirs, ours = "create_block_mask", "FrameMask.block_mask"
    runs = {
        theirs: lambda: create_block_mask(rule, 1, 1, n, n, device=device),
        ours: lambda: build_block_mask(mask, device),
        f"{CLIPS} masks": lambda: [build_block_mask(one, device) for one in each],
        f"batch of {CLIPS}": lambda: build_block_mask(batch, device),
    }
    memory = {name: _peak(runs[name], device) for name in (theirs, ours)}
    row = computed(f"time_causal, N={n}", runs, repeats, device)
    row.facts = {
        "times faster": row.over(theirs, ours),
        "times less memory": memory[theirs] / memory[ours],
        f"batch / {CLIPS} masks": row.over(f"batch of {CLIPS}", f"{CLIPS} masks"),
        "patterns": float(len(batch.patterns)),
        "KB to the trainer": len(pickle.dumps(batch)) / 1024,
    }
    return [row]


def _peak(work: Callable[[], object], device: str) -> int:
    """Bytes at the worst moment, of tensors and of arrays."""
    tensors = peak_bytes(work, device)
    tracemalloc.start()
    try:
        work()
        return tensors + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
