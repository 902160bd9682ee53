"""Windows of shards at hand before they are needed, and let go when they are passed."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from framestream.pipeline.order import SampleOrder
from framestream.pipeline.shard_prefetch import ShardPrefetch
from framestream.pipeline.shards import ShardSet

from remote_storage import Storage, http_storage
from synthetic_shards import make_shards

SHARDS, EACH, WINDOW = 8, 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 shards of 2 clips each."""
    return make_shards(
        tmp_path_factory.mktemp("remote"), num_samples=SHARDS * EACH, samples_per_shard=EACH, num_frames=8
    )


@pytest.fixture
def web(folder: Path) -> Iterator[Storage]:
    with http_storage(folder) as storage:
        yield storage


@pytest.fixture(scope="module")
def size(folder: Path) -> int:
    """Bytes of the largest shard."""
    return max(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.fixture
def order() -> SampleOrder:
    return SampleOrder([EACH] * SHARDS, seed=5, window_shards=WINDOW)


def tar(shard: int) -> str:
    return f"clips-{shard:06d}.tar"


def tars(cache: Path) -> dict[str, os.stat_result]:
    """The shards in a cache, from which others may remove some meanwhile."""
    found = {}
    for folder, _, names in os.walk(cache / "shards"):
        for name in names:
            if name.endswith(".tar"):
                with suppress(FileNotFoundError):
                    found[name] = os.stat(os.path.join(folder, name))
    return found


def num_bytes(cache: Path) -> int:
    return sum(stat.st_size for stat in tars(cache).values())


def locked(cache: Path) -> set[str]:
    """The shards that somebody has a lease on, as the kernel tells; trying the locks would disturb others."""
    inodes = {int(line.split()[-3].rpartition(":")[2]) for line in Path("/proc/locks").read_text().splitlines()}
    return {name for name, stat in tars(cache).items() if stat.st_ino in inodes}


def wanted(order: SampleOrder, epoch: int, position: int) -> set[str]:
    """The shards of the window of a position and of the one after it."""
    window = order.window(epoch, position)
    last = window.stop == len(order)
    following = order.window(epoch + 1, 0) if last else order.window(epoch, window.stop)
    return {tar(shard) for shard in window.shards + following.shards}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_two_windows_are_held_over_two_epochs(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    for epoch in range(2):
        for position in range(len(order)):
            prefetch.reach(epoch, position)
            expected = wanted(order, epoch, position)
            wait_for(lambda expected=expected: locked(tmp_path) == expected)
    assert web.served() == {tar(shard): 1 for shard in range(SHARDS)}
    assert prefetch.fetched_shards == SHARDS
    assert prefetch.fetched_bytes == num_bytes(tmp_path)
    assert web.proxy.count(".idx.json") == SHARDS  # at hand for the workers as well
    prefetch.close()
    wait_for(lambda: locked(tmp_path) == set())


def test_the_end_of_an_epoch_is_the_beginning_of_the_next(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    prefetch.reach(0, len(order))
    wait_for(lambda: locked(tmp_path) == wanted(order, 1, 0))
    prefetch.close()


def test_passed_windows_are_evicted_first_and_needed_ones_never(
    web: Storage, order: SampleOrder, tmp_path: Path, size: int
) -> None:
    """With room for three windows: the one before the current window is still there, older ones are not."""
    limit = 3 * WINDOW * size
    shards = web.open(cache_dir=tmp_path, cache_bytes=limit)
    prefetch = ShardPrefetch(shards, order)
    passed: list[set[str]] = []
    for position in range(0, len(order), WINDOW * EACH):
        prefetch.reach(0, position)
        expected = wanted(order, 0, position)
        wait_for(lambda expected=expected: locked(tmp_path) == expected)
        for sample in range(position, position + WINDOW * EACH):
            assert shards.read(*order.at(0, sample)).cached
        assert num_bytes(tmp_path) <= limit
        if passed:
            assert passed[-1] <= tars(tmp_path).keys()
        if len(passed) > 1 and not passed[-2] & (expected | passed[-1]):
            assert not passed[-2] & tars(tmp_path).keys()
        passed.append({tar(shard) for shard in order.window(0, position).shards})
    prefetch.close()


def test_what_is_needed_last_is_evicted_last_when_leases_are_gone(
    web: Storage, order: SampleOrder, tmp_path: Path
) -> None:
    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    for position in (0, WINDOW * EACH):
        prefetch.reach(0, position)
        wait_for(lambda p=position: locked(tmp_path) == wanted(order, 0, p))
    walked = [tar(s) for p in range(0, 3 * WINDOW * EACH, WINDOW * EACH) for s in order.window(0, p).shards]

    def by_use() -> list[str]:
        used = tars(tmp_path)
        return sorted(used, key=lambda name: used[name].st_mtime_ns)

    wait_for(lambda: by_use() == walked)
    prefetch.close()


def test_it_catches_up_after_a_slow_download(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    web.proxy.stall_s = 0.5
    first = tar(order.window(0, 0).shards[0])
    web.proxy.inject(first, "stall")
    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    prefetch.reach(0, 0)
    wait_for(lambda: web.served().get(first) == 1)
    far = 2 * WINDOW * EACH
    prefetch.reach(0, far)  # the thread still fetches for window 0
    wait_for(lambda: locked(tmp_path) == wanted(order, 0, far))
    skipped = {tar(shard) for shard in order.window(0, 0).shards[1:] + order.window(0, WINDOW * EACH).shards}
    assert not set(web.served()) & (skipped - wanted(order, 0, far))
    prefetch.close()


def test_two_ranks_share_windows(web: Storage, order: SampleOrder, tmp_path: Path, size: int) -> None:
    """One ahead of the other: what either needs stays, and each shard is fetched once."""
    limit = 3 * WINDOW * size
    ahead, behind = (ShardPrefetch(web.open(cache_dir=tmp_path, cache_bytes=limit), order) for _ in range(2))
    step = WINDOW * EACH
    for position in range(0, len(order) - step, step):
        behind.reach(0, position)
        wait_for(lambda p=position: wanted(order, 0, p) <= locked(tmp_path))
        ahead.reach(0, position + step)
        both = wanted(order, 0, position) | wanted(order, 0, position + step)
        wait_for(lambda both=both: locked(tmp_path) == both)
    assert max(web.served().values()) <= 2  # a shard may be fetched again for the next epoch
    ahead.close()
    wait_for(lambda: locked(tmp_path) == wanted(order, 0, len(order) - 2 * step))
    behind.close()


def test_a_cache_smaller_than_two_windows(
    web: Storage, order: SampleOrder, tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once, with what would be needed; the next window waits for the current one to pass."""
    limit = WINDOW * size + size // 2
    shards = web.open(cache_dir=tmp_path, cache_bytes=limit)
    needed = sum(sorted(path.stat().st_size for path in web.folder.glob("*.tar"))[-2 * WINDOW :])
    with caplog.at_level(logging.WARNING):
        prefetch = ShardPrefetch(shards, order)
        for position in range(len(order)):
            prefetch.reach(0, position)
            now = {tar(shard) for shard in order.window(0, position).shards}
            wait_for(lambda now=now: now <= locked(tmp_path))
            assert shards.read(*order.at(0, position)).key
            assert num_bytes(tmp_path) <= limit
    warnings = [record.getMessage() for record in caplog.records if "windows" in record.getMessage()]
    assert len(warnings) == 1
    assert f"up to {needed} bytes" in warnings[0]
    assert "raise cache_bytes" in warnings[0]
    prefetch.close()


def test_what_did_not_fit_is_fetched_when_there_is_room(
    web: Storage, order: SampleOrder, tmp_path: Path, size: int
) -> None:
    """Another rank still holds a passed window; when it lets go, the next `reach` fetches what is missing."""
    limit = 2 * WINDOW * size
    shards = web.open(cache_dir=tmp_path, cache_bytes=limit)
    mine = {shard for p in (0, WINDOW * EACH) for shard in order.window(0, p).shards}
    other = next(shard for shard in range(SHARDS) if shard not in mine)
    lease = shards.lease(other)
    assert lease is not None
    prefetch = ShardPrefetch(shards, order)
    prefetch.reach(0, 0)
    wait_for(lambda: len(locked(tmp_path)) == 2 * WINDOW)
    assert len(locked(tmp_path) & wanted(order, 0, 0)) == 2 * WINDOW - 1
    lease.close()

    def fetched() -> bool:
        prefetch.reach(0, 1)
        return locked(tmp_path) == wanted(order, 0, 0)

    wait_for(fetched)
    prefetch.close()


def test_a_shard_that_cannot_be_fetched_is_no_error_here(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    first = tar(order.window(0, 0).shards[0])
    web.proxy.inject(first, "404", 1)
    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    for position in range(3):
        prefetch.reach(0, position)
        wait_for(lambda: locked(tmp_path) == wanted(order, 0, 0) - {first})
    assert web.served()[first] == 1  # not asked for again before the window changes
    prefetch.reach(0, WINDOW * EACH)
    prefetch.reach(1, 0)
    wait_for(lambda: locked(tmp_path) == wanted(order, 1, 0))
    prefetch.close()


def test_it_ends_when_it_is_closed_or_forgotten(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    others = set(threading.enumerate())

    def threads() -> int:
        return sum(t.name == "framestream-shards" for t in threading.enumerate() if t not in others)

    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    for end in ("close", "close again", "forget"):
        prefetch.reach(0, 0)
        wait_for(lambda: locked(tmp_path) == wanted(order, 0, 0))
        assert threads() == 1
        if end == "forget":
            del prefetch
            gc.collect()
        else:
            prefetch.close()
        wait_for(lambda: locked(tmp_path) == set())  # a download at hand is finished, and let go
        wait_for(lambda: threads() == 0)


def test_leases_end_with_their_process_whatever_ends_it(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    """And a child forked while they are held keeps none of them."""
    shards = web.open(cache_dir=tmp_path)
    child = os.fork()
    if child == 0:
        prefetch = ShardPrefetch(shards, order)
        prefetch.reach(0, 0)
        wait_for(lambda: locked(tmp_path) == wanted(order, 0, 0))
        grandchild = os.fork()
        (tmp_path / f"forked-{grandchild}").touch()
        time.sleep(60)
        os._exit(0)
    wait_for(lambda: len(list(tmp_path.glob("forked-*"))) == 2)
    assert locked(tmp_path) == wanted(order, 0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    grandchild = max(int(path.name.partition("-")[2]) for path in tmp_path.glob("forked-*"))
    try:
        assert locked(tmp_path) == set()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_fork_has_its_own_leases(web: Storage, order: SampleOrder, tmp_path: Path) -> None:
    prefetch = ShardPrefetch(web.open(cache_dir=tmp_path), order)
    prefetch.reach(0, 0)
    wait_for(lambda: locked(tmp_path) == wanted(order, 0, 0))
    child = os.fork()
    if child == 0:
        prefetch.close()  # the parent's leases are not the child's to drop
        ok = locked(tmp_path) == wanted(order, 0, 0)
        prefetch.reach(0, 2 * WINDOW * EACH)
        wait_for(lambda: locked(tmp_path) == wanted(order, 0, 0) | wanted(order, 0, 2 * WINDOW * EACH))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert locked(tmp_path) == wanted(order, 0, 0)
    prefetch.close()


def test_local_shards_need_nothing(folder: Path, order: SampleOrder) -> None:
    prefetch = ShardPrefetch(ShardSet.open(folder), order)
    before = threading.active_count()
    prefetch.reach(0, 0)
    assert threading.active_count() == before
    assert (prefetch.fetched_shards, prefetch.fetched_bytes) == (0, 0)
    prefetch.close()
