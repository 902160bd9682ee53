"""Workers that crash or hang cost their task and nothing else."""

from __future__ import annotations

import os
import time

import pytest

from framestream.pipeline.errors import ConfigError
from framestream.tools.pool import Failure, WorkerPool

from pool_tasks import act


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_has_its_outcome_in_order(workers: int) -> None:
    tasks = ["a", "segfault", "b", "refuse", "exit", "large", "surprise", "sleep0.3", "c", "hang", "d", *"efgh"]
    with WorkerPool(act, workers=workers, timeout_s=3.0) as pool:
        outcomes = dict(pool.map(tasks))
    assert list(outcomes) == tasks
    failures = {task: result.reason for task, result in outcomes.items() if isinstance(result, Failure)}
    assert failures == {
        "segfault": "crashed the worker process (signal SIGSEGV)",
        "exit": "ended the worker process (exit code 3)",
        "refuse": "clip x cannot be used",
        "surprise": "KeyError: 'moov'",
        "hang": "took longer than 3 s and was stopped",
    }
    assert all(result == (task if task != "large" else "x" * 5_000_000) for task, result in outcomes.items()
               if task not in failures)  # fmt: skip


def test_each_task_may_have_a_limit_of_its_own() -> None:
    with WorkerPool(act, workers=1, timeout_s=lambda task: 30.0 if task == "sleep2" else 0.5) as pool:
        outcomes = dict(pool.map(["a", "sleep2", "sleep20", "b"]))
    assert outcomes.pop("sleep20") == Failure("took longer than 0.5 s and was stopped")
    assert outcomes == {task: task for task in ("a", "sleep2", "b")}


def test_a_worker_that_dies_while_it_is_idle_costs_no_task() -> None:
    """Killed for memory, or with its pipe gone first and the process later."""
    with WorkerPool(act, workers=1, timeout_s=30.0) as pool:
        for end in ("kill", "hang up"):
            if end == "kill":
                assert list(pool.map(["a"])) == [("a", "a")]
                (worker,) = pool._idle
                worker.process.kill()
                os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
            else:
                assert list(pool.map(["hang up"])) == [("hang up", "hang up")]
                (worker,) = pool._idle
                assert worker.connection.poll(10)  # its end of the pipe is closed
                assert worker.process.poll() is None
            started = time.monotonic()
            assert list(pool.map(["b", "c"])) == [("b", "b"), ("c", "c")]
            assert time.monotonic() - started < 30


def test_an_impossible_setting_ends_the_run() -> None:
    with WorkerPool(act, workers=1, timeout_s=30.0) as pool, pytest.raises(ConfigError, match="no encoder"):
        list(pool.map(["a", "config", "b"]))


def test_results_do_not_pile_up() -> None:
    taken = []

    def tasks() -> object:
        for i in range(100):
            taken.append(i)
            yield str(i)

    with WorkerPool(act, workers=2, timeout_s=30.0) as pool:
        results = pool.map(tasks())  # type: ignore[arg-type]
        next(results)
        assert len(taken) <= 6
        assert len(list(results)) == 99
