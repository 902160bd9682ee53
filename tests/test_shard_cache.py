"""The folder of cached shards: its bound, its locks, processes that die, disks that are full."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.cache import ShardCache
from framestream.pipeline.errors import ShardError
from framestream.pipeline.shards import ShardSet

from remote_storage import QUICK, Storage, http_storage
from synthetic_shards import clip_key, make_shards

ALL = [clip_key(i) for i in range(8)]
TARS = [f"clips-00000{i}.tar" for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 clips in 4 shards."""
    return make_shards(tmp_path_factory.mktemp("remote"), num_samples=8, samples_per_shard=2)


@pytest.fixture
def web(folder: Path) -> Iterator[Storage]:
    with http_storage(folder) as storage:
        yield storage


@pytest.fixture(scope="module")
def size(folder: Path) -> int:
    """Bytes of the largest shard."""
    return max(path.stat().st_size for path in folder.glob("*.tar"))


def keys(shards: ShardSet) -> list[str]:
    return [shards.read(*shards.locate(i)).key for i in range(shards.num_samples)]


def files(cache: Path) -> list[str]:
    """All files in a cache but the indexes and the lock that is always there."""
    found = {path for path in (cache / "shards").rglob("*") if path.is_file()}
    return sorted(path.name for path in found - {cache / "shards" / "eviction.lock"})


# --- the bound ---------------------------------------------------------------------------------------------------


def test_the_cache_stays_in_its_bounds_and_drops_the_oldest(
    web: Storage, folder: Path, tmp_path: Path, size: int
) -> None:
    cache = ShardCache(tmp_path, limit_bytes=2 * size + 100, **web.cache_settings())
    urls = [f"{web.url}/{name}" for name in TARS]
    held = cache.open(urls[0])
    for url in urls[1:]:
        with cache.open(url) as lease:
            assert os.pread(lease.descriptor, 1 << 20, 0) == (folder / url.rpartition("/")[2]).read_bytes()
        total = sum(path.stat().st_size for path in tmp_path.glob("shards/*/*.tar"))
        assert total <= cache.limit_bytes
    assert files(tmp_path) == [TARS[0], TARS[3]]  # the first is in use
    assert os.pread(held.descriptor, 1 << 20, 0) == (folder / TARS[0]).read_bytes()
    held.close()
    cache.open(urls[1])
    assert TARS[0] not in files(tmp_path)
    assert len(list((tmp_path / "shards").iterdir())) == 3  # the folders of two shards, and the lock


def test_a_set_larger_than_its_cache_is_read_again_and_again(web: Storage, tmp_path: Path) -> None:
    shards = web.open(cache_dir=tmp_path, cache_bytes=1)
    for _ in range(2):
        assert keys(shards) == ALL
    assert web.served() == dict.fromkeys(TARS, 2)
    assert files(tmp_path) == [TARS[3]]


def test_reading_leaves_nothing_locked_and_nothing_open(web: Storage, tmp_path: Path) -> None:
    shards = web.open(cache_dir=tmp_path)
    keys(shards)
    before = len(os.listdir("/proc/self/fd"))
    assert keys(shards) == ALL
    assert len(os.listdir("/proc/self/fd")) == before
    for path in tmp_path.glob("shards/*/*.tar"):
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_must_not_exceed_the_limit_is_not_fetched(web: Storage, tmp_path: Path, size: int) -> None:
    cache = ShardCache(tmp_path, limit_bytes=size + 100, **web.cache_settings())
    with cache.open(f"{web.url}/{TARS[0]}"):
        assert cache.open_within_limit(f"{web.url}/{TARS[1]}") is None
        assert web.served() == {TARS[0]: 1}
        assert files(tmp_path) == [TARS[0]]
        with cache.open(f"{web.url}/{TARS[1]}"):  # what is needed now is fetched whatever the limit says
            assert files(tmp_path) == TARS[:2]
    with cache.open_within_limit(f"{web.url}/{TARS[2]}") as lease:  # type: ignore[union-attr]
        assert not lease.hit
    assert files(tmp_path) == [TARS[2]]


