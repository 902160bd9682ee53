"""What `framestream bench decode` measures: 16 frames of one clip, by every decoder at hand, next to the least work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import DecodeError, SampleError
from framestream.pipeline.probe import probe_video
from framestream.pipeline.sampling import FastSlowSampling

from .bench_clips import Scene, make_scene, videos_in
from .bench_decoders import (
    DECORD,
    DECORD_ALL,
    EVERYTHING,
    LIMIT,
    OURS,
    PYAV,
    PYAV_ALL,
    SNAP,
    TORCHCODEC,
    UNKNOWN,
    Task,
    candidates,
)
from .bench_frames import FrameCheck
from .bench_picture import draw_against
from .bench_rows import Row, ratio, rounds
from .bench_table import medians, print_milliseconds, print_ratios, reasons
from .console import Advance, progress_bar

SECONDS, GOPS, HEIGHTS = (2, 10, 60), (16, 250), (360, 1080)
_EVERYTHING_S = 5.0  # for about so long decode-everything is repeated on each clip
_LONG_S, _LONG_REPEATS = 4.0, 3  # clips that take us longer than this are repeated less
_SHORT_GOP = 32  # frames; up to here a clip counts as one with short distances between key frames
_SHOWN = (OURS, LIMIT, UNKNOWN, SNAP, TORCHCODEC, DECORD, DECORD_ALL, PYAV, PYAV_ALL)
_SAMPLING = FastSlowSampling(8, 8)
_SNAPPED = FastSlowSampling(8, 8, slow_snap="keyframe")

_FED, _TO_LIMIT, _TO_SNAP = "packets fed", "ours / limit", "ours / slow_snap"
_TO_LIMIT_CPU = "ours / limit, CPU time"
_RATIOS = {
    _TO_LIMIT: (OURS, LIMIT),
    "unknown file / ours": (UNKNOWN, OURS),
    f"{TORCHCODEC} / ours": (TORCHCODEC, OURS),
    f"{DECORD} / ours": (DECORD, OURS),
    f"{DECORD_ALL} / ours": (DECORD_ALL, OURS),
    f"{PYAV} / ours": (PYAV, OURS),
    f"{PYAV_ALL} / ours": (PYAV_ALL, OURS),
    _TO_SNAP: (OURS, SNAP),
}


@dataclass
class DecodeRow(Row):
    """A row of `bench decode`.

    Attributes:
        work: what ours had to do, and what there is.
        cpu: of each round, milliseconds that the processor worked for it; other programs' turns do not count.
    """

    work: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)


def bench_decode(
    folder: Path,
    repeats: int,
    videos: str | None,
    seconds: Sequence[int],
    gops: Sequence[int],
    heights: Sequence[int],
    short_side: int,
) -> dict[str, Any]:
    """Measure, print, draw; what goes into the JSON. Arguments as of `framestream bench`, empty ones by default."""
    files: list[Path | Scene] = [*videos_in(videos)] if videos else []
    if not videos:
        files += [Scene(s, gop, h) for s in seconds or SECONDS for h in heights or HEIGHTS for gop in gops or GOPS]
    rows, skipped = [], {}
    with progress_bar("decode", len(files) * (repeats + 1)) as advance:
        for number, file in enumerate(files):
            name = file.name if isinstance(file, Scene) else str(file.relative_to(str(videos)))
            watch = _watcher(advance, number * (repeats + 1), name)
            try:
                watch("making the clip", 0)
                path = make_scene(file, folder / "clips") if isinstance(file, Scene) else file
                rows.append(_row(_task(name, path, short_side), repeats, watch))
            except (SampleError, OSError) as err:
                skipped[name] = str(err)
        advance(len(files) * (repeats + 1), "")
    if rows:
        _print(rows, repeats)
        title = f"{_SAMPLING.num_frames} frames of one clip, short side {short_side}, one thread"
        draw_against(rows, _SHOWN, LIMIT, title, folder / "decode.png")
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    if not rows:
        raise DecodeError(f"None of the {len(files)} files could be decoded.")
    return {"short_side": short_side, "rows": [vars(row) for row in rows], "skipped": skipped}


def _watcher(advance: Advance, done: int, clip: str) -> Callable[[str, int], None]:
    return lambda what, number: advance(done + number, f"{clip}: {what}")


def _print(rows: list[DecodeRow], repeats: int) -> None:
    print_milliseconds("decode: median milliseconds per clip", rows, _SHOWN)
    print_ratios("ratios, medians over rounds", rows, percent=[_FED])
    for line in reasons(rows):
        print(line)
    everything = [len(row.times[name]) for row in rows for name in EVERYTHING if name in row.times]
    others = [len(row.times[OURS]) for row in rows]
    if everything and min(everything + others) < repeats:
        print(f"Runs per clip: decode-everything {_span(everything)}, the others {_span(others)}.")
    for kind, short in (("short", True), ("long", False)):
        some = [row for row in rows if (row.work["frames per key frame"] <= _SHORT_GOP) == short]
        for fact in (_TO_LIMIT, _TO_LIMIT_CPU, _TO_SNAP):
            if any(fact in row.facts for row in some):
                print(f"{fact}, {kind} distances between key frames: {medians(some, fact)}")


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _task(name: str, path: Path, short_side: int) -> Task:
    data = path.read_bytes()
    info = probe_video(data, name=name, packets=True)
    wanted = _SAMPLING.plan(info.num_frames).unique.tolist()
    snapped = _SNAPPED.plan(info.num_frames, key_frames=info.key_frames).unique.tolist()
    return Task(name, data, info, wanted, snapped, min(short_side, info.width, info.height))


def _row(task: Task, repeats: int, watch: Callable[[str, int], None]) -> DecodeRow:
    runs, notes = candidates(task)
    with open_decoder(task.data, backend="pyav", short_side=task.short_side, info=task.info, timeout_s=600.0) as exact:
        check = FrameCheck(exact.frames_at, task.info.num_frames, task.wanted)
        work = _work(task)
    seconds: dict[str, float] = {}
    for name, run in list(runs.items()):  # a first run each, which warms up and is looked at
        watch(name, 0)
        started = time.perf_counter()
        try:
            result = run()
        except Exception as err:  # whatever somebody else's decoder raises is its result on this clip
            notes[name] = f"{type(err).__name__}: {(str(err).strip().splitlines() or ['no reason given'])[-1][:200]}"
            del runs[name]
            continue
        seconds[name] = time.perf_counter() - started
        if name != SNAP and (wrong := check.verdict(result)):
            notes[name] = wrong
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    timed = {name: _timed(run, cpu[name]) for name, run in runs.items()}
    many = repeats if seconds.get(OURS, 0.0) < _LONG_S else min(repeats, _LONG_REPEATS)
    times = rounds(timed, many, seconds=seconds, budget_s=_EVERYTHING_S, slow=EVERYTHING, watch=watch)
    facts = {_FED: work["packets fed"] / work["packets"]}
    for name, (one, other) in _RATIOS.items():
        # A ratio to wrong frames would praise or blame for nothing.
        value = None if {one, other} & notes.keys() else ratio(times, one, other)
        if value is not None:
            facts[name] = value
    if LIMIT in cpu and (value := ratio(cpu, OURS, LIMIT)) is not None:
        facts[_TO_LIMIT_CPU] = value
    ms = {name: statistics.median(values) for name, values in times.items()}
    return DecodeRow(task.name, ms, facts, notes, times, work, cpu)


def _timed(run: Callable[[], Any], cpu: list[float]) -> Callable[[], float]:
    def once() -> float:
        started, worked = time.perf_counter(), time.process_time()
        run()
        cpu.append((time.process_time() - worked) * 1e3)
        return (time.perf_counter() - started) * 1e3

    return once


def _work(task: Task) -> dict[str, float]:
    with open_decoder(task.data, backend="pyav", short_side=task.short_side, info=task.info, timeout_s=600.0) as ours:
        ours.frames_at(task.wanted)
        stats: Any = ours.stats  # type: ignore[attr-defined]
    return {
        "frames wanted": len(task.wanted),
        "packets fed": stats.packets,
        "packets": task.info.num_frames if task.info.packets is None else len(task.info.packets),
        "frames per key frame": task.info.num_frames / max(1, len(task.info.key_frames)),
        "runs": stats.runs,
        "seconds of video": task.info.duration,
        "megabytes": len(task.data) / 1e6,
    }
