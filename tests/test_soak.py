"""Long runs: memory that stays flat, sets of 10,000 shards, resume at any depth, and a run that is killed and killed.

Each test prints its figures, and writes them as JSON where `FRAMESTREAM_RESULTS` names a folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch

from framestream.pipeline.decode import available_backends
from framestream.pipeline.probe import probe_video
from framestream.pipeline.shards import ShardSet, ShardWriter

from loader_setup import make_loader, stream, write_shards
from results import publish, table
from soak_setup import MB, growth, megabytes, own_memory, tiny_loader, tiny_set
from synthetic import damaged, video_bytes

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

TESTS = Path(__file__).parent
GROWTH = 8 * MB  # by which the last 10,000 of 20,000 samples may raise the memory of a process
SHARDS = 10_000


# -- memory over time ------------------------------------------------------------------------------------


def watch(loader: Any, samples: int, every: int, others: Callable[[], list[int]] = list) -> dict[str, list[int]]:
    """Memory of the training process, of each worker and of other processes, every so many samples."""
    rows: dict[str, list[int]] = {}
    seen = 0
    while seen < samples:
        for batch in loader:
            before, seen = seen, seen + len(batch["keys"])
            if seen // every > before // every:
                workers = sorted(worker.pid or 0 for worker in multiprocessing.active_children())
                named = {"training": os.getpid(), **{f"worker {n}": pid for n, pid in enumerate(workers)}}
                named |= {f"decoder {n}": pid for n, pid in enumerate(others())}
                for name, pid in named.items():
                    rows.setdefault(name, []).append(own_memory(pid))
            if seen >= samples:
                break
    return rows


def judge(request: pytest.FixtureRequest, name: str, rows: dict[str, list[int]], **further: Any) -> None:
    grown = {process: growth(values) for process, values in rows.items()}
    figures = {process: {"MB": megabytes(values), "growth": grown[process]} for process, values in rows.items()}
    publish(
        request.config,
        name,
        {**further, "processes": figures},
        table(
            ("process", "first MB", "half way", "last", "growth of the last half, MB"),
            [
                (process, *megabytes([values[0], values[len(values) // 2], values[-1], grown[process]]))
                for process, values in rows.items()
            ],
        )
        + "".join(f"\n{key}: {value}" for key, value in further.items()),
    )
    assert len({len(values) for values in rows.values()}) == 1  # nobody died on the way
    assert max(grown.values()) < GROWTH


@pytest.mark.parametrize(("shards", "per_shard"), [(4, 100), (2000, 10)], ids=["50 epochs", "2000 shards"])
def test_memory_is_flat_over_20000_samples(
    shards: int, per_shard: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tiny_set(tmp_path, shards, per_shard, bad=4 if shards == 4 else 1)
    loader = tiny_loader(folder, rejects_path=tmp_path / "rejects.jsonl")
    started = time.monotonic()
    rows = watch(loader, 20_000, 1_000)
    seconds = time.monotonic() - started
    stats = loader.stats()
    loader.close()
    assert len(rows) == 3
    assert 0.005 < stats["reject_share"] < 0.02
    name = f"soak_memory_{shards}_shards"
    judge(request, name, rows, samples=stats["samples"], rejects=stats["rejects"], seconds=round(seconds, 1))


TINY_CLIPS: dict[str, dict[str, Any]] = {  # what a folder of somebody's videos may hold; suffix first
    "mp4 h264": {"b_frames": 2},
    "mp4 h264 fragmented": {"fragmented": True, "b_frames": 0},
    "mkv h264 open gop": {"open_gop": True, "b_frames": 3},
    "mkv h264": {"pix_fmt": "yuv444p"},
    "ts h264": {"audio": True},
    "mp4 hevc": {"codec": "hevc", "b_frames": 3},
    "webm vp9": {"codec": "vp9"},
    "mkv av1": {"codec": "av1"},
    "mp4 mpeg4": {"codec": "mpeg4", "b_frames": 0},
    "avi mpeg4": {"codec": "mpeg4"},
}


def all_kinds(folder: Path) -> Path:
    """400 clips of ten kinds, and of each kind one that is cut in the middle and one with damaged bytes."""
    made = []
    for kind, options in TINY_CLIPS.items():
        suffix = kind.split()[0]
        data = video_bytes(f".{suffix}", num_frames=12, size=(64, 64), gop=6, **options)
        info = probe_video(data).to_json()
        broken = (data[: len(data) // 2], damaged(data, "zero", 3))
        made += [(suffix, data, info)] * 40 + [(suffix, other, info) for other in broken]
    with ShardWriter(folder, samples_per_shard=70) as writer:
        for number, (suffix, data, info) in enumerate(made):
            writer.write(f"clip-{number:04d}", data, suffix, info)
    return folder


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_memory_of_one_worker_is_flat_over_10000_clips_of_all_kinds(
    decoder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Good ones, damaged ones and, with Decord, those that it refuses; and the process in which Decord runs."""
    if available_backends()[decoder]:
        pytest.skip(available_backends()[decoder])
    # Spawned: a page that was shared by a fork counts for both from the day on which one of them writes to it.
    options = {"num_workers": 1, "multiprocessing_context": "spawn", "max_reject_share": 1.0, "batch_size": 20}
    loader = tiny_loader(all_kinds(tmp_path), decoder=decoder, **options)
    started = time.monotonic()
    rows = watch(loader, 10_000, 500, lambda: helpers_of(loader))
    seconds = time.monotonic() - started
    stats = loader.stats()
    loader.close()
    assert stats["worker_restarts"] == 0
    assert stats["rejects"] > (3_000 if decoder == "decord" else 300)
    assert len(rows) == (3 if decoder == "decord" else 2)
    judge(
        request,
        f"soak_memory_worker_{decoder}",
        rows,
        samples=stats["samples"],
        rejects=stats["rejects"],
        seconds=round(seconds, 1),
    )


