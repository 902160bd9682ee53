"""Several generators at a time, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def side_by_side(
    generators: Iterable[Generator[Item, None, None]], at_a_time: int, stopped: threading.Event | None = None
) -> Iterator[Item]:
    """Yield what they yield as it comes, `at_a_time` of them running. For work that leaves Python alone, such as
    reading, hashing and writing.

    An error of one of them is raised here. Then, or when this is closed, the others are closed after what they are at.

    Args:
        stopped: is set when they are to end, so that they can do so earlier.
    """
    came: SimpleQueue[Item | _End] = SimpleQueue()
    stopped = stopped or threading.Event()

    def run(generator: Generator[Item, None, None]) -> None:
        error = None
        try:
            with closing(generator):
                for item in generator:
                    came.put(item)
                    if stopped.is_set():
                        break
        except BaseException as err:
            error = err
        came.put(_End(error))

    source, running = iter(generators), 0
    with ThreadPoolExecutor(at_a_time) as threads:
        try:
            while True:
                for generator in islice(source, at_a_time - running):
                    threads.submit(run, generator)
                    running += 1
                if not running:
                    return
                item = came.get()
                if not isinstance(item, _End):
                    yield item
                    continue
                running -= 1
                if item.error is not None:
                    raise item.error
        finally:
            stopped.set()