def test_shards_on_their_way_count_in_full(web: Storage, folder: Path, tmp_path: Path, size: int) -> None:
    """Two downloads at once do not both take the same free space."""
    cache = ShardCache(tmp_path, limit_bytes=size + 100, **web.cache_settings())
    web.proxy.inject(TARS[0], "stall")
    web.proxy.stall_s = 1.0
    num_bytes = (folder / TARS[0]).stat().st_size
    thread = threading.Thread(target=lambda: cache.open(f"{web.url}/{TARS[0]}", num_bytes=num_bytes).close())
    thread.start()
    _wait_for(lambda: web.served().get(TARS[0]) == 1)
    assert cache.open_within_limit(f"{web.url}/{TARS[1]}", num_bytes=num_bytes) is None
    thread.join()
    assert files(tmp_path) == [TARS[0]]


def test_threads_share_one_download(web: Storage, tmp_path: Path) -> None:
    shards = web.open(cache_dir=tmp_path)
    web.proxy.inject(".tar", "drip", 4)
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(keys(shards))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ALL] * 6
    assert web.served() == dict.fromkeys(TARS, 1)


def test_who_waits_for_a_shard_gets_it_though_others_keep_it(web: Storage, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, **web.cache_settings())
    web.proxy.inject(TARS[0], "drip")
    together = threading.Barrier(5, timeout=60)
    hits: list[bool] = []

    def open_and_keep() -> None:
        with cache.open(f"{web.url}/{TARS[0]}") as lease:
            together.wait()
            hits.append(lease.hit)

    threads = [threading.Thread(target=open_and_keep) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hits == [False] * together.parties
    assert web.served() == {TARS[0]: 1}


def _read_over_and_over(storage: Storage, folder: Path, rounds: int, seed: int, queue: Any) -> None:
    shards = storage.open(cache_dir=folder, cache_bytes=1)
    seen = []
    for step in range(rounds * shards.num_samples):
        seen.append(shards.read(*shards.locate((step * (2 * seed + 1) + seed) % shards.num_samples)).key)
    queue.put(sorted(seen))


def test_processes_that_evict_each_others_shards_read_right(web: Storage, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_over_and_over, args=(web, tmp_path, 5, seed, queue)) for seed in range(3)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get(timeout=120) == sorted(ALL * 5)
    for child in children:
        child.join()
    assert all(name.endswith(".tar") for name in files(tmp_path))


# --- forks and deaths --------------------------------------------------------------------------------------------


def test_a_child_holds_nothing_that_its_parent_has_let_go(web: Storage, tmp_path: Path) -> None:
    """Neither the lock nor the disk space of a shard that its parent had in use when it was forked."""
    cache = ShardCache(tmp_path, **web.cache_settings())
    url = f"{web.url}/{TARS[0]}"
    lease = cache.open(url)
    done, go = os.pipe()
    child = os.fork()
    if child == 0:
        open_files = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
        os.close(go)
        os.read(done, 1)  # until the parent is ready
        os._exit(1 if any(name.startswith(str(cache.path(url))) for name in open_files) else 0)
    os.close(done)
    lease.close()
    with open(cache.path(url), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(go)
    assert os.waitpid(child, 0)[1] == 0


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


READ = """
import sys
from framestream.pipeline.shards import ShardSet
url, folder, chunk = sys.argv[1:4]
import framestream.pipeline.download
framestream.pipeline.download.CHUNK_BYTES = int(chunk)
shards = ShardSet.open(url, cache_dir=folder, backoff_s=0.001)
print("open", flush=True)
print([shards.read(*shards.locate(i)).key for i in range(shards.num_samples)])
"""


def _start(url: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ, url, str(folder), str(options.pop("chunk", 1 << 24))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_process_killed_in_a_download_leaves_nothing_behind(web: Storage, folder: Path, tmp_path: Path) -> None:
    web.proxy.inject(TARS[1], "stall", skip=1)  # the second range of the second shard
    child = _start(web.url, tmp_path, chunk=12_000)
    _wait_for(lambda: web.served().get(TARS[1]) == 2)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert files(tmp_path) == [TARS[0], f"{TARS[1]}.part"]
    shards = web.open(cache_dir=tmp_path)
    assert shards.read(2, 0).key == ALL[4]  # another shard: the remains are swept
    assert files(tmp_path) == [TARS[0], TARS[2]]
    assert keys(shards) == ALL
    assert files(tmp_path) == TARS
    for path in tmp_path.glob("shards/*/*.tar"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_process_that_ends_while_a_thread_fetches_takes_it_along(web: Storage, tmp_path: Path) -> None:
    web.proxy.inject(TARS[0], "stall")
    program = """
import sys, threading, time, pathlib
from framestream.pipeline.shards import ShardSet
shards = ShardSet.open(sys.argv[1], cache_dir=sys.argv[2])
threading.Thread(target=shards.read, args=(0, 0), daemon=True).start()
while not list(pathlib.Path(sys.argv[2]).rglob("*.part")):
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", program, web.url, str(tmp_path)], check=True, timeout=120)
    assert files(tmp_path) == []


def test_the_remains_of_a_killed_download_are_taken_over(web: Storage, folder: Path, tmp_path: Path) -> None:
    """By whoever waits for the same shard."""
    web.proxy.inject(TARS[0], "stall")
    child = _start(web.url, tmp_path)
    _wait_for(lambda: web.served().get(TARS[0]) == 1)
    results: list[str] = []
    waiting = threading.Thread(target=lambda: results.append(web.open(cache_dir=tmp_path).read(0, 0).key))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    waiting.join(60)
    assert results == [ALL[0]]
    assert files(tmp_path) == [TARS[0]]
    assert next(tmp_path.glob("shards/*/*.tar")).read_bytes() == (folder / TARS[0]).read_bytes()


# --- a disk that is full -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, size: int) -> Iterator[Path]:
    """A file system with room for two shards and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size) // 4096 * 4096}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_made_free_by_eviction(web: Storage, small_disk: Path) -> None:
    shards = web.open(cache_dir=small_disk)  # with a limit far above what the disk holds
    for _ in range(2):
        assert keys(shards) == ALL
    assert len(files(small_disk)) == 2


def test_a_full_disk_that_cannot_be_made_free_is_told(web: Storage, small_disk: Path, size: int) -> None:
    shards = web.open(cache_dir=small_disk)
    leases = [shards.lease(0), shards.lease(1)]
    with pytest.raises(
        ShardError, match=r"does not fit into the shard cache .*/disk .*it needs \d+ bytes, \d+ bytes"
    ) as told:
        shards.read(2, 0)
    assert all(words in str(told.value) for words in ("No space left", TARS[2], "larger disk", "cache_bytes"))
    assert files(small_disk) == TARS[:2]
    assert shards.lease(2, over_limit=False) is None  # fetching ahead of need is no error
    for lease in leases:
        lease.close()  # type: ignore[union-attr]
    assert keys(shards) == ALL


def test_a_disk_that_others_have_filled(web: Storage, small_disk: Path, size: int) -> None:
    shards = web.open(cache_dir=small_disk)
    (small_disk / "other").write_bytes(bytes(2 * size))
    with pytest.raises(ShardError, match="No space left"):
        keys(shards)
    assert files(small_disk) == []
    (small_disk / "other").unlink()
    assert keys(shards) == ALL


def test_a_limit_on_file_sizes_is_told_like_a_full_disk(web: Storage, tmp_path: Path) -> None:
    limit = 20_000
    child = _start(
        web.url,
        tmp_path,
        chunk=8_000,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    out, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert out.strip() == "open"
    assert "ShardError" in err
    assert "File too large" in err
    assert "larger disk" in err
    assert files(tmp_path) == []


def test_a_cache_folder_that_cannot_be_used(web: Storage, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    shards = ShardSet.open(web.url, cache_dir=tmp_path / "cache", **QUICK)
    with pytest.raises(ShardError, match=r"cannot be used .*FRAMESTREAM_CACHE"):
        shards.read(0, 0)


def _wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
