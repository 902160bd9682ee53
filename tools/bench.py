"""`framestream bench`: how long things take, side by side in one process, as medians and ratios.

Absolute times on a shared machine mean little; the ratio of two things measured in turn, round after round, means
something.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from framestream.model.attention import frame_attention
from framestream.pipeline.block_mask import build_block_mask
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from .bench_loader import MEASURES
from .bench_rows import Row, interleaved


def bench(
    name: Literal["masks", "attention", "order", "workers", "resume"],
    *,
    output: str = "runs/bench",
    repeats: int = 7,
    threads: int = 1,
    device: str = "cpu",
    tokens: list[int] = [4096, 8192],  # noqa: B006 - never changed, and shown as the default
) -> int:
    """Measure this machine: medians over repeats, candidates side by side in one process.

    masks: FrameMask.block_mask against torch's create_block_mask, for an equal result.
    attention: forward and backward under a frame mask by key ranges, against a dense boolean mask and against
    unmasked attention; `ideal` is unmasked time multiplied by the share of token pairs that may attend.
    order: how well windows of shards shuffle, against a full shuffle.
    workers: an epoch with the loader's own worker processes, against torch's DataLoader; and what checksums cost.
    resume: opening 10 and 10,000 shards, and the first batch after a resume at the start and at 99 % of an epoch.

    Prints a table and writes `NAME.json` and `NAME.png`.

    Args:
        name: what to measure: masks, attention, order, workers or resume.
        output: folder for the results.
        repeats: rounds; each candidate runs once per round.
        threads: threads of PyTorch.
        device: cpu or cuda, for masks and attention.
        tokens: sequence lengths for masks; attention takes 16 frames of tokens/16 patches.
    """
    if repeats < 1 or min(tokens, default=0) < 16:
        raise ConfigError("bench needs at least one repeat, and sequence lengths of at least 16 tokens.")
    if threads < 1:
        raise ConfigError(f"threads is {threads}, it has to be at least 1.")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, it has to be cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch finds no CUDA device here; use --device cpu.")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"output {folder} cannot be made ({err.strerror or err}); name another folder.") from err
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"output {folder} cannot be written to; name another folder.")
    torch.set_num_threads(threads)
    if name in MEASURES:
        rows = MEASURES[name](repeats)
    else:
        measure = {"masks": _masks, "attention": _attention}[name]
        rows = [row for n in tokens for row in measure(n, repeats, device)]
    _print(name, rows)
    result = {
        "bench": name,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "repeats": repeats,
        "rows": [vars(row) for row in rows],
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    _picture(name, rows, folder / f"{name}.png")
    print(f"{folder / name}.json, {folder / name}.png")
    return 0


def _masks(tokens: int, repeats: int, device: str) -> list[Row]:
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


def _attention(tokens: int, repeats: int, device: str) -> list[Row]:
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


def _print(name: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: median milliseconds", title_justify="left")
    table.add_column("case")
    for column in [*rows[0].ms, *rows[0].facts]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.case,
            *(f"{value:,.2f}" for value in row.ms.values()),
            *(f"{value:,.2f}" for value in row.facts.values()),
        )
    Console(width=max(Console().width, 120)).print(table)


def _picture(name: str, rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    candidates = list(rows[0].ms)
    height = 0.8 / len(candidates)
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows) * len(candidates)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for k, candidate in enumerate(candidates):
        places = [row + k * height for row in range(len(rows))]
        bars = axes.barh(places, [row.ms[candidate] for row in rows], height * 0.92, label=candidate)
        axes.bar_label(bars, fmt="{:,.1f}", padding=3, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], [row.case for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median")
    axes.margins(x=0.15)
    if name == "masks":
        axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(candidates), frameon=False)
    figure.savefig(path, dpi=144)
