"""Run an iterator in a thread, a few items ahead of its consumer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Shared(Generic[Item]):
    """What thread and consumer share. The thread holds no reference to the `ReadAhead` itself, so that an
    abandoned one is collected and its thread ends."""

    def __init__(self, depth: int) -> None:
        self.slots = threading.Semaphore(depth)
        self.results: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        self.slots.release()


class ReadAhead(Generic[Item]):
    """Iterate over `source` in one background thread that keeps `depth` finished items ready.

    Items come in order. An exception of the source is raised in the consumer at its place. `close()` stops the
    thread after the item at hand; leaving the object to the garbage collector or to interpreter exit does too.
    """

    def __init__(self, source: Iterable[Item], depth: int = 2) -> None:
        self._shared: _Shared[Item] = _Shared(depth)
        self._thread = threading.Thread(
            target=_work, args=(source, self._shared), name="framestream-read-ahead", daemon=True
        )
        self._finalizer = weakref.finalize(self, _finish, self._shared, self._thread)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while not self._shared.stopped:
            item, error = self._shared.results.get()
            if error is not None:
                self.close()
                if isinstance(error, StopIteration):
                    return
                raise error
            self._shared.slots.release()
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Stop the thread and wait for it; called again after an interrupt, wait again."""
        self._finalizer.detach()
        _finish(self._shared, self._thread)


def _work(source: Iterable[Item], shared: _Shared[Item]) -> None:
    iterator = iter(source)
    try:
        _fill(iterator, shared)
    finally:
        if hasattr(iterator, "close"):  # now, not when somebody lets go of an error that holds its frames
            iterator.close()


def _fill(iterator: Iterator[Item], shared: _Shared[Item]) -> None:
    while True:
        shared.slots.acquire()
        if shared.stopped:
            return
        try:
            shared.results.put((next(iterator), None))
        except BaseException as error:  # whatever it is, it belongs to the consumer
            shared.results.put((None, error))
            return


def _finish(shared: _Shared[Item], thread: threading.Thread) -> None:
    shared.stop()
    if thread is not threading.current_thread():
        thread.join()
