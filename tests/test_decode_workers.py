"""Decoding inside worker processes, forked and spawned: right, in one thread each, and at the cost of one sample."""

from __future__ import annotations

import faulthandler
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import psutil
import pytest
import torch

from framestream.pipeline.deaths import Coroner
from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.isolation import helper
from framestream.pipeline.workers import WorkerPool

from decode_helpers import DecodeInWorker
from loader_setup import make_loader, stream
from synthetic import read_indices, video_bytes

LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


def usable(backend: str) -> str:
    if backend != "auto" and available_backends()[backend]:
        pytest.skip(available_backends()[backend])
    return backend


@pytest.mark.parametrize(
    ("backend", "start"),
    [
        ("pyav", "fork"),
        ("pyav", "spawn"),
        ("decord", "fork"),
        ("decord", "spawn"),
        ("torchcodec", "fork"),
        ("torchcodec", "spawn"),
        ("auto", "fork"),
    ],
)
def test_workers_decode(clip: bytes, backend: str, start: str) -> None:
    own = "pyav" if usable(backend) == "auto" else backend
    with open_decoder(clip, backend=own) as decoder:
        decoder.frames_at([3])  # a reader that was used before the workers start must not harm them
        loader = torch.utils.data.DataLoader(
            DecodeInWorker(clip, backend, 12), batch_size=2, num_workers=2, multiprocessing_context=start
        )
        assert [item for batch in loader for item in batch] == ["ok"] * 12
        assert decoder.frames_at([3]).shape[0] == 1


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_workers_start_while_threads_of_the_training_process_decode(shards: Path, backend: str) -> None:
    """A fork in the middle of it copies whatever locks the libraries hold just then."""
    settings: dict[str, Any] = {"decoder": usable(backend)}
    expected = stream(make_loader(shards, **settings))
    for _ in range(3):
        beside = make_loader(shards, decode_on="trainer", decode_threads=3, **settings)
        loop = iter(beside)
        next(loop)
        loader = make_loader(shards, num_workers=2, **settings)
        assert stream(loader) == expected
        assert loader.stats()["worker_restarts"] == 0
        loader.close()
        assert len(list(loop)) == 5


COLLECTING: list[bool] = []  # in a forked child: whether the garbage collector was on when it began


class Collecting:
    """Work that says what the collector was and is in its process."""

    def __call__(self, number: int) -> tuple[list[bool], bool, bool]:
        return COLLECTING, gc.isenabled(), gc.get_freeze_count() > 1000

    def learn(self, fact: Any) -> None: ...

    def watched(self, watch: Any) -> None: ...


def test_a_fork_takes_nothing_apart_that_threads_of_its_parent_were_using() -> None:
    """A collector that comes by in the child, before what it has inherited is set aside, frees pictures of the parent's
    decoders, whose locks are as they were in the moment of the fork. It took one in some 50 forks to hang."""
    os.register_at_fork(after_in_child=lambda: COLLECTING.append(gc.isenabled()))
    assert gc.isenabled()
    pool = WorkerPool(Collecting(), 1, context="fork", on_death=Coroner(9.0))
    assert list(pool.run([1])) == [([False], True, True)]
    pool.close()
    assert gc.isenabled()


# -- threads -------------------------------------------------------------------------------------------------


