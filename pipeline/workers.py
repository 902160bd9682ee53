"""Worker processes that turn requests into results, in order, and whose deaths are survived.

Why not the worker processes of `torch.utils.data.DataLoader`: there, a worker that a broken video kills ends the run,
by an error that comes out of a signal handler wherever the training code is just then, and a worker that hangs stops
it for ever. Here a worker that dies or overruns its time is replaced, what it had in hand is done again, and whoever
gave the work is told which sample it was at. A new request goes to the worker that has fewest in hand, not in turn.

Nothing is shared that a death could leave locked: each worker has a socket of its own, and what it has sent can be
used after it is gone.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import queue
import random
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .parent_watch import leave_with_parent
from .shared_message import receive, send
from .watch import Place, Watch

_CHECK_S = 1.0  # between two looks at the clocks of the workers
_LEAVE_S = 0.2  # that workers have to leave by themselves
_KILLED_S = 10.0  # that a killed process is waited for; one that hangs in a system call does not end even then
_GRACE_S = 3.0  # that a worker which has overrun its limit is watched before it is ended
_START_S = 180.0  # that a worker has to start; a fork of a process with threads may, very rarely, never come to life


class Work(Protocol):
    """What runs in the workers. Has to be picklable where workers are not forked."""

    def __call__(self, request: Any, /) -> Any:
        """Turn a request into a result."""

    def learn(self, fact: Any, /) -> None:
        """Take note of something for all later requests."""

    def watched(self, watch: Watch) -> None:
        """Report to `watch` from now on."""


class Death(NamedTuple):
    """How a worker ended.

    Attributes:
        place: the sample that it was at, if any.
        how: by what signal or exit status.
        hung: it was ended here, because it overran its limit.
        in_a_row: deaths since the last result, this one included.
        ticket: number of the request that it took up last; the same when that is given again.
    """

    place: Place | None
    how: str
    hung: bool
    in_a_row: int
    ticket: int


class WorkerTraceback(Exception):
    """Where in a worker an error was raised; the cause of the error that the training process sees."""

    def __str__(self) -> str:
        return f"in a worker process:\n{self.args[0]}"


class _Raised:
    """An exception on its way out of a worker."""

    def __init__(self, error: BaseException) -> None:
        self.text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
            self.error: BaseException = error
        except Exception:
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

    def throw(self) -> None:
        raise self.error from WorkerTraceback(self.text)


class _Worker:
    """One process, its socket, and what it has been given and not yet answered."""

    def __init__(self, work: Work, context: BaseContext, oldest: Any, number: int) -> None:
        self.watch = Watch(context)
        self.given: dict[int, Any] = {}  # ticket -> request
        self.lost = False  # to be replaced: it is being ended, or its channel is in the middle of a message
        self.suspect: tuple[int, float] | None = None  # the limit that it has overrun, and when that was first seen
        self.channel, theirs = socket.socketpair()
        self.watch.limit(_START_S)
        # A fork server is the parent of its workers, and ends with the process that it serves.
        parent = None if context.get_start_method() == "forkserver" else os.getpid()
        with theirs:
            self.process: Any = context.Process(  # type: ignore[attr-defined]
                target=_serve,
                args=(work, theirs, self.watch, oldest, parent, number),
                name=f"framestream-worker-{number}",
                daemon=True,
            )
            with _no_collection():
                self.process.start()

    def tell(self, ticket: int | None, content: Any) -> None:
        if ticket is not None:
            self.given[ticket] = content
        with self._whole_message(), suppress(OSError):  # it has died, which is noticed elsewhere
            send(self.channel, (ticket, content))

    def hear(self) -> Any:
        """The next answer. Raises OSError or EOFError where there will be none any more."""
        with self._whole_message():
            return receive(self.channel)

    @contextmanager
    def _whole_message(self) -> Iterator[None]:
        """After an interrupt in mid-message, the rest of it must not be taken for the next one."""
        try:
            yield
        except BaseException:
            self.lost = True
            raise

    def overdue(self) -> bool:
        """Whether it works on a sample for too long, and still does after a while of watching: time may also have
        passed because everything was suspended."""
        limit = self.watch.overrun()
        if limit is None:
            self.suspect = None
        elif self.suspect is None or self.suspect[0] != limit:
            self.suspect = limit, time.monotonic()
        return self.suspect is not None and time.monotonic() - self.suspect[1] > _GRACE_S

    def end(self) -> str:
        """Make sure that the process is gone, and say how it went."""
        self.lost = True
        self.process.kill()  # no more than a formality where it is gone already
        self.process.join(_LEAVE_S)
        if self.process.exitcode is None:
            self.process.join(_KILLED_S)
        self.channel.close()
        code = self.process.exitcode
        if code is None:
            return "no end to its last system call"
        if code < 0:
            names = {int(known): known.name for known in signal.Signals}
            return names.get(-code, f"signal {-code}")
        return f"exit status {code}"


@contextmanager
def _no_collection() -> Iterator[None]:
    """A fork begins without garbage collection, until it has set aside what came with it: an object of a library that
    another thread was using just then has its locks locked for ever, and taking it apart would wait for them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass
class WorkerCounts:
    """What workers have done, also those of earlier pools."""

    busy_s: float = 0.0  # seconds that workers were at work
    transfer_s: float = 0.0  # seconds that the training process took results from them
    restarts: int = 0  # workers that were replaced


class WorkerPool:
    """Runs `work` in `count` processes, which live until `close()`.

    Args:
        work: what to run; see `Work`.
        count: processes.
        prefetch: requests per worker that are under way, or finished and waiting to be taken.
        context: start method, None for the platform's own.
        on_death: called with a `Death`; returns a fact that this process's `work` and all workers learn before the
            work in hand is done again, or None to simply do it again. May raise to end the run.
        counts: to count in.
    """

    def __init__(
        self,
        work: Work,
        count: int,
        *,
        prefetch: int = 2,
        context: str | None = None,
        on_death: Callable[[Death], Any],
        counts: WorkerCounts | None = None,
    ) -> None:
        self._work, self._on_death, self.counts = work, on_death, counts or WorkerCounts()
        self._context: BaseContext = multiprocessing.get_context(context)
        self._most = count * prefetch
        self._oldest: Any = self._context.RawValue("q", 0)  # type: ignore[attr-defined]  # older ones: a loop that was left
        self._owner = os.getpid()
        self._next = 0  # ticket
        self._loops = 0  # begun; only the latest one may go on
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._workers = [self._start() for _ in range(count)]
        self._in_a_row = 0

    def run(self, requests: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the result of each request, in order.

        Raises:
            Exception: what `work` raised in a worker, at its place, with the worker's traceback as its cause.
        """
        self._loops += 1
        loop, waiting, done = self._loops, iter(requests), {}  # type: ignore[var-annotated]
        with self._lock:  # a loop before this one may still be waiting in another thread, for a second at most
            at = end = self._next  # tickets of this loop: taken up to `at`, given up to `end`
            self._oldest.value = at  # what the loop before still has under way is nobody's any more
            self._in_a_row = 0
            for worker in self._workers:
                worker.given.clear()
        try:
            while True:
                with self._lock:
                    if loop != self._loops:
                        return
                    while end - at < self._most and (request := next(waiting, None)) is not None:
                        self._next = end = end + 1
                        self._give(end - 1, request)
                    if at == end:
                        return
                    if at not in done:
                        self._take(done)
                        continue
                    result = done.pop(at)
                if isinstance(result, _Raised):
                    result.throw()
                at += 1
                yield result
        finally:  # which may come late, when the next loop has begun already
            if os.getpid() == self._owner:  # or in a fork, which must not speak for its parent
                self._oldest.value = max(self._oldest.value, end)

    def close(self) -> None:
        """End the workers: those at rest leave by themselves, those at work are killed, which costs nothing.

        A loop ends with it. May be called from a signal handler, whatever the process is at.
        """
        self._loops += 1
        workers, self._workers = self._workers, []
        for worker in workers:
            with suppress(OSError):
                worker.channel.shutdown(socket.SHUT_WR)
        until = time.monotonic() + _LEAVE_S
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
        for worker in workers:
            worker.end()

    def _start(self) -> _Worker:
        return _Worker(self._work, self._context, self._oldest, next(self._numbers))

    def _give(self, ticket: int, request: Any) -> None:
        min(self._workers, key=lambda worker: len(worker.given)).tell(ticket, request)

    def _take(self, done: dict[int, Any]) -> None:
        """Wait for something to happen: results that have come, workers that have died or overrun their time."""
        for worker in [other for other in self._workers if other.lost]:  # an interrupt or an error came in between
            self._replace(worker, hung=False)
        with selectors.DefaultSelector() as selector:
            for worker in list(self._workers):
                selector.register(worker.channel, selectors.EVENT_READ, (worker, True))
                selector.register(worker.process.sentinel, selectors.EVENT_READ, (worker, False))
            events = [key.data for key, _ in selector.select(_CHECK_S)]
        readable = [worker for worker, channel in events if channel]
        gone = [worker for worker, channel in events if not channel and worker not in readable]
        for worker in readable:
            if not self._read(worker, done):
                gone.append(worker)
        for worker in gone:
            self._replace(worker, hung=False)
        for worker in [other for other in self._workers if other not in readable and other.overdue()]:
            self._replace(worker, hung=True)

    def _read(self, worker: _Worker, done: dict[int, Any]) -> bool:
        """Take one result; False where there will be none any more."""
        started = time.perf_counter()
        try:
            ticket, result, seconds = worker.hear()
        except (OSError, EOFError):
            return False
        worker.given.pop(ticket, None)
        self._in_a_row = 0
        if ticket >= self._oldest.value:
            done[ticket] = result
            self.counts.busy_s += seconds
            self.counts.transfer_s += time.perf_counter() - started
        return True

    def _replace(self, worker: _Worker, *, hung: bool) -> None:
        if worker not in self._workers:
            return  # the pool was closed in the meantime
        place = worker.watch.place()
        how = worker.end()
        self.counts.restarts += 1
        self._in_a_row += 1
        fact = self._on_death(Death(place, how, hung, self._in_a_row, worker.watch.ticket()))
        if fact is not None:
            self._in_a_row -= 1  # it has brought us forward
            self._work.learn(fact)  # what workers start with from now on
            for other in self._workers:
                if other is not worker:
                    other.tell(None, fact)
        self._workers[self._workers.index(worker)] = self._start()
        for ticket, request in worker.given.items():
            if ticket >= self._oldest.value:
                self._give(ticket, request)


def _serve(work: Work, channel: socket.socket, watch: Watch, oldest: Any, parent: int | None, number: int) -> None:
    """What a worker process does until its channel is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of the training process would have come with a fork
    leave_with_parent(parent)
    gc.freeze()  # what a fork has left here is no garbage, and looking through it would copy all of its pages
    gc.enable()
    torch.set_num_threads(1)
    seed = (torch.initial_seed() + number) & (
        (1 << 63) - 1
    )  # for hooks that ignore their generator: they should differ by worker
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    work.watched(watch)
    watch.end()  # it has started
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_deliver, args=(channel, outbox), name="framestream-outbox", daemon=True).start()
    while True:
        try:
            ticket, request = receive(channel)
        except (OSError, EOFError):
            return
        if ticket is None:
            work.learn(request)
            continue
        watch.take(ticket)
        started = time.perf_counter()
        try:
            result = work(request) if ticket >= oldest.value else None
        except Exception as error:
            result = _Raised(error)
        watch.end()
        outbox.put((ticket, result, time.perf_counter() - started))


def _deliver(channel: socket.socket, outbox: queue.SimpleQueue[Any]) -> None:
    """Send results as they come, in a thread, so that a worker goes on while the training process is busy."""
    try:
        while True:
            ticket, result, seconds = outbox.get()
            try:
                send(channel, (ticket, result, seconds))
            except ConnectionError:
                return  # nobody is there to take it
            except Exception as error:  # it cannot be pickled, or memory has run out; nothing was sent yet
                send(channel, (ticket, _Raised(error), seconds))
    except BaseException:
        os._exit(1)  # a worker that cannot answer must not look as if it were still at work
