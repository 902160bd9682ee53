"""What a training step of each row costs: time in turn, and the memory that its tensors hold at most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.evaluate import move_batch

from .bench_rows import interleaved
from .peak_memory import peak_bytes


def step_costs(
    modules: Mapping[str, tuple[AutoregressiveReconstruction, Mapping[str, Any]]], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds (median, all rows in turn) and peak megabytes of forward and backward, for each row.

    The megabytes are those of tensors made in the step, gradients included, without weights, batch and optimiser.

    Args:
        modules: a module in train mode and a batch, by row.
        repeats: rounds.
        device: where the modules are.
    """
    runs: dict[str, Callable[[], None]] = {}
    for name, (module, batch) in modules.items():
        runs[name] = _step(module.to(device).train(), move_batch(batch, device))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ targets of this batch")
        ms = interleaved(runs, repeats, device.type)
        memory = {name: peak_bytes(run, device.type) for name, run in runs.items()}
    return {name: {"ms": ms[name], "mb": memory[name] / 1e6} for name in runs}


def _step(module: AutoregressiveReconstruction, batch: Mapping[str, Any]) -> Callable[[], None]:
    def run() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        module(batch).loss.backward()

    return run
