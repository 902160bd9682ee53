"""What `framestream bench shard` measures: making shards, against the plain tools that do the bare work.

Each is timed from its start to its last byte on the disk, our processes' start and the index included; the plain tools
know nothing of what they write. Copying whole files is timed from the plan on, as the second phase of a run that it
is, and all of it, with the look through every file that makes the plan.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from framestream.pipeline.atomic import atomic_file
from framestream.pipeline.errors import ConfigError

from .bench_clips import FPS, Scene, make_scene
from .bench_picture import draw_bars
from .bench_rows import Row, ratio, rounds
from .bench_table import print_milliseconds, print_ratios, reasons
from .console import progress_bar
from .encoders import ENCODERS, options_of
from .shard_options import Cutting, Decode, Encoding, ShardOptions
from .shard_report import ShardReport
from .shard_run import run, shard_job

OURS, PLAIN = "framestream", "the plain tool"
FFMPEG, TAR = "ffmpeg", "Python's tarfile"  # which are the plain tools
NUM_CLIPS, SECONDS, HEIGHT, GOP = 4, 20, 720, 60
ENCODING = Encoding(short_side=256, gop=16)
_PART_S = 4  # a multiple of the groups of pictures
# What is encoded is given so often, what is cut so often, what is copied whole so often, under other names; so often in
# one long file.
_ENCODED, _LINKS, _COPIES, _REPEATED = 2, 8, 80, 5
_COPIED_SHARDS = 8  # of whole files, in each of which the same number is
_CASES = 6
_ENCODINGS = 3  # rounds at most of what takes longest


def bench_shard(
    folder: Path,
    repeats: int,
    *,
    num_clips: int = NUM_CLIPS,
    seconds: int = SECONDS,
    height: int = HEIGHT,
    workers: int = 2,
) -> dict[str, Any]:
    """Measure, print, draw; what goes into the JSON.

    Args:
        folder: for results; the clips are made in `clips` inside it, once, and kept.
        repeats: rounds; each candidate runs once per round.
        num_clips, seconds, height: of the videos that become shards.
        workers: processes of ours, and ffmpeg's at a time; `tarfile` is one process.
    Raises:
        ConfigError: one of the clips could not become a shard.
    """
    scenes = [Scene(seconds, GOP, height, seed) for seed in range(num_clips)]
    with progress_bar("shard", num_clips + _CASES * 2 * repeats) as advance:
        clips = []
        for number, scene in enumerate(scenes):
            advance(number, "making the clips")
            clips.append(make_scene(scene, folder / "clips"))
        bench = _Bench(clips, folder, seconds, workers)
        rows = []
        done = num_clips
        for case, candidates in bench.cases().items():
            note = {}
            if FFMPEG in case and not shutil.which("ffmpeg"):
                note[PLAIN] = "there is no ffmpeg on the PATH"
                del candidates[PLAIN]

            def watch(name: str, number: int, case: str = case) -> None:
                nonlocal done
                advance(done, f"{case}: {name}, {number} of {repeats}")
                done += 1

            turns = min(repeats, _ENCODINGS) if case.startswith("encoding") else repeats
            times = rounds(candidates, turns, seconds=dict.fromkeys(candidates, 1.0), budget_s=1.0, watch=watch)
            row = Row(case, {k: statistics.median(v) for k, v in times.items()}, notes=note, times=times)
            if (speed := ratio(times, PLAIN, OURS)) is not None:
                row.facts["speed"] = speed
            rows.append(row)
        advance(num_clips + _CASES * 2 * repeats, "")
    megabytes = sum(clip.stat().st_size for clip in clips) / 1e6
    print(
        f"{num_clips} videos of {seconds} s and {height} lines, {megabytes:.1f} MB together, {workers} processes; "
        f"encoded: {_ENCODED} times; cut into parts: {_LINKS} times; copied whole: {_COPIES} times, as short files or "
        "as long ones"
    )
    print_milliseconds("shard: median milliseconds", rows, (OURS, PLAIN))
    print_ratios("how fast framestream is: time of the plain tool over its own, median over rounds", rows)
    for line in reasons(rows):
        print(line)
    if compared := [row for row in rows if PLAIN in row.ms]:
        draw_bars(compared, folder / "shard.png", log=True)
    settings = {"num_clips": num_clips, "seconds": seconds, "height": height, "workers": workers}
    return {**settings, "megabytes": megabytes, "rows": [vars(row) for row in rows]}


class _Bench:
    """The candidates; each gives the milliseconds that it took."""

    def __init__(self, clips: Sequence[Path], folder: Path, seconds: int, workers: int) -> None:
        self.target, self.seconds, self.workers = folder / "shards", seconds, workers
        self.encoded = _linked(clips, _ENCODED, folder / "clips" / "encoded")
        self.many = _linked(clips, _LINKS, folder / "clips" / "many")
        self.short = _linked(clips, _COPIES, folder / "clips" / "short")
        long = [_repeated(clip, folder / "clips" / "long") for clip in clips]
        self.long = _linked(long, _COPIES // _REPEATED, folder / "clips" / "long")

    def cases(self) -> dict[str, dict[str, Callable[[], float]]]:
        cut = Cutting(clip_seconds=float(_PART_S))
        return {
            f"encoding, {self.workers} at a time, against {FFMPEG}": {
                OURS: lambda: self._ours(self.encoded, ShardOptions(transcode="always", encoding=ENCODING)),
                PLAIN: lambda: self._ffmpeg(self.encoded, self._encode),
            },
            **{
                f"{what}, {self.workers} at a time, against {TAR}": {OURS: ours, PLAIN: plain}
                for what, (ours, plain) in self._copies().items()
            },
            f"parts of {_PART_S} s, {self.workers} at a time, against {FFMPEG}": {
                OURS: lambda: self._ours(self.many, ShardOptions(transcode="never", cutting=cut)),
                PLAIN: lambda: self._ffmpeg(self.many, self._cut),
            },
        }

    def _copies(self) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
        short, long = partial(self._tar, self.short), partial(self._tar, self.long)
        return {
            "whole files, planned": (partial(self._copy, self.short, "first", planned=True), short),
            "long whole files, planned": (partial(self._copy, self.long, "first", planned=True), long),
            "whole files, all of the run": (partial(self._copy, self.short, "first"), short),
            "whole files, all of the run, --decode none": (partial(self._copy, self.short, "none"), short),
        }

    def _copy(self, files: Sequence[Path], decode: Decode, planned: bool = False) -> float:
        options = ShardOptions(-(-len(files) // _COPIED_SHARDS), transcode="never", decode=decode)
        return self._ours(files, options, planned=planned)

    def _timed(self, work: Callable[[], None], before: Callable[[], object] | None = None) -> float:
        """From an empty folder on, or one in which `before` has been at work; neither is timed."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir(parents=True)
        if before is not None:
            before()
        os.sync()
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    def _ours(self, clips: Sequence[Path], options: ShardOptions, *, planned: bool = False) -> float:
        """With `planned` from the plan on, which is there already."""
        parts = self.seconds // _PART_S if options.cutting.clip_seconds else 1

        def made(plan_only: bool = False) -> object:
            job = shard_job(self.target, options, workers=self.workers)
            with job.alone():
                return run(job, [str(clip) for clip in clips], plan_only=plan_only)

        def work() -> None:
            report = made()
            if not isinstance(report, ShardReport) or report.clips["written"] != parts * len(clips):
                raise ConfigError(f"Not every clip became a sample: {report}.")

        return self._timed(work, partial(made, plan_only=True) if planned else None)

    def _tar(self, clips: Sequence[Path]) -> float:
        def work() -> None:
            with open(self.target / "plain.tar", "wb") as file:
                with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:  # a link is a file of its own
                    for clip in clips:
                        tar.add(clip, clip.name)
                file.flush()
                os.fsync(file.fileno())

        return self._timed(work)

    def _ffmpeg(self, clips: Sequence[Path], command: Callable[[Path], list[str]]) -> float:
        def one(clip: Path) -> None:
            subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *command(clip)], check=True)

        def work() -> None:
            with ThreadPoolExecutor(self.workers) as pool:
                list(pool.map(one, clips))

        return self._timed(work)

    def _encode(self, clip: Path) -> list[str]:
        options = [part for k, v in options_of(ENCODING).items() for part in (f"-{k}", v)]
        return [
            *("-threads", "1", "-filter_threads", "1", "-i", str(clip), "-an"),
            *("-vf", f"scale=-2:{ENCODING.short_side}", "-pix_fmt", "yuv420p"),
            *("-c:v", ENCODERS[ENCODING.codec].name, "-threads", "1", *options, str(self.target / clip.name)),
        ]

    def _cut(self, clip: Path) -> list[str]:
        times = ",".join(str(second) for second in range(_PART_S, self.seconds, _PART_S))
        return [
            *("-i", str(clip), "-an", "-c", "copy", "-f", "segment", "-reset_timestamps", "1"),
            *("-segment_times", times, str(self.target / f"{clip.stem}-%d.mp4")),
        ]


def _linked(clips: Sequence[Path], times: int, folder: Path) -> list[Path]:
    """Every clip several times, under different names."""
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for clip in clips:
        for number in range(times):
            link = folder / f"{clip.stem}-copy{number}{clip.suffix}"
            if not link.exists():
                os.link(clip, link)
            links.append(link)
    return links


def _repeated(clip: Path, folder: Path) -> Path:
    """A clip several times behind itself in one file, not encoded anew."""
    import av

    path = folder / clip.name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as target:
        copy: Any = None
        for number in range(_REPEATED):
            with av.open(str(clip)) as source:
                stream = source.streams.video[0]
                copy = copy or target.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.pts is not None and packet.dts is not None:
                        packet.pts, packet.dts = (t + number * (stream.duration or 0) for t in (packet.pts, packet.dts))
                        packet.stream = copy
                        target.mux(packet)
    return path


assert _PART_S * FPS % GOP == 0  # parts begin at key frames
