"""What `framestream bench loader` measures: clips per second of whole loaders, with worker processes and all.

Each candidate's workers are started once and stay; an epoch is as many clips as keep them busy for some seconds, and
is timed from asking for the first batch to having the last. Candidates take turns, so only one works at a time.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from framestream.pipeline.errors import ConfigError, FramestreamError

from .bench_baselines import BATCH, SAMPLING, SNAPPED, Epochs, Ours, WebDatasetDecord
from .bench_clips import Scene, make_scene, videos_in
from .bench_frames import TOLERANCE
from .bench_picture import draw_rates
from .bench_rows import Row, ratio, rounds
from .bench_table import print_ratios, print_table, reasons
from .console import Advance, progress_bar
from .shard_job import PLAN_VERSION
from .shard_options import Encoding, ShardOptions
from .shard_run import build_shards

CONVERTED, CONVERTED_SNAP = "framestream, converted", "framestream, converted, slow_snap"
AS_IT_IS, AS_IT_IS_SNAP = "framestream, as it is", "framestream, as it is, slow_snap"
WANTED, EVERYTHING = "WebDataset + Decord, wanted", "WebDataset + Decord, everything"
NAMES = (CONVERTED_SNAP, CONVERTED, AS_IT_IS_SNAP, AS_IT_IS, WANTED, EVERYTHING)
ENCODING = Encoding(short_side=256, gop=16)

SECONDS, GOPS, HEIGHTS = (10, 60), (250,), (360,)
EPOCH_S = 2.5  # an epoch of a candidate takes about so long, or two batches per worker
MOST_VIDEOS = 16  # of a folder of the user's
_DISTINCT = 4  # generated clips in a set
_BUDGET_S = 25.0  # for about so long the epochs of one candidate are repeated

_RATIOS = {
    "converted / everything": (EVERYTHING, CONVERTED),
    "as it is / everything": (EVERYTHING, AS_IT_IS),
    "wanted / everything": (EVERYTHING, WANTED),
    "slow_snap, converted": (CONVERTED, CONVERTED_SNAP),
    "slow_snap, as it is": (AS_IT_IS, AS_IT_IS_SNAP),
}
_OUTSIDE = {"outside decoding, converted": CONVERTED, "outside decoding, as it is": AS_IT_IS}


@dataclass
class LoaderRow(Row):
    """A row of `bench loader`: milliseconds are per clip; `stages` has ours' milliseconds per clip by stage."""

    set_name: str = ""
    workers: int = 0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)


def bench_throughput(
    folder: Path,
    repeats: int,
    videos: str | None,
    seconds: Sequence[int],
    gops: Sequence[int],
    heights: Sequence[int],
    short_side: int,
    workers: Sequence[int],
) -> dict[str, Any]:
    """Measure, print, draw; what goes into the JSON. Arguments as of `framestream bench`, empty ones by default."""
    sets: dict[str, list[Path | Scene]] = {}
    if videos:
        sets[Path(videos).name or videos] = [*videos_in(videos)[:MOST_VIDEOS]]
    else:
        for scene in (Scene(s, g, h) for s in seconds or SECONDS for h in heights or HEIGHTS for g in gops or GOPS):
            sets[scene.name] = [Scene(scene.seconds, scene.gop, scene.height, seed) for seed in range(_DISTINCT)]
    counts = sorted(set(workers))
    rows: list[LoaderRow] = []
    skipped: dict[str, str] = {}
    runs_per_set = (repeats + 1) * len(counts) * len(NAMES)
    with progress_bar("loader", len(sets) * runs_per_set) as advance:
        for number, (name, files) in enumerate(sets.items()):
            watch = _Watch(advance, number * runs_per_set, name)
            as_it_is, converted = _shards(folder / "clips", files, watch, skipped)
            rows += _rows(name, as_it_is, converted, short_side, counts, repeats, watch)
        advance(len(sets) * runs_per_set, "")
    _print(rows)
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    _draw(rows, short_side, counts, folder / "loader.png")
    return {"short_side": short_side, "rows": [vars(row) for row in rows], "skipped": skipped}