def tasks(pid: int) -> list[str]:
    """The names of a process's threads, those of libraries among them."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has ended
            continue
    return names


@contextmanager
def watched(processes: Callable[[], list[int]]) -> Iterator[list[list[str]]]:
    """The threads of processes, looked at again and again."""
    seen: list[list[str]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for pid in processes():
                try:
                    seen.append(tasks(pid))
                except OSError:
                    continue
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@lru_cache(maxsize=1)
def at_rest() -> int:
    """Threads of a process that has imported what a worker does: libraries may start some."""
    code = "import os, av, numpy, torch, framestream.pipeline.loader; print(len(os.listdir('/proc/self/task')))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def children(parent: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(parent).children()]
    except psutil.Error:
        return []


@LINUX
def test_libavcodec_threads_would_be_seen() -> None:
    """What the tests below say is not there, when it is."""
    with av.open(io.BytesIO(video_bytes(num_frames=60))) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.thread_count = "AUTO", 3
        before = len(tasks(os.getpid()))
        frames = container.decode(stream)
        next(frames)
        names = tasks(os.getpid())
    assert len(names) == before + 3
    assert Counter(name.startswith("av:h264") for name in names)[True] == 3


@LINUX
@pytest.mark.parametrize(
    ("backend", "start"),
    [("pyav", "fork"), ("pyav", "spawn"), ("decord", "fork"), ("torchcodec", "fork"), ("torchcodec", "spawn")],
)
def test_a_worker_decodes_in_one_thread(shards: Path, backend: str, start: str) -> None:
    """Its own threads are three: the one that works, one that sends results, and one that looks after its parent."""
    options: dict[str, Any] = {"image_size": 96, "batch_size": 4, "multiprocessing_context": start}
    loader = make_loader(shards, decoder=usable(backend), num_workers=1, **options)
    list(loader)
    assert len(loader._pool[0]._workers) == 1
    worker = loader._pool[0]._workers[0].process.pid
    most = 3 if start == "fork" else at_rest() + 2  # no thread comes along with a fork
    with watched(lambda: [worker]) as seen:
        while len(seen) < 100:
            list(loader)
    timers = 2 * (backend == "decord")  # it has one for its process, and the last one may be just ending
    assert max(map(len, seen)) <= most + timers
    assert not any(name.startswith("av:") for names in seen for name in names)
    loader.close()


@LINUX
def test_decords_process_decodes_in_one_thread(clip: bytes) -> None:
    with open_decoder(clip, backend=usable("decord")) as decoder:
        decoder.frames_at([0])
        with watched(lambda: [helper().pid or 0]) as seen:
            while len(seen) < 100:
                decoder.frames_at(range(48))
    assert max(map(len, seen)) <= at_rest() + 2  # one looks after its parent, one is Decord's


# -- a decoder that hangs or dies ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize(
    "options",
    [{"num_workers": 1}, {}, {"decode_on": "trainer", "decode_threads": 3}],
    ids=["worker", "alone", "trainer"],
)
def test_decord_that_hangs_or_dies_costs_one_sample(shards: Path, options: dict[str, Any], how: str) -> None:
    """And no worker: the process that decodes for it is replaced."""
    usable("decord")
    loader = make_loader(shards, decoder="decord", timeout_s=1.0, max_reject_share=1.0, batch_size=1, **options)
    loop = iter(loader)
    batches = [next(loop)]
    owner = loader._pool[0]._workers[0].process.pid if "num_workers" in options else os.getpid()
    pid = children(owner)[0] if "num_workers" in options else helper().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # a hang; and where it is killed, a clip is under way by then
    if how == "kill":
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
    batches += loop
    assert len(batches) == 13
    for batch in batches:
        assert read_indices(batch["video_frames"][0]) == batch["frame_index"][0].tolist()
    stats = loader.stats()
    assert stats["rejects"] <= 1
    assert stats["rejects"] == 1 or how == "kill"  # it may have been between two clips
    assert stats["worker_restarts"] == 0
    loader.close()


def quiet(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    faulthandler.disable()  # its report would only fill the output
    return frames


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_a_reader_without_a_process_of_its_own_that_dies_costs_one_sample_too(shards: Path, backend: str) -> None:
    options: dict[str, Any] = {"decoder": usable(backend), "batch_size": 1, "max_reject_share": 1.0}
    loader = make_loader(shards, num_workers=1, transform=quiet, **options)
    expected = [*make_loader(shards, **options)]
    loop = iter(loader)
    batches = [next(loop)]
    os.kill(loader._pool[0]._workers[0].process.pid, signal.SIGSEGV)
    batches += loop
    stats = loader.stats()
    assert stats["worker_restarts"] == 1
    assert stats["rejects"] <= 1  # none where it was between two clips
    loader.close()
    assert len(batches) == 13
    for batch, right in zip(batches, expected, strict=True):
        if "spare_for" not in batch["meta"][0]:
            assert batch["keys"] == right["keys"]
            assert torch.equal(batch["video_frames"], right["video_frames"])
