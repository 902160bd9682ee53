"""Worker processes that may crash or hang without costing more than the task they were at.

Each worker is a fresh Python of its own, talks over one pipe and gets one task at a time, so that it is known
which task killed it. It imports nothing of the calling script, so scripts need no `if __name__` guard.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, NamedTuple, TypeVar

from framestream.pipeline.errors import ConfigError, FramestreamError, StorageError, WorkerError
from framestream.pipeline.fresh_python import fresh_python

START_ALLOWANCE_S = 60.0  # on top of the limit for the first task of a worker: it has to import first
LOOK_AHEAD = 3  # tasks per worker that may be finished before their turn
WAITING_BYTES = 256 << 20
DEATH_S = 5.0

Task = TypeVar("Task")
Result = TypeVar("Result")


class Failure(NamedTuple):
    """Why a task has no result, in words.

    Attributes:
        storage: nothing is wrong with the task; what it needs could not be fetched.
    """

    reason: str
    storage: bool = False


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        command, environment = fresh_python(f"from framestream.tools.pool import serve; serve({theirs.fileno()})")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C while it starts is not for it
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.allowance = START_ALLOWANCE_S
        self.number = -1  # of the task it is at
        self.timeout_s = 0.0
        self.deadline = 0.0

    def give(self, number: int, function: Callable[[Any], Any], task: Any, timeout_s: float) -> None:
        self.number, self.timeout_s = number, timeout_s
        self.deadline = time.monotonic() + timeout_s + self.allowance
        self.allowance = 0.0
        self.connection.send((function, task))

    def end(self) -> int:
        """Kill the process and return its exit status as it was before that, if it had one."""
        self.connection.close()
        status = self.process.poll()
        self.process.kill()
        return self.process.wait() if status is None else status


class WorkerPool(Generic[Task, Result]):
    """Runs one function over many tasks in `workers` processes and hands the results back in order.

    Args:
        function: a function of an importable module; takes one task. Its FramestreamError (and any other exception)
            becomes a `Failure`, only a ConfigError ends the run.
        workers: number of processes.
        timeout_s: seconds for one task, or a function that tells them; a worker that takes longer is killed.
        weigh: bytes of a result; where results that wait for their turn have more than `WAITING_BYTES` together, no
            further task is begun until some are handed back.
        advice: what to do about a task that takes too long, to be added to the reason.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        *,
        workers: int,
        timeout_s: float | Callable[[Task], float],
        weigh: Callable[[Result], int] | None = None,
        advice: str = "",
    ) -> None:
        self.function = function
        self.workers = workers
        self.timeout_s = timeout_s
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._queue: deque[tuple[int, Task]] = deque()
        self._outcomes: dict[int, Result | Failure] = {}
        self._weigh, self._advice = weigh, advice
        self._waiting_bytes = 0
        self._turn = 0  # number of the task whose result is handed back next

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its processes."""
        for worker in self._idle + self._busy:
            worker.end()
        self._idle, self._busy = [], []

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | Failure]]:
        """Yield (task, result or Failure) in the order of `tasks`, a bounded number of tasks ahead.

        Again only when the one before came to its end.
        """
        self._turn = 0
        source = enumerate(tasks)
        order: deque[tuple[int, Task]] = deque()
        while True:
            for item in islice(source, self.workers * LOOK_AHEAD - len(order)):
                order.append(item)
                self._queue.append(item)
            if not order:
                return
            self._start_queued()
            number, task = order[0]
            while number not in self._outcomes:
                self._step()
            order.popleft()
            self._turn = number + 1
            outcome = self._outcomes.pop(number)
            self._waiting_bytes -= self._weight(outcome)
            yield task, outcome

    def _start_queued(self) -> None:
        while self._queue and len(self._busy) < self.workers:
            if self._waiting_bytes > WAITING_BYTES and self._queue[0][0] != self._turn:
                return
            number, task = self._queue.popleft()
            if not self._given(self._living(), number, task):  # it died just now, and not of this task
                self._busy.pop().end()
                if not self._given(_Worker(), number, task):
                    self._busy[-1].deadline = 0.0  # the next step finds out how it died

    def _given(self, worker: _Worker, number: int, task: Task) -> bool:
        """Whether the worker lived to take the task."""
        self._busy.append(worker)
        try:
            limit = self.timeout_s(task) if callable(self.timeout_s) else self.timeout_s
            worker.give(number, self.function, task, limit)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def _living(self) -> _Worker:
        """An idle worker, or a new one. What a worker dies of while it is idle, as of lack of memory, is no task's."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.end()
        return _Worker()

    def _step(self) -> None:
        """Wait until a worker finishes, dies or runs out of time, and give out the next tasks."""
        soonest = min(worker.deadline for worker in self._busy)
        timeout = max(0.0, soonest - time.monotonic())
        ready = wait([worker.connection for worker in self._busy], timeout=timeout)
        for worker in list(self._busy):
            if worker.connection in ready:
                try:
                    outcome = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    with suppress(subprocess.TimeoutExpired):  # how it ended is known a moment after its pipe has
                        worker.process.wait(DEATH_S)
                    outcome = Failure(_death(worker.end()))
                else:
                    self._idle.append(worker)
            elif time.monotonic() >= worker.deadline:
                worker.end()
                outcome = Failure(f"took longer than {worker.timeout_s:g} s and was stopped{self._advice}")
            else:
                continue
            self._busy.remove(worker)
            if isinstance(outcome, (ConfigError, WorkerError)):
                raise outcome
            self._outcomes[worker.number] = outcome
            self._waiting_bytes += self._weight(outcome)
        self._start_queued()

    def _weight(self, outcome: Result | Failure) -> int:
        return 0 if self._weigh is None or isinstance(outcome, Failure) else self._weigh(outcome)


def _death(status: int) -> str:
    if status < 0:
        return f"crashed the worker process (signal {signal.Signals(-status).name})"
    return f"ended the worker process (exit code {status})"


def serve(descriptor: int) -> None:
    """The worker's side: one task after the other until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    connection = Connection(descriptor)
    while True:
        try:
            function, task = connection.recv()
        except EOFError:
            return
        except Exception as err:  # this installation is at fault and no task: another version than when the run began
            connection.send(WorkerError(f"a worker process cannot be told what to do ({type(err).__name__}: {err})"))
            return
        try:
            outcome = function(task)
        except ConfigError as err:
            outcome = err
        except FramestreamError as err:
            outcome = Failure(str(err), isinstance(err, StorageError))
        except Exception as err:  # codecs raise anything; the task is lost, named by its owner, the run goes on
            outcome = Failure(f"{type(err).__name__}: {err}")
        try:
            connection.send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            return