def _draw(rows: Sequence[LoaderRow], short_side: int, counts: Sequence[int], path: Path) -> None:
    rates: dict[str, dict[str, dict[int, float]]] = {}
    labels: dict[str, dict[str, str]] = {}
    for row in rows:  # those of the most workers come last, and theirs are the labels
        for candidate, ms in row.ms.items():
            rates.setdefault(row.set_name, {}).setdefault(candidate, {})[row.workers] = 1e3 / ms
            times = None if {candidate, EVERYTHING} & row.notes.keys() else ratio(row.times, EVERYTHING, candidate)
            label = f"{1e3 / ms:,.1f}/s" + (f"  =  {times:.1f} x" if times and candidate != EVERYTHING else "")
            labels.setdefault(row.set_name, {})[candidate] = label
    title = f"16 frames of {short_side} x {short_side} pixels from each clip, {_workers(counts[-1])}"
    if len(counts) > 1:
        title += f" (pale: {', '.join(map(str, counts[:-1]))})"
    draw_rates(rates, labels, title, path)


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"


class _Watch:
    """Says on the progress bar what is being measured."""

    def __init__(self, advance: Advance, done: int, name: str) -> None:
        self._advance, self._done, self._name = advance, done, name

    def say(self, what: str) -> None:
        self._advance(self._done, f"{self._name}: {what}")

    def run(self, what: str) -> None:
        self.say(what)
        self._done += 1


def _shards(folder: Path, files: Sequence[Path | Scene], watch: _Watch, skipped: dict[str, str]) -> tuple[Path, Path]:
    """Folders with the shards of a set of videos: as they are, and converted. Made where they are not there yet."""
    watch.say("making the clips")
    inputs = [str(make_scene(file, folder) if isinstance(file, Scene) else file) for file in files]
    name = hashlib.sha256("\n".join([str(PLAN_VERSION), *inputs]).encode()).hexdigest()[:12]
    made = []
    for kind, options in {
        "as-it-is": ShardOptions(samples_per_shard=1, transcode="never"),
        "converted": ShardOptions(samples_per_shard=1, transcode="always", encoding=ENCODING),
    }.items():
        target = folder / f"shards-{name}" / kind

        def progress(step: str, done: int, total: int | None, rejects: int, kind: str = kind) -> None:
            watch.say(f"shards {kind}, {step} {done}" + (f" of {total}" if total else ""))

        try:
            report = build_shards(inputs, target, options, progress=progress)
        except ConfigError:  # the videos, or the encoder, are not those of the last time
            report = build_shards(inputs, target, options, progress=progress, overwrite=True)
        if not report.clips["written"]:
            reason = report.rejects[0]["reason"] if report.rejects else "there is nothing in them"
            raise ConfigError(f"None of the {len(inputs)} videos could become a shard ({reason}).")
        skipped.update({str(reject["source"]): str(reject["reason"]) for reject in report.rejects})
        made.append(target)
    return made[0], made[1]


def _rows(
    name: str, as_it_is: Path, converted: Path, size: int, counts: Sequence[int], repeats: int, watch: _Watch
) -> list[LoaderRow]:
    clips_in_set = len(list(as_it_is.glob("*.tar")))
    reference: dict[str, torch.Tensor] = {}
    loaders: dict[tuple[str, int], _Timed] = {}
    notes: dict[str, str] = {}
    try:
        for candidate, make in _candidates(as_it_is, converted, size).items():
            for workers in counts:
                watch.run(f"{candidate}, {_workers(workers)}")
                try:
                    timed = _Timed(make, workers, clips_in_set)
                except FramestreamError:
                    raise
                except Exception as err:  # whatever somebody else's loader raises is its result on this set
                    line = (str(err).strip().splitlines() or ["no reason given"])[-1]
                    notes[candidate] = f"{type(err).__name__}: {line[:200]}"
                    break
                loaders[candidate, workers] = timed
                if candidate == AS_IT_IS:
                    reference = timed.frames
                elif candidate in (WANTED, EVERYTHING, CONVERTED) and (wrong := _compared(reference, timed.frames)):
                    notes[candidate] = wrong
        names = {f"{candidate}, {_workers(workers)}": (candidate, workers) for candidate, workers in loaders}
        times = rounds(
            {label: loaders[key].epoch for label, key in names.items()},
            repeats,
            seconds={label: loaders[key].seconds for label, key in names.items()},
            budget_s=_BUDGET_S,
            slow=names,
            watch=lambda label, number: watch.run(label),
        )
        stages = {key: timed.loader.stages() for key, timed in loaders.items()}
    finally:
        for timed in loaders.values():
            timed.loader.close()
    rows: list[LoaderRow] = []
    for workers in counts:
        per_clip = {c: times[label] for label, (c, count) in names.items() if count == workers}
        row = LoaderRow(
            f"{name}, {_workers(workers)}",
            {c: statistics.median(per_clip[c]) for c in NAMES if c in per_clip},
            notes=notes,
            times=per_clip,
            set_name=name,
            workers=workers,
            stages={c: found for (c, count), found in stages.items() if count == workers and found},
        )
        _add_facts(row, rows[0] if rows else None)
        rows.append(row)
    return rows


