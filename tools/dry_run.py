"""`framestream shard --dry-run`: what a run would find and make, how large it would be and how long it would take.

Everything is listed; a sample of the sources is probed and planned as a run would, and some of its clips are made. The
rest is arithmetic, and said to be an estimate. Nothing is written to the output.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.remote import Remote

from .cores import usable_cores
from .engines import NumberedProbe, probe_numbered
from .inputs import by_extension, list_inputs, nothing_found
from .inspect_text import size
from .making import ClipTask, encoder_version, make_clip
from .plan_place import PLAN_FILE
from .plan_store import PlanStore
from .pool import Failure, WorkerPool
from .probing import Probed, probe_task
from .progress_pace import in_words
from .shard_job import Progress, counted
from .shard_options import ShardOptions
from .units import units_of

SAMPLED_SOURCES = 48
SAMPLED_CLIPS = 24
UNCUT = "transcode auto"  # in the reason of a clip that could only be had by encoding


@dataclass(frozen=True)
class Forecast:
    """What a run would do. All but `inputs`, `sampled_sources` and `other_files` is estimated from the sample.

    Attributes:
        inputs: that were listed.
        unusable: of these, known without looking into them (no such file, a row without a path).
        named_twice: of these, the same as an earlier one: video, times, text and key.
        sampled_sources, sampled_clips: what the estimates rest on.
        rejected, filtered: inputs, `filtered` by rule. Duplicates by content cannot be seen in a sample.
        clips, shards, seconds, num_bytes: of the result.
        probing_s, making_s: wall-clock time with `workers` processes of this machine.
        reasons: why sources and clips of the sample were rejected, with how many.
        uncut: of `sampled_clips`, those that cannot be cut out without encoding them, which `transcode` never forbids.
    """

    inputs: int
    unusable: int
    named_twice: int
    other_files: dict[str, int]
    sampled_sources: int
    sampled_clips: int
    rejected: int
    filtered: dict[str, int]
    clips: int
    shards: int
    seconds: float
    num_bytes: int
    probing_s: float
    making_s: float
    workers: int
    reasons: dict[str, int]
    uncut: int = 0

    def lines(self) -> list[str]:
        """In words."""
        twice = f", {self.named_twice} named twice" if self.named_twice else ""
        lines = [f"{self.inputs} inputs: {self.unusable} cannot be used{twice}"]
        if self.other_files:
            lines.append(f"passed over: {by_extension(self.other_files)}")
        lines += [
            f"estimated from {self.sampled_sources} sources and {self.sampled_clips} clips of them:",
            f"  {self.rejected} inputs rejected, {sum(self.filtered.values())} filtered"
            + (f" ({', '.join(f'{n} by {rule}' for rule, n in self.filtered.items())})" if self.filtered else ""),
            f"  {self.clips} clips, {in_words(self.seconds)} of video, in {self.shards} shards of together "
            f"{size(self.num_bytes)}",
            f"  about {in_words(self.probing_s)} to probe and {in_words(self.making_s)} to make them "
            f"with {self.workers} processes on this machine",
        ]
        lines += [f"  rejected in the sample, {n} times: {reason}" for reason, n in self.reasons.items()]
        if self.uncut:
            lines.append(
                f"  {self.uncut} of {self.sampled_clips} sampled clips cannot be cut out without encoding: with "
                "--transcode auto they are encoded, with --transcode never they are lost"
            )
        return [*lines, "nothing was written"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(
    inputs: Sequence[str],
    options: ShardOptions,
    *,
    workers: int = 0,
    timeout_s: float = 600.0,
    remote: Remote | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Say what `build_shards` would do. Raises ConfigError where that would."""
    remote, workers = remote or Remote(), workers or usable_cores()
    progress = progress or (lambda step, done, total, rejects: None)
    if options.transcode != "never":
        encoder_version(options)
    with tempfile.TemporaryDirectory(prefix="framestream-") as folder:
        other_files: Counter[str] = Counter()
        with PlanStore.create(Path(folder, "all" + PLAN_FILE), {}) as everything:
            items = list_inputs(inputs, remote=remote, other_files=other_files)
            everything.add_inputs(counted(items, progress))
            if not everything.num_inputs:
                raise ConfigError(nothing_found(inputs, other_files))
            everything.check_splits(options)
            sample = [source for _, source in everything.sample(SAMPLED_SOURCES)]
            found, unusable, usable = everything.num_inputs, everything.num_rejected, everything.num_usable
            to_probe = everything.num_to_probe
        with PlanStore.create(Path(folder, "sample" + PLAN_FILE), {}) as plan:
            plan.add_inputs(sample)
            probed = _probe(plan, options, workers, timeout_s, remote, progress)
            plan.decide(options)
            accounts = plan.accounts([])
            made = _make(plan, options, workers, timeout_s, remote, progress)
            planned_s = sum(
                clip.end - clip.start for s in plan.shards() for clip, _ in plan.clips_of(s.split, s.number)
            )
    scale = usable / max(1, len(sample))  # inputs; of videos there are fewer, where rows take parts of them
    planned, kept = scale * accounts.clips_planned, 1 - made.lost / max(1, made.count)
    clips = planned * kept
    num_bytes = clips * made.num_bytes / max(1, made.count - made.lost)
    full = max(planned / options.samples_per_shard, num_bytes / (options.bytes_per_shard or float("inf")))
    return Forecast(
        inputs=found,
        unusable=unusable,
        named_twice=found - unusable - usable,
        other_files=dict(other_files),
        sampled_sources=len(sample),
        sampled_clips=made.count,
        rejected=unusable + round(scale * accounts.rejected),
        filtered={rule: round(scale * n) for rule, n in accounts.filtered.items()},
        clips=round(clips),
        shards=math.ceil(full),
        seconds=scale * planned_s * kept,
        num_bytes=round(num_bytes),
        probing_s=to_probe * probed.each_s() / workers,
        making_s=planned * made.each_s() / workers,
        workers=workers,
        reasons=dict((probed.reasons + made.reasons).most_common(5)),
        uncut=made.uncut,
    )


