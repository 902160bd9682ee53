"""Workers that die, hang or are killed: the stream stays what it was, and a sample that kills costs itself alone."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import framestream.pipeline.workers
from framestream.pipeline.deaths import Coroner
from framestream.pipeline.errors import FramestreamError, RejectLimitError, WorkerError
from framestream.pipeline.sampling import DenseSampling
from framestream.pipeline.shards import ShardWriter
from framestream.pipeline.shared_message import receive, send
from framestream.pipeline.watch import Place, Watch
from framestream.pipeline.workers import Death, WorkerPool, WorkerTraceback

from loader_setup import keys, make_loader, stream
from synthetic_shards import clip_key, small_video

TESTS = Path(__file__).parent
DEADLY = (4, 9)  # the clips that are too short for their hook


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 clips in 3 shards. Those of `DEADLY` have 2 frames, by which a hook can tell them."""
    folder = tmp_path_factory.mktemp("deadly")
    with ShardWriter(folder, samples_per_shard=5) as writer:
        for number in range(14):
            video, info = small_video(number, 2 if number in DEADLY else 32, (96, 64), ".mp4")
            writer.write(clip_key(number), video, "mp4", info)
    return folder


def loader_of(shards: Path, hook: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_workers": 2, "max_reject_share": 1.0, "sampling": DenseSampling(4)}
    return make_loader(shards, transform=hook, **{**settings, **options})


def crashes(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if len(frames) == 2:
        faulthandler.disable()  # its report would only fill the output
        os.kill(os.getpid(), signal.SIGSEGV)
    return frames


def leaves(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if len(frames) == 2:
        os._exit(3)
    return frames


def is_killed(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if len(frames) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return frames


def hangs(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if len(frames) == 2:
        time.sleep(1000)
    return frames


def always_killed(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return frames


@pytest.mark.parametrize(
    ("hook", "options", "said", "restarts"),
    [
        (crashes, {}, "died of it (SIGSEGV)", 2),
        (crashes, {"num_workers": 1, "batch_size": 1, "prefetch_factor": 3}, "died of it (SIGSEGV)", 2),
        (crashes, {"multiprocessing_context": "spawn", "num_workers": 1}, "died of it (SIGSEGV)", 2),
        (leaves, {}, "died of it (exit status 3)", 2),
        (is_killed, {}, "died of it (SIGKILL)", 6),  # twice it might have been somebody else's doing
        (hangs, {"timeout_s": 0.5}, "did not get done with it in 1.5 s", 2),
    ],
    ids=["crash", "crash of one worker", "crash of a spawned worker", "exit", "kill", "hang"],
)
def test_a_sample_that_ends_its_worker_is_a_reject(
    shards: Path, tmp_path: Path, hook: Any, options: dict[str, Any], said: str, restarts: int
) -> None:
    loader = loader_of(shards, hook, rejects_path=tmp_path / "rejects.jsonl", **options)
    epoch = list(loader)
    metas = [meta for batch in epoch for meta in batch["meta"]]
    assert len(metas) == 14
    deadly = {clip_key(number) for number in DEADLY}
    assert {meta["spare_for"] for meta in metas if "spare_for" in meta} == deadly
    assert not deadly & {key for batch in epoch for key in batch["keys"]}
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == deadly
    assert all(said in line["reason"] for line in lines)
    assert loader.stats()["worker_restarts"] == restarts
    second = keys(loader)  # by now everybody knows
    assert loader.stats()["worker_restarts"] == restarts
    loader.close()
    # A run that never lived through it replaces alike, whoever does the work, and so does one that resumes.
    again = loader_of(shards, crashes, num_workers=1, batch_size=loader_batch(options))
    assert keys(again) == [batch["keys"] for batch in epoch]
    assert keys(again) == second
    again.close()


def loader_batch(options: dict[str, Any]) -> int:
    return int(options.get("batch_size", 2))


@pytest.mark.slow
def test_workers_killed_from_outside_cost_nothing(shards: Path) -> None:
    expected = [stream(loader) for loader in [loader_of(shards, num_workers=0)] for _ in range(3)]
    loader = loader_of(shards)
    got: list[Any] = []
    for _ in range(3):
        rows = []
        for number, batch in enumerate(loader):
            rows.append(batch)
            if number in (0, 4):  # far enough apart that no request is hit twice
                for process in multiprocessing.active_children():
                    if process.name.startswith("framestream-worker"):
                        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        got.append(stream(rows))
    assert got == expected
    assert loader.stats()["worker_restarts"] >= 4
    assert loader.stats()["rejects"] == 0
    loader.close()


def test_workers_that_only_plan_are_replaced_too(shards: Path) -> None:
    expected = stream(loader_of(shards, num_workers=0))
    loader = loader_of(shards, decode_on="trainer", num_workers=1, batch_size=2)
    loop = iter(loader)
    first = next(loop)
    for process in multiprocessing.active_children():
        if process.name.startswith("framestream-worker"):
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    assert stream([first, *loop]) == expected
    loader.close()


def test_workers_that_get_nothing_done_end_the_run_with_a_sentence(shards: Path) -> None:
    loader = loader_of(shards, always_killed)
    with pytest.raises(WorkerError, match=r"5 worker processes in a row ended \(SIGKILL\).*memory.*resume"):
        list(loader)
    loader.close()


def test_only_samples_that_kill(shards: Path) -> None:
    loader = loader_of(shards, always_leaves, num_workers=1)
    with pytest.raises(RejectLimitError, match=r"samples in a row could not be used.*exit status 5"):
        list(loader)
    loader.close()


def always_leaves(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    os._exit(5)


def test_many_workers_killed_at_once_cost_nothing(shards: Path) -> None:
    expected = stream(loader_of(shards, num_workers=0, batch_size=1))
    loader = loader_of(shards, num_workers=6, batch_size=1)
    loop = iter(loader)
    rows = [next(loop)]
    for _ in range(2):
        for process in multiprocessing.active_children():
            if process.name.startswith("framestream-worker"):
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        rows.append(next(loop))
    assert stream([*rows, *loop]) == expected
    assert loader.stats()["rejects"] == 0
    loader.close()


def test_a_forked_child_has_workers_of_its_own(shards: Path) -> None:
    expected = keys(loader_of(shards, num_workers=0))
    loader = loader_of(shards, num_workers=1)
    loop = iter(loader)
    first = next(loop)["keys"]
    child = os.fork()
    if not child:
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "consumed": 0})
        os._exit(0 if keys(loader) == expected else 1)
    assert [first, *(batch["keys"] for batch in loop)] == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loader.close()


CLOSED_BY_SIGNAL = """
import os, signal, sys, threading
sys.path.insert(0, {tests!r})
from test_workers import hangs, loader_of

loader = loader_of({shards!r}, hangs, batch_size=1, num_workers=1)
signal.signal(signal.SIGTERM, lambda *_: loader.close())
seen = 0
for batch in loader:  # comes to the clip that never ends
    if not seen:
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    seen += 1
print(seen)
"""


def test_a_signal_handler_may_close_the_loader_in_mid_batch(shards: Path) -> None:
    script = CLOSED_BY_SIGNAL.format(tests=str(TESTS), shards=str(shards))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 14


ORPHANS = """
import multiprocessing, sys, time
sys.path.insert(0, {tests!r})
from test_workers import hangs, loader_of

loop = iter(loader_of({shards!r}, hangs, batch_size=1))
next(loop)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(1000)
"""


def test_no_worker_outlives_its_trainer(shards: Path) -> None:
    script = ORPHANS.format(tests=str(TESTS), shards=str(shards))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(1)  # let one of them come to the clip that never ends
        trainer.kill()
    until = time.monotonic() + 30
    while time.monotonic() < until and any(map(alive, pids)):
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- the pool by itself ----------------------------------------------------------------------------------


class Squares:
    """Work that can be told what to do with a number."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.watch: Watch | None = None

    def __call__(self, number: int) -> Any:
        assert self.watch is not None
        self.watch.begin(Place(0, 0, number))
        if number in self.known:
            return self.known[number]
        if number == 13:
            os._exit(1)
        if number == 14:
            raise LookupError("no square of 14")
        if number == 15:
            return lambda: None
        return torch.tensor(number) ** 2

    def learn(self, fact: tuple[int, str]) -> None:
        self.known.update([fact])

    def watched(self, watch: Watch) -> None:
        self.watch = watch


class Sleeper(Squares):
    """Work that does not come to life the first time."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def watched(self, watch: Watch) -> None:
        super().watched(watch)
        if not self.flag.exists():
            self.flag.touch()
            time.sleep(1000)


def test_a_worker_that_never_starts_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framestream.pipeline.workers, "_START_S", 1.0)
    pool = WorkerPool(Sleeper(tmp_path / "flag"), 1, on_death=Coroner(9.0))
    assert [int(result) for result in pool.run([3, 4])] == [9, 16]
    assert pool.counts.restarts == 1
    pool.close()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    def on_death(death: Death) -> Any:
        assert death.place is not None
        return death.place.sample, "unlucky"

    pool = WorkerPool(Squares(), 2, on_death=on_death)
    yield pool
    pool.close()
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("framestream-worker")]


def test_results_come_in_order_and_a_fact_reaches_everybody(pool: WorkerPool) -> None:
    results = list(pool.run([1, 2, 13, 3, 4, 13, 13, 13, 13, 5]))
    assert [int(r) if isinstance(r, torch.Tensor) else r for r in results] == [
        1, 4, "unlucky", 9, 16, "unlucky", "unlucky", "unlucky", "unlucky", 25,
    ]  # fmt: skip
    assert 1 <= pool.counts.restarts <= 3  # more than one may have it in hand


def test_errors_come_at_their_place_with_the_workers_traceback(pool: WorkerPool) -> None:
    loop = pool.run([1, 14, 2])
    assert int(next(loop)) == 1
    with pytest.raises(LookupError, match="no square of 14") as caught:
        next(loop)
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "in __call__" in str(caught.value.__cause__)
    assert [int(result) for result in pool.run([3, 4])] == [9, 16]  # results of the loop before are not taken for these
    with pytest.raises(Exception, match=r"pickle|lambda"):
        list(pool.run([15]))


def test_a_loop_that_is_left_leaves_nothing_behind(pool: WorkerPool) -> None:
    for _ in range(5):
        loop = pool.run(range(100, 1000))
        assert int(next(loop)) == 10000
        loop.close()
    assert [int(result) for result in pool.run(range(5))] == [0, 1, 4, 9, 16]


def test_a_loop_whose_end_comes_late_does_not_end_the_next_one(pool: WorkerPool) -> None:
    left = pool.run(range(100, 1000))
    assert int(next(left)) == 10000
    following = pool.run(range(20, 50))
    assert int(next(following)) == 400
    left.close()  # as when an error that holds its frames is let go of at last
    assert [int(result) for result in following] == [number**2 for number in range(21, 50)]


def test_a_loop_in_another_thread_gives_way_to_a_new_one(pool: WorkerPool) -> None:
    """As when a second interrupt comes while the thread of the first loop is being waited for."""
    ended = threading.Event()

    def consume() -> None:
        for _ in pool.run(iter(lambda: 30, None)):
            time.sleep(0.01)
        ended.set()

    thread = threading.Thread(target=consume)
    thread.start()
    time.sleep(0.2)
    assert [int(result) for result in pool.run(range(20, 60))] == [number**2 for number in range(20, 60)]
    assert ended.wait(30)
    thread.join()


def test_an_interrupt_at_any_moment_leaves_the_pool_usable(tmp_path: Path) -> None:
    """Real SIGINTs, as in a notebook: the loop ends, and the next one is right."""
    pool = WorkerPool(Large(), 2, on_death=Coroner(9.0))
    interrupted = 0
    for number in range(12):
        timer = threading.Timer(0.003 * number, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for result in pool.run(range(1000)):
                assert len(result) == 300_000
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert [int(result[0]) for result in pool.run(range(4))] == [0, 1, 2, 3]
    assert interrupted == 12
    pool.close()


class Large(Squares):
    """Results that take a while to receive: most of it in the pickle."""

    def __call__(self, number: int) -> Any:
        return [number] * 300_000


def test_a_process_without_descriptors_says_so() -> None:
    ours, theirs = socket.socketpair()
    send(theirs, torch.ones(70_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(FramestreamError, match="too many files open"):
            receive(ours)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        ours.close()
        theirs.close()


def test_whose_fault_a_death_is() -> None:
    coroner = Coroner(9.0)
    place = Place(0, 1, 2)
    assert coroner(Death(None, "SIGSEGV", False, 1, 0)) is None
    assert coroner(Death(place, "SIGKILL", False, 1, 1)) is None
    assert coroner(Death(place, "SIGKILL", False, 1, 8)) is None  # an epoch later
    assert coroner(Death(place, "SIGKILL", False, 1, 8)) is None
    third = coroner(Death(place, "SIGKILL", False, 1, 8))
    assert third is not None
    assert third.place == place
    assert coroner(Death(Place(0, 1, 3), "SIGSEGV", False, 1, 9)) is not None
    assert coroner(Death(Place(0, 1, 4), "SIGKILL", True, 1, 9)) is not None
    many = Coroner(9.0, workers=6)  # all of them may be ended at once, and once more
    assert [many(Death(None, "SIGKILL", False, number, 9)) for number in range(1, 13)] == [None] * 12
    with pytest.raises(WorkerError, match=r"13 worker processes in a row ended \(exit status 1\).*__main__"):
        many(Death(None, "exit status 1", False, 13, 9))
    with pytest.raises(WorkerError, match=r"5 worker processes in a row.*memory"):
        coroner(Death(None, "SIGKILL", False, 5, 9))
