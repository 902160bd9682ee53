"""The rows of a benchmark: candidates measured in turn, round after round, so that a slow moment hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Row:
    """One case: milliseconds of each candidate (medians), and what the ratios mean."""

    case: str
    ms: dict[str, float]
    facts: dict[str, float] = field(default_factory=dict)


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each candidate; one warm-up round, then `repeats` rounds in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}