def helpers_of(loader: Any) -> list[int]:
    """Processes that the workers have started."""
    workers = [worker.process.pid for pool in loader._pool for worker in pool._workers]
    return [child.pid for pid in workers for child in psutil.Process(pid).children()]


# -- very many shards ------------------------------------------------------------------------------------

OPENING = """
import json, multiprocessing, sys, time
sys.path.insert(0, {tests!r})
from soak_setup import own_memory, tiny_loader
from framestream.pipeline.shards import ShardSet

if __name__ == "__main__":
    next(iter(tiny_loader({few!r}, num_workers=0)))  # imports
    before = own_memory()
    shards = ShardSet.open({shards!r})
    opened = own_memory()
    # Spawned workers share no memory with the training process, so that what each has is seen.
    loader = tiny_loader(shards, batch_size=4, multiprocessing_context="spawn")
    batches = 0
    while batches < 500:
        for _ in loader:
            batches += 1
            if batches == 500:
                break
    workers = [own_memory(worker.pid) for worker in multiprocessing.active_children()]
    training = own_memory()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        ShardSet.open({shards!r})
        times.append(time.perf_counter() - started)
    print(json.dumps({{
        "shards": len(shards.names), "samples": shards.num_samples, "open_s": times,
        "opened": opened - before, "training": training, "workers": workers,
    }}))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 shards of 8 samples."""
    return tiny_set(tmp_path_factory.mktemp("many"), SHARDS, 8)