def _candidates(as_it_is: Path, converted: Path, size: int) -> dict[str, Callable[[int, int], Epochs]]:
    """Candidate -> (workers, clips of an epoch) -> loader. The one that others are compared with comes first."""
    return {
        AS_IT_IS: lambda workers, clips: Ours(as_it_is, size, workers, clips, SAMPLING),
        AS_IT_IS_SNAP: lambda workers, clips: Ours(as_it_is, size, workers, clips, SNAPPED),
        CONVERTED: lambda workers, clips: Ours(converted, size, workers, clips, SAMPLING),
        CONVERTED_SNAP: lambda workers, clips: Ours(converted, size, workers, clips, SNAPPED),
        WANTED: lambda workers, clips: WebDatasetDecord(as_it_is, size, workers, clips, "wanted"),
        EVERYTHING: lambda workers, clips: WebDatasetDecord(as_it_is, size, workers, clips, "everything"),
    }


class _Timed:
    """A loader with epochs of a sensible length, warm. `frames` has what came of each clip, by key."""

    def __init__(self, make: Callable[[int, int], Epochs], workers: int, clips_in_set: int) -> None:
        step = math.lcm(clips_in_set, BATCH * workers)  # every clip equally often, every worker as much
        self.clips = step * math.ceil(2 * BATCH * workers / step)
        self.frames: dict[str, torch.Tensor] = {}
        self.loader = make(workers, self.clips)
        try:
            self.epoch()  # starts the workers, too
            if self.seconds < 4 * EPOCH_S:
                self.epoch()
            more = step * round(self.clips / step * EPOCH_S / self.seconds)
            if more > self.clips:
                self.loader.close()
                self.clips = more
                self.loader = make(workers, more)
                self.epoch()
        except BaseException:
            self.loader.close()
            raise

    def epoch(self) -> float:
        """Run one; milliseconds per clip."""
        started, clips = time.perf_counter(), 0
        for keys, frames in self.loader.batches():
            clips += len(keys)
            for key, clip in zip(keys, frames, strict=True):
                if key not in self.frames:
                    self.frames[key] = clip.clone()
        self.seconds = time.perf_counter() - started
        return self.seconds * 1e3 / clips


def _compared(reference: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """ "" where the frames of clips that both have look alike, or there are none; else what is wrong."""
    for key in reference.keys() & found.keys():
        apart = (reference[key].short() - found[key].short()).abs().float().mean((1, 2, 3))
        if (apart > TOLERANCE).any():
            return f"wrong frames: {int((apart > TOLERANCE).sum())} of {len(apart)} in {key}"
    return ""


def _add_facts(row: LoaderRow, fewest: LoaderRow | None) -> None:
    for name, (one, other) in _RATIOS.items():
        value = None if {one, other} & row.notes.keys() else ratio(row.times, one, other)
        if value is not None:
            row.facts[name] = value
    for name, candidate in _OUTSIDE.items():
        if stages := row.stages.get(candidate):
            row.facts[name] = 1 - stages["decode"] / sum(stages.values())
    if fewest is not None:
        for candidate, short in ((CONVERTED, "converted"), (AS_IT_IS, "as it is")):
            both = {"few": fewest.times.get(candidate, []), "many": row.times.get(candidate, [])}
            if (value := ratio(both, "few", "many")) is not None:
                row.facts[f"{row.workers} / {fewest.workers} workers, {short}"] = value


def _print(rows: Sequence[LoaderRow]) -> None:
    rates = {
        row.case: {name: f"{1e3 / ms:,.1f}" + (" (wrong)" if name in row.notes else "") for name, ms in row.ms.items()}
        for row in rows
    }
    there = [name for name in NAMES if any(name in row.ms for row in rows)]
    print_table("loader: clips per second", "", rates, there)
    print_ratios("ratios, medians over rounds", rows, percent=list(_OUTSIDE))
    stages = {
        f"{row.case}: {name}": {stage: f"{ms:.2f}" for stage, ms in found.items()}
        for row in rows
        for name, found in row.stages.items()
    }
    print_table("framestream: milliseconds per clip by stage", "", stages, list(next(iter(stages.values()), {})))
    print("read includes checking the bytes and planning. Outside decoding: all stages but decode, over all stages.")
    for line in reasons(rows):
        print(line)
