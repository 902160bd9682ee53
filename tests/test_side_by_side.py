"""Work in several threads, of which the results come as they are there."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from framestream.pipeline import early_sync
from framestream.pipeline.early_sync import EVERY_BYTES, MOST_BYTES, EarlySync
from framestream.tools.side_by_side import side_by_side
from framestream.tools.whole_file import Stoppable


def test_all_items_come_and_no_more_run_than_asked() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def some(number: int) -> Generator[tuple[int, int], None, None]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        for step in range(5):
            yield number, step
        with lock:
            running -= 1

    came = list(side_by_side((some(number) for number in range(20)), 3))
    assert sorted(came) == [(number, step) for number in range(20) for step in range(5)]
    for number in range(20):
        assert [step for each, step in came if each == number] == list(range(5))
    assert 1 <= most <= 3
    assert list(side_by_side(iter(()), 3)) == []


def test_they_run_at_the_same_time() -> None:
    """Each waits for the other."""
    barrier = threading.Barrier(2, timeout=30)

    def some() -> Generator[int, None, None]:
        barrier.wait()
        yield 1

    assert list(side_by_side((some(), some()), 2)) == [1, 1]


def test_generators_are_taken_only_when_there_is_room() -> None:
    taken = 0

    def endless() -> Iterator[Generator[int, None, None]]:
        nonlocal taken
        while True:
            taken += 1
            yield (number for number in range(1))

    results = side_by_side(endless(), 2)
    for _ in range(10):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert taken <= 12


@pytest.mark.parametrize("ending", ["error", "closed"])
def test_when_one_fails_or_nobody_wants_more_the_others_end(ending: str) -> None:
    closed = threading.Event()

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    def failing() -> Generator[int, None, None]:
        yield 1
        raise OSError("no space left")

    some = [endless(), failing()] if ending == "error" else [endless()]
    results = side_by_side(some, 2)
    if ending == "error":
        with pytest.raises(OSError, match="no space left"):
            for _ in results:
                pass
    else:
        assert next(iter(results)) == 0
        results.close()  # type: ignore[attr-defined]
    assert closed.is_set()


def test_what_is_written_is_synced_meanwhile_and_errors_are_told(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        sync = EarlySync(file.fileno())
        for _ in range(5):
            sync.wrote(EVERY_BYTES)
        sync.close()
    sync = EarlySync(1 << 20)  # no such descriptor
    sync.wrote(EVERY_BYTES)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync.close()


def test_a_long_copy_ends_when_nobody_waits_for_it() -> None:
    class Endless:
        num_bytes = 1 << 60

        def blocks(self) -> Iterator[bytes]:
            while True:
                yield b"on and on"

    stopped = threading.Event()

    def copying() -> Generator[int, None, None]:
        yield 1
        for _ in Stoppable(Endless(), stopped).blocks():
            pass

    results = side_by_side([copying()], 1, stopped)
    assert next(results) == 1
    results.close()  # type: ignore[attr-defined]


def test_a_writer_waits_for_a_disk_that_does_not_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    going = threading.Event()
    monkeypatch.setattr(early_sync, "_sync", lambda descriptor: going.wait(30))
    sync = EarlySync(0)
    for _ in range(MOST_BYTES // EVERY_BYTES):
        sync.wrote(EVERY_BYTES)
    writer = threading.Thread(target=sync.wrote, args=[EVERY_BYTES])
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    going.set()
    writer.join(30)
    assert not writer.is_alive()
    sync.close()