@dataclass
class _Seen:
    """What a sample gave: of `count` things, `lost` failed for `reasons`; the others took `took_s` of a process."""

    count: int = 0
    lost: int = 0
    took_s: float = 0.0
    num_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    uncut: int = 0

    def each_s(self) -> float:
        """Of a process, for one thing."""
        return self.took_s / max(1, self.count - self.lost)

    def fail(self, reason: str) -> None:
        self.lost += 1
        self.reasons[reason] += 1


def _probe(
    plan: PlanStore, options: ShardOptions, workers: int, timeout_s: float, remote: Remote, progress: Progress
) -> _Seen:
    seen = _Seen()
    probes = [NumberedProbe(number, probe_task(source, options, remote)) for number, source in plan.to_probe()]
    with WorkerPool(timed_probe, workers=workers, timeout_s=timeout_s) as pool:
        for probe, result in pool.map(probes):
            seen.count += 1
            if isinstance(result, Failure):
                plan.record(probe.number, result.reason)
                seen.fail(naming_once(result.reason, probe.task.source.source))
            else:
                plan.record(probe.number, result[1])
                seen.took_s += result[0]
            progress("probing", seen.count, len(probes), seen.lost)
    return seen


def timed_probe(probe: NumberedProbe) -> tuple[float, Probed]:
    began = time.monotonic()
    probed = probe_numbered(probe)
    return time.monotonic() - began, probed


def _make(
    plan: PlanStore, options: ShardOptions, workers: int, timeout_s: float, remote: Remote, progress: Progress
) -> _Seen:
    """Make some clips, evenly spread over the plan."""
    seen = _Seen()
    planned = sum(shard.num_clips for shard in plan.shards())
    wanted = {i * planned // SAMPLED_CLIPS for i in range(SAMPLED_CLIPS)}
    units = units_of(plan, plan.shards(), options, remote)
    tasks = [t for i, t in enumerate(chain.from_iterable(unit.tasks for unit in units)) if i in wanted]
    with WorkerPool(timed_make, workers=workers, timeout_s=timeout_s) as pool:
        for task, result in pool.map(tasks):
            seen.count += 1
            if isinstance(result, Failure):
                seen.fail(naming_once(result.reason, task.clip.source.source))
                seen.uncut += UNCUT in result.reason
            else:
                seen.took_s += result[0]
                seen.num_bytes += result[1]
            progress("making", seen.count, len(tasks), seen.lost)
    return seen


def naming_once(reason: str, name: str) -> str:
    """A reason that names its source once: those who look into a file and those who fetch it both do."""
    head, found, rest = reason.partition(name)
    return head + found + rest.replace(f"{name}: ", "").replace(f"{name} ", "")


def timed_make(task: ClipTask) -> tuple[float, int]:
    """Seconds, and bytes of the sample."""
    began = time.monotonic()
    size = 0
    for member in make_clip(task).members.values():
        size += len(member) if isinstance(member, bytes) else sum(map(len, member.blocks()))
    return time.monotonic() - began, size
