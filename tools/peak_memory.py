"""The most memory that a piece of work holds at once beyond what was there before it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Bytes of tensors that `work` had allocated at its worst moment, what kernels use inside included.

    On the CPU it is counted allocation by allocation (torch's profiler), so that neither the memory of the process nor
    what the allocator keeps for later matters; on CUDA by the allocator itself. `work` runs once before, unmeasured.
    """
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":  # one for each allocation and, with a negative size, each release
            now += event.nbytes()
            most = max(most, now)
    return most
