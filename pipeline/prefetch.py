"""Run an iterator in a thread, a few items ahead of its consumer."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")

_CHECK_S = 1.0  # between two looks of a waiting thread at whether anybody still wants its work


class _Shared(Generic[Item]):
    """What thread and consumer share. The thread holds no reference to the `ReadAhead` itself, so that an
    abandoned one is collected and its thread ends.

    Queues, because they are one step for an interrupt, which may come anywhere: a semaphore takes several.
    """

    def __init__(self, depth: int) -> None:
        self.slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self.slots.put(None)
        self.results: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        self.slots.put(None)


class ReadAhead(Generic[Item]):
    """Iterate over `source` in one background thread that keeps `depth` finished items ready.

    Items come in order. An exception of the source is raised in the consumer at its place. `close()` stops the
    thread after the item at hand; leaving the object to the garbage collector or to interpreter exit does too.
    """

    def __init__(self, source: Iterable[Item], depth: int = 2) -> None:
        self._shared: _Shared[Item] = _Shared(depth)
        self._thread = threading.Thread(
            target=_work, args=(source, self._shared, weakref.ref(self)), name="framestream-read-ahead", daemon=True
        )
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _finish, self._shared, self._thread, self._owner)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while not self._shared.stopped:
            item, error = self._shared.results.get()
            if error is not None:
                self.close()
                if isinstance(error, StopIteration):
                    return
                raise error
            self._shared.slots.put(None)
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Stop the thread and wait for it; called again after an interrupt, wait again."""
        _finish(self._shared, self._thread, self._owner)
        self._finalizer.detach()


def _work(source: Iterable[Item], shared: _Shared[Item], consumer: weakref.ref[ReadAhead[Item]]) -> None:
    iterator = iter(source)
    try:
        _fill(iterator, shared, consumer)
    finally:
        if hasattr(iterator, "close"):  # now, not when somebody lets go of an error that holds its frames
            iterator.close()


def _fill(iterator: Iterator[Item], shared: _Shared[Item], consumer: weakref.ref[ReadAhead[Item]]) -> None:
    while True:
        try:
            shared.slots.get(timeout=_CHECK_S)
        except Empty:
            if consumer() is None:  # it went without a word, because an interrupt came in between
                return
            continue
        if shared.stopped:
            return
        try:
            shared.results.put((next(iterator), None))
        except BaseException as error:  # whatever it is, it belongs to the consumer
            shared.results.put((None, error))
            return


def _finish(shared: _Shared[Item], thread: threading.Thread, owner: int) -> None:
    if os.getpid() != owner:  # a fork has not inherited the thread
        return
    shared.stop()
    if thread is not threading.current_thread() and thread.ident is not None:  # else an interrupt came before it began
        thread.join()
