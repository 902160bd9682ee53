"""The rows of a benchmark: candidates measured in turn, round after round, so that a slow moment hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch


@dataclass
class Row:
    """One case.

    Attributes:
        case: its name.
        ms: milliseconds of each candidate (medians).
        facts: what the ratios mean, by name.
        notes: candidates that were not measured, or whose result is wrong, with the reason.
        times: milliseconds of every round, where a benchmark keeps them.
    """

    case: str
    ms: dict[str, float]
    facts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def over(self, name: str, other: str) -> float:
        """Median over rounds of one candidate's time over another's in the same round."""
        found = ratio(self.times, name, other)
        if found is None:
            raise KeyError(f"{name} and {other} were not both measured")
        return found


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median wall-clock milliseconds of each candidate; one warm-up round, then `repeats` rounds in turn."""
    return _in_turn("", candidates, repeats, device, time.perf_counter).ms


def computed(case: str, candidates: Mapping[str, Callable[[], object]], repeats: int, device: str) -> Row:
    """A row of pure computations in this process, with the times of all rounds; one warm-up round first.

    On one CPU thread processor time counts, to which other work on the machine adds little; else wall-clock time.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    return _in_turn(case, candidates, repeats, device, clock)


def _in_turn(
    case: str,
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    clock: Callable[[], float],
) -> Row:
    def milliseconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) * 1e3

    for run in candidates.values():
        milliseconds(run)
    timed = {name: partial(milliseconds, run) for name, run in candidates.items()}
    times = rounds(timed, repeats, seconds={}, budget_s=0)
    return Row(case, {name: statistics.median(found) for name, found in times.items()}, times=times)


def rounds(
    candidates: Mapping[str, Callable[[], float]],
    repeats: int,
    *,
    seconds: Mapping[str, float],
    budget_s: float,
    slow: Collection[str] = (),
    watch: Callable[[str, int], None] = lambda name, number: None,
) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each round; each says itself how many it took.

    Every round begins with another candidate, so that none always runs in the wake of the same one. Those of `slow`
    take part in fewer rounds: in as many as fit into `budget_s` by the `seconds` that one run takes, at least one.

    Args:
        watch: called with a candidate's name and the round, from 1, before each of its runs.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    turns = {name: max(1, int(budget_s / seconds[name])) if name in slow else repeats for name in names}
    for number in range(repeats):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            if number < turns[name]:
                watch(name, number + 1)
                times[name].append(candidates[name]())
    return times


def ratio(times: Mapping[str, list[float]], name: str, other: str) -> float | None:
    """Median over rounds of one candidate's time over another's in the same round; None where one was not measured.

    Of two things measured one after the other, the slow moments of a shared machine hit both.
    """
    pairs = list(zip(times.get(name, []), times.get(other, []), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None