def test_memory_and_opening_hardly_depend_on_the_number_of_shards(
    many: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    few = tiny_set(tmp_path, 10, 8)
    figures = {}
    for folder in (few, many):
        script = tmp_path / "job.py"
        script.write_text(OPENING.format(tests=str(TESTS), few=str(few), shards=str(folder)))
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        figures[found["shards"]] = found
    small, large = figures[10], figures[SHARDS]
    rows = [
        (f["shards"], f["samples"], f"{median(f['open_s']) * 1e3:.0f}", *megabytes([f["opened"], f["training"]]))
        + (", ".join(map(str, megabytes(f["workers"]))),)
        for f in (small, large)
    ]
    apart = {
        "opened": large["opened"] - small["opened"],
        "training": large["training"] - small["training"],
        "worker": max(large["workers"]) - max(small["workers"]),
    }
    per_shard = {name: round(value / SHARDS) for name, value in apart.items()}
    header = ("shards", "samples", "opening, ms", "opened, MB", "training process after 500 batches, MB", "workers, MB")
    publish(
        request.config,
        "soak_many_shards",
        {"sets": figures, "bytes_per_shard": per_shard},
        table(header, rows) + f"\nbytes per shard: {per_shard}",
    )
    assert median(large["open_s"]) < 1.0
    assert len(large["workers"]) == len(small["workers"]) == 2
    assert max(apart.values()) < 12 * MB


class Counting:
    """A hook that counts the clips that come to it."""

    def __init__(self) -> None:
        self.clips = 0

    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.clips += 1
        return frames


def test_resume_costs_the_same_at_any_depth(many: Path, request: pytest.FixtureRequest) -> None:
    shards = ShardSet.open(many)
    decoded, seconds = {}, {}
    tiny_loader(shards, num_workers=0).close()
    for percent in (0, 50, 99):
        hook = Counting()
        loader = tiny_loader(shards, num_workers=0, transform=hook)
        consumed = shards.num_samples * percent // 1000 * 10
        state = {**loader.state_dict(), "epoch": 1, "consumed": consumed}
        loader.load_state_dict(json.loads(json.dumps(state)))
        batches = iter(loader)
        next(batches)
        decoded[percent] = hook.clips
        assert loader.state_dict()["consumed"] == consumed + 10
        loader.close()
        times = []
        for _ in range(5):
            loader = tiny_loader(shards)
            loader.load_state_dict(state)
            started = time.perf_counter()
            next(iter(loader))
            times.append(time.perf_counter() - started)
            loader.close()
        seconds[percent] = median(times)
    rows = [(f"{percent} %", decoded[percent], f"{seconds[percent] * 1e3:.0f}") for percent in decoded]
    header = ("position", "clips decoded until the first batch", "first batch with 2 workers, ms")
    publish(request.config, "soak_resume", {"decoded": decoded, "seconds": seconds}, table(header, rows))
    assert set(decoded.values()) == {10}


# -- killed again and again --------------------------------------------------------------------------------

KILLS, EPOCHS = 20, 6

VICTIM = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
from loader_setup import digest, make_loader

loader = make_loader({shards!r}, random_end=True, max_reject_share=1.0, window_shards=2, num_workers=2)
if os.path.exists({state!r}):
    with open({state!r}) as file:
        loader.load_state_dict(json.load(file))
while loader.state_dict()["epoch"] < {epochs}:
    for batch in loader:
        state = loader.state_dict()
        if state["epoch"] == {epochs}:
            break
        line = json.dumps([state["epoch"], state["consumed"], repr(digest(batch))])
        with open({log!r}, "a") as file:  # the step that is trained
            file.write(line + "\\n")
        with open({state!r} + ".new", "w") as file:  # and its checkpoint
            json.dump(state, file)
        os.replace({state!r} + ".new", {state!r})
        time.sleep(0.01)
"""


def test_a_run_that_is_killed_again_and_again_trains_on_the_unbroken_stream(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shards = write_shards(tmp_path / "shards", 60, 7, bad={5, 41})
    log, state = tmp_path / "log.jsonl", tmp_path / "state.json"
    log.touch()
    names = {"tests": str(TESTS), "shards": str(shards), "state": str(state), "log": str(log), "epochs": EPOCHS}
    script = VICTIM.format(**names)
    rng = random.Random(7)
    kills, places = 0, []
    while True:
        before = lines_of(log)
        with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as victim:
            if kills < KILLS:
                # At any moment: a few times while it starts, else some steps after it has begun to train.
                until = time.monotonic() + 120
                starting = rng.random() < 0.1
                while not starting and lines_of(log) == before and victim.poll() is None and time.monotonic() < until:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 2 if starting else 0.25))
                if victim.poll() is None:
                    os.kill(victim.pid, signal.SIGKILL)
                    kills += 1
                    places.append(lines_of(log))
            _, said = victim.communicate(timeout=240)
        if victim.returncode != -signal.SIGKILL:
            assert victim.returncode == 0, said.decode()[-2000:]
            break
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    got: dict[tuple[int, int], str] = {}
    again = 0
    for epoch, consumed, content in lines:
        again += (epoch, consumed) in got
        assert got.setdefault((epoch, consumed), content) == content  # a step done twice is the same step
    whole = make_loader(shards, random_end=True, max_reject_share=1.0, window_shards=2)
    expected = {
        (epoch, 2 * number): repr(batch) for epoch in range(EPOCHS) for number, batch in enumerate(stream(whole), 1)
    }
    figures = {"kills": kills, "steps": len(expected), "steps done twice": again, "steps at each kill": places}
    publish(request.config, "soak_kills", figures, "\n".join(f"{name}: {value}" for name, value in figures.items()))
    assert kills == KILLS
    assert again <= KILLS
    assert got == expected


def lines_of(path: Path) -> int:
    """Lines that are whole."""
    return path.read_bytes().count(b"\n")
