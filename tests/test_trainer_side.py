"""Decoding in the process that trains: one stream for any number of threads, beside the step, and nothing left over."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from framestream.pipeline.cached import cached_property
from framestream.pipeline.decode_threads import DecodeThreads
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import DenseSampling
from framestream.pipeline.trainer_side import READ_AHEAD

from loader_setup import digest, keys, make_loader, stream
from synthetic import read_indices

TESTS = Path(__file__).parent
COUNTERS = ("samples", "batches", "rejects", "reject_share", "spares", "without_meta", "cpu_fallbacks")


def noisy(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randint(0, 9, (frames.shape[0], 1, 1, 1), generator=generator, dtype=torch.uint8)
    return frames // 2 + noise


def loader_of(shards: Path, threads: int | None = 3, hook: Any = None, **options: Any) -> Any:
    return make_loader(shards, transform=hook, **{"decode_on": "trainer", "decode_threads": threads, **options})


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("framestream")]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


class Counting:
    """A hook that counts clips, and waits at a gate from the `stop`-th on."""

    def __init__(self, stop: int = 1 << 30) -> None:
        self.stop, self.gate, self.clips, self.lock = stop, threading.Event(), 0, threading.Lock()

    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with self.lock:
            self.clips += 1
            number = self.clips
        if number >= self.stop:
            assert self.gate.wait(60)
        return frames


# -- one stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_stream_is_the_same_for_any_number_of_threads(
    damaged: Path, tmp_path: Path, threads: int, workers: int
) -> None:
    """Frames, spares, rejects as they are written down, the state after each batch, and the counters."""
    settings = {"random_end": True, "max_reject_share": 0.5, "normalize": (0.5, 0.2)}
    paths = [tmp_path / name for name in ("alone.jsonl", "threads.jsonl")]
    alone = make_loader(damaged, transform=noisy, rejects_path=paths[0], **settings)
    other = loader_of(damaged, threads, noisy, num_workers=workers, rejects_path=paths[1], **settings)
    for _ in range(2):
        for expected, batch in zip(alone, other, strict=True):
            assert digest(batch) == digest(expected)
            assert other.state_dict() == alone.state_dict()
    assert paths[0].read_text() == paths[1].read_text() != ""
    counted, expected = other.stats(), alone.stats()
    assert {name: counted[name] for name in COUNTERS} == {name: expected[name] for name in COUNTERS}
    assert counted["rejects"] > 0
    assert (other.decode_threads, alone.decode_threads) == (threads, 0)
    other.close()


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_each_reader_of_the_cpu_may_run_in_several_threads(shards: Path, decoder: str) -> None:
    from framestream.pipeline.decode import available_backends

    if available_backends()[decoder]:
        pytest.skip(available_backends()[decoder])
    one, four = (stream(loader_of(shards, threads, decoder=decoder)) for threads in (1, 4))
    assert one == four
    for batch in loader_of(shards, 4, decoder=decoder):
        assert [read_indices(frames) for frames in batch["video_frames"]] == batch["frame_index"].tolist()


def test_a_run_goes_on_with_another_number_of_threads(shards: Path) -> None:
    first = loader_of(shards, 4)
    loop = iter(first)
    next(loop)
    next(loop)
    second = loader_of(shards, 2, num_workers=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = stream(loop)
    assert stream(second) == rest
    assert len(rest) == 4
    second.close()


def test_settings_that_would_do_nothing_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match="decode_threads=2 does nothing with decode_on='workers'"):
        make_loader(shards, decode_on="workers", decode_threads=2)
    with pytest.raises(ConfigError, match="decode_threads is 0"):
        make_loader(shards, decode_threads=0)
    assert make_loader(shards, decode_threads=4).decode_threads == 0  # "auto" has chosen the workers
    assert make_loader(shards, decode_on="trainer").decode_threads == 1


# -- at the same time --------------------------------------------------------------------------------------


class Meets:
    """Something with a property that takes two at a time to compute."""

    meeting = threading.Barrier(2)

    @cached_property
    def value(self) -> int:
        """A number."""
        return self.meeting.wait(60)


def test_threads_do_not_wait_for_each_others_cached_values() -> None:
    """As with `functools.cached_property` before Python 3.12, whose lock a fork may inherit besides."""
    threads = DecodeThreads(lambda one: one.value, 2)
    both = [Meets(), Meets()]
    futures = [threads.submit(one) for one in both]
    found = [future.result(60) for future in futures]
    assert sorted(found) == [0, 1]
    assert [one.value for one in both] == found  # kept
    assert Meets.value.__doc__ == "A number."
    threads.close()


def test_threads_decode_at_the_same_time_across_batches(shards: Path) -> None:
    """Three clips of three batches meet in the hook, or nobody leaves it."""
    meeting = threading.Barrier(3)

    def meets(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        meeting.wait(60)
        return frames

    batches = []
    loop = iter(loader_of(shards, 3, meets, batch_size=1))
    for _ in range(12):  # the thirteenth would wait for two more
        batches.append(next(loop))
    meeting.abort()
    loop.close()  # type: ignore[attr-defined]
    assert len(batches) == 12


def test_decoding_goes_on_while_the_training_thread_is_busy_and_not_too_far(shards: Path) -> None:
    hook = Counting()
    loop = iter(loader_of(shards, 2, hook))
    next(loop)  # and from here on the training thread asks for nothing
    assert until(lambda: hook.clips == (1 + READ_AHEAD) * 2)
    time.sleep(0.3)
    assert hook.clips == (1 + READ_AHEAD) * 2
    assert len(list(loop)) == 5


def test_many_threads_are_given_enough_clips(shards: Path) -> None:
    hook = Counting(stop=1)
    loop = iter(loader_of(shards, 6, hook, batch_size=1))
    thread = threading.Thread(target=next, args=(loop,))
    thread.start()
    assert until(lambda: hook.clips == 6)
    hook.gate.set()
    thread.join()
    loop.close()  # type: ignore[attr-defined]


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_of_several_errors_the_first_in_order_counts(shards: Path, threads: int) -> None:
    """Also where a later clip fails earlier: clip 2 fails when clip 3 has."""
    order: list[int] = []  # seeds tell clips apart

    def notes(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        order.append(generator.initial_seed())
        return frames

    later = threading.Event()

    def breaks(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        number = order.index(generator.initial_seed())
        if number == 2:
            assert threads == 1 or later.wait(60)
            raise ZeroDivisionError("clip 2")
        if number == 3:
            later.set()
            raise KeyError("clip 3")
        return frames

    keys(loader_of(shards, 1, notes))
    loop = iter(loader_of(shards, threads, breaks))
    next(loop)
    with pytest.raises(ZeroDivisionError, match="clip 2"):
        next(loop)
    assert not names()


class BreaksAtTheSixth(DenseSampling):
    plans = 0

    def plan(self, *args: Any, **options: Any) -> Any:
        object.__setattr__(self, "plans", self.plans + 1)
        if self.plans == 6:
            raise RuntimeError("no plan")
        return super().plan(*args, **options)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_thread_that_plans_comes_at_its_place(shards: Path, threads: int) -> None:
    loop = iter(loader_of(shards, threads, sampling=BreaksAtTheSixth(2)))
    next(loop)
    next(loop)
    with pytest.raises(RuntimeError, match="no plan"):
        next(loop)
    assert not names()


def test_threads_that_cannot_begin_say_so() -> None:
    def begin(number: int) -> None:
        raise RuntimeError(f"thread {number} has no device")

    threads = DecodeThreads(int, 2, begin)
    futures = [threads.submit("1") for _ in range(3)]
    for future in futures:
        with pytest.raises(RuntimeError, match="has no device"):
            future.result(60)
    threads.close()


# -- nothing left over -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_leaving_early_drops_what_has_not_begun(shards: Path, workers: int) -> None:
    hook = Counting(stop=4)
    loader = loader_of(shards, 1, hook, num_workers=workers)
    loop = iter(loader)
    next(loop)
    assert until(lambda: hook.clips == 4)  # under way, and more clips have been submitted
    threading.Timer(0.2, hook.gate.set).start()
    loop.close()  # type: ignore[attr-defined]
    assert hook.clips == 4
    assert not names()
    assert len(list(loader)) == 6
    loader.close()


def test_closing_ends_the_loop_of_a_live_iterator(shards: Path) -> None:
    loader = loader_of(shards)
    loop = iter(loader)
    next(loop)
    assert names()
    loader.close()
    assert not names()
    assert next(loop, None) is None


def test_a_loop_that_nobody_holds_any_more_is_gone(shards: Path) -> None:
    loader = loader_of(shards)
    next(iter(loader))
    assert not names()
    loop = iter(loader)
    next(loop)
    del loader, loop
    assert not names()
    circle: list[Any] = [iter(loader_of(shards))]
    next(circle[0])
    circle.append(circle)
    del circle
    gc.collect()
    assert not names()


class Interrupted(Exception):
    pass


def test_interrupts_at_any_moment_leave_nothing_behind(shards: Path) -> None:
    """As KeyboardInterrupt does in a notebook: raised wherever the training thread is just then."""
    loader = loader_of(shards, 3)
    expected = stream(loader)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(25):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.004 * number)
                for _ in range(50):
                    list(loader)
            except Interrupted:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted >= 20  # Python drops an error that is raised inside a callback of the garbage collector
    gc.collect()  # the error of an interrupt stands in a reference cycle
    assert until(lambda: not names())
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "consumed": 0})
    assert stream(loader) == expected


def test_a_fork_in_mid_loop_has_a_loop_of_its_own(shards: Path) -> None:
    loader = loader_of(shards, 3)
    expected = keys(loader_of(shards, 1))
    loop = iter(loader)
    first = next(loop)["keys"]
    child = os.fork()
    if not child:
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "consumed": 0})
        os._exit(0 if keys(loader) == expected else 1)
    assert [first, *(batch["keys"] for batch in loop)] == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


EXIT = """
import sys
sys.path.insert(0, {tests!r})
from test_trainer_side import loader_of

loop = iter(loader_of({shards!r}, 3, batch_size=4, num_workers=1))
print(len(next(loop)["keys"]))
"""


def test_a_process_may_end_in_mid_loop(shards: Path) -> None:
    script = EXIT.format(tests=str(TESTS), shards=str(shards))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
    assert done.stderr == ""


def test_stopped_threads_take_nothing_any_more() -> None:
    gate, begun = threading.Event(), threading.Event()

    def waits(number: int) -> int:
        begun.set()
        assert gate.wait(60)
        return number

    threads = DecodeThreads(waits, 1)
    first, second = threads.submit(1), threads.submit(2)
    assert begun.wait(60)
    threads.stop()
    third = threads.submit(3)
    gate.set()
    assert first.result(60) == 1  # it had begun
    for future in (second, third):
        with pytest.raises(CancelledError):
            future.result(60)
    threads.close()
    threads.close()
    assert not names()
