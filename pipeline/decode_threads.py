"""A few threads of the training process that decode: several clips at once, results by future, none left behind."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHECK_S = 1.0  # between two looks of a waiting thread at whether anybody still wants its work


class _Jobs(Generic[Item, Result]):
    """What the threads and their owner share. The threads hold no reference to the owner, so that an abandoned one is
    collected and they end."""

    def __init__(self, work: Callable[[Item], Result], count: int) -> None:
        self.work, self.count = work, count
        self.waiting: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
        self.stopped = False
        # Nothing may be put in after `stop` has looked. Reentrant: a signal handler may close what is being closed.
        self.lock = threading.RLock()

    def submit(self, item: Item) -> Future[Result]:
        future: Future[Result] = Future()
        with self.lock:
            if self.stopped:
                future.cancel()
            else:
                self.waiting.put((future, item))
        return future

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            try:
                while True:
                    job = self.waiting.get_nowait()
                    if job is not None:
                        job[0].cancel()
            except Empty:
                pass
            for _ in range(self.count):
                self.waiting.put(None)


class DecodeThreads(Generic[Item, Result]):
    """`count` threads that run `work` on what is submitted, in that order.

    Not `concurrent.futures.ThreadPoolExecutor`, because the interpreter waits at its exit until that has done all it
    was given; these drop what they have not begun.

    Args:
        work: what to run.
        count: threads.
        begin: called first in each thread, with its number from 0 on.
    """

    def __init__(self, work: Callable[[Item], Result], count: int, begin: Callable[[int], None] | None = None) -> None:
        self._jobs: _Jobs[Item, Result] = _Jobs(work, count)
        self._threads: list[threading.Thread] = []
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _finish, self._jobs, self._threads, self._owner)
        for number in range(count):
            thread = threading.Thread(
                target=_work,
                args=(self._jobs, begin, number, weakref.ref(self)),
                name=f"framestream-decode-{number}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()

    def submit(self, item: Item) -> Future[Result]:
        """The result that `item` will have; cancelled where the threads have been stopped."""
        return self._jobs.submit(item)

    def stop(self) -> None:
        """Cancel what has not begun, without waiting for what has: who waits for a result gets `CancelledError`."""
        if os.getpid() == self._owner:
            self._jobs.stop()

    def close(self) -> None:
        """Stop, and wait for the threads; called again after an interrupt, wait again."""
        _finish(self._jobs, self._threads, self._owner)
        self._finalizer.detach()


def _work(
    jobs: _Jobs[Item, Result],
    begin: Callable[[int], None] | None,
    number: int,
    owner: weakref.ref[DecodeThreads[Item, Result]],
) -> None:
    broken: BaseException | None = None
    try:
        if begin is not None:
            begin(number)
    except BaseException as error:  # each job says so; a thread that just ended would leave them waiting for ever
        broken = error
    while True:
        try:
            job = jobs.waiting.get(timeout=_CHECK_S)
        except Empty:
            if owner() is None:  # it went without a word, because an interrupt came in between
                return
            continue
        if job is None:
            return
        future, item = job
        if future.set_running_or_notify_cancel():
            try:
                if broken is not None:
                    raise broken
                future.set_result(jobs.work(item))
            except BaseException as error:  # whatever it is, it belongs to who waits for the result
                future.set_exception(error)
        del job, future, item  # while waiting for the next one, nothing of this one is kept


def _finish(jobs: _Jobs[Item, Result], threads: list[threading.Thread], owner: int) -> None:
    if os.getpid() != owner:  # a fork has not inherited the threads, but perhaps a lock that one of them held
        return
    jobs.stop()
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join()
