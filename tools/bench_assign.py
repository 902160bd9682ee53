"""How long deciding takes, and how much memory, with a million inputs."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framestream.pipeline.probe import VideoInfo

from .inputs import Source
from .plan_store import PlanStore
from .shard_options import Cutting, Filters, ShardOptions

if TYPE_CHECKING:
    from .probing import Probed

CASES = {
    "whole files": Cutting(),
    "clips of 5 s": Cutting(clip_seconds=5.0),
    "clips of 5 s, tail held out": Cutting(clip_seconds=5.0, val_tail=0.2, val_gap=1.0),
}
_DUPLICATE_EVERY = 50  # inputs with the pictures of the one before
_VARIABLE_EVERY = 20  # inputs with a variable rate


def measure(num_rows: int = 1_000_000) -> dict[str, dict[str, float]]:
    """Decide a plan of `num_rows` probed inputs of 2 to 30 s, with filters and duplicates, and read its shards.

    Returns, by case: `decide_s`, `decide_cpu_s` (of which the processor worked), `read_s` (of all shards, without
    their clips), `peak_mb` (largest resident memory of the process), `plan_mb` (size of the file), `clips` and
    `shards`.
    """
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        probed, path = Path(folder) / "probed.sqlite", Path(folder) / "plan.sqlite"
        _run("make", str(probed), str(num_rows))  # not here: a process starts with the peak memory of its parent
        for case in CASES:
            shutil.copy(probed, path)
            figures[case] = json.loads(_run("decide", str(path), case))
    return figures


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "framestream.tools.bench_assign", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _make(path: Path, num_rows: int) -> None:
    with PlanStore.create(path, {}) as plan:
        plan.add_inputs(_source(number) for number in range(num_rows))
        for number, outcome in enumerate(_outcomes(num_rows)):
            plan.record(number, outcome)


def _source(number: int) -> Source:
    name = f"batch-{number // 1000:04d}/video-{number:07d}.mp4"
    text = f"a caption of video {number}"
    return Source(f"s3://bucket/{name}", name, f"video-{number:07d}", text, version=str(number))


def _outcomes(num_rows: int) -> Iterator[Probed]:
    from .probing import Probed  # brings decoders along, which deciding does without

    for number in range(num_rows):
        num_frames = 50 + number * 7919 % 700
        times = tuple(frame / 25 for frame in range(num_frames)) if number % _VARIABLE_EVERY == 0 else None
        keys = tuple(range(0, num_frames, 48))
        info = VideoInfo(num_frames, 25.0, num_frames / 25, 640, 200 + number % 300, "h264", 0, keys, times)
        content = f"{(number - (number % _DUPLICATE_EVERY == 1)) * 0x9E3779B97F4A7C15 % 2**64:016x}" * 4
        yield Probed(info, 40_000 * num_frames // 25, content, f"a caption of video {number}", ())


def _decide(path: Path, cutting: Cutting) -> dict[str, float]:
    filters = Filters(min_seconds=3.0, min_side=224)
    options = ShardOptions(cutting=cutting, filters=filters, drop_duplicates=True, bytes_per_shard=200 << 20)
    with PlanStore.open(path) as plan:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        plan.decide(options)
        decided, decided_cpu = time.perf_counter(), time.process_time()
        shards = [shard.num_clips for shard in plan.shards()]
        read = time.perf_counter()
    return {
        "decide_s": round(decided - begin, 1),
        "decide_cpu_s": round(decided_cpu - begin_cpu, 1),
        "read_s": round(read - decided, 2),
        "peak_mb": _peak_mb(),
        "plan_mb": path.stat().st_size >> 20,
        "clips": sum(shards),
        "shards": len(shards),
    }


def _peak_mb() -> int:
    with suppress(OSError):  # what the system counts for children begins with what their parent had
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def bench_assign(num_rows: int) -> dict[str, Any]:
    """Measure and print; what goes into the JSON of `framestream bench assign`."""
    from .bench_table import columns_of, print_table  # brings torch along

    figures = measure(num_rows)
    cells = {case: {name: f"{value:,g}" for name, value in row.items()} for case, row in figures.items()}
    print_table(f"assign: {num_rows:,} probed inputs", "case", cells, columns_of(cells.values()))
    return {"num_rows": num_rows, "cases": figures}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", plan, rows]:
            _make(Path(plan), int(rows))
        case ["decide", plan, name]:
            print(json.dumps(_decide(Path(plan), CASES[name])))
