"""Training from object storage that misbehaves: the stream is the local one, clip for clip and pixel for pixel."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_proxy import FAULTS
from loader_setup import make_loader, stream
from remote_storage import Storage, http_storage, s3_server, s3_storage
from synthetic_shards import make_shards

SHARDS, EACH, WINDOW = 8, 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 shards of 6 clips each."""
    return make_shards(
        tmp_path_factory.mktemp("remote"), num_samples=SHARDS * EACH, samples_per_shard=EACH, num_frames=12
    )


@pytest.fixture(scope="module")
def size(folder: Path) -> int:
    """Bytes of the largest shard."""
    return max(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.fixture(params=["s3", "http"])
def storage(request: pytest.FixtureRequest, folder: Path) -> Iterator[Storage]:
    if request.param == "http":
        with http_storage(folder) as storage:
            yield storage
        return
    pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    with s3_server() as server, s3_storage(folder, server, "train") as storage:
        yield storage


def spoil(storage: Storage, folder: Path) -> None:
    """Something else goes wrong with each shard, and with the indexes."""
    faults = [fault for fault in FAULTS if fault != "stall"] + ["500", "503"]
    for path, fault in zip(sorted(folder.glob("*.tar")), faults, strict=False):
        storage.proxy.inject(path.name, fault, 2)
    storage.proxy.inject(".idx.json", "reset", 3)
    storage.proxy.inject(".idx.json", "503", 3)


def test_two_workers_and_every_fault(storage: Storage, folder: Path, tmp_path: Path, size: int) -> None:
    local = make_loader(folder, window_shards=WINDOW)
    expected = [stream(local) for _ in range(2)]
    spoil(storage, folder)
    shards = storage.open(cache_dir=tmp_path, cache_bytes=2 * WINDOW * size)
    loader = make_loader(shards, window_shards=WINDOW, num_workers=2)
    try:
        assert [stream(loader) for _ in range(2)] == expected
    finally:
        loader.close()
    assert sum(bool(request.fault) for request in storage.proxy.requests) >= 2 * SHARDS
    assert loader.stats()["rejects"] == 0


def _train(rank: int, storage: Storage, cache: Path, limit: int, barrier: Any, results: Any) -> None:
    """One rank of two in step with each other, as gradients keep them."""
    shards = storage.open(cache_dir=cache, cache_bytes=limit)
    loader = make_loader(
        shards, window_shards=WINDOW, num_workers=1, prefetch_factor=1, rank=rank, world_size=2, drop_last=False
    )

    def in_step() -> Iterator[dict[str, Any]]:
        for batch in loader:
            barrier.wait(60)
            yield batch

    streams = [stream(in_step()) for _ in range(2)]
    loader.close()
    results.put((rank, streams))


def test_two_ranks_share_one_bounded_cache(storage: Storage, folder: Path, tmp_path: Path, size: int) -> None:
    expected = {}
    for rank in range(2):
        local = make_loader(folder, window_shards=WINDOW, rank=rank, world_size=2, drop_last=False)
        expected[rank] = [stream(local) for _ in range(2)]
    assert expected[0] != expected[1]
    spoil(storage, folder)
    limit = 2 * WINDOW * size
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [
        context.Process(target=_train, args=(rank, storage, tmp_path, limit, barrier, results)) for rank in range(2)
    ]
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], _bytes_in(tmp_path))

    watching = threading.Thread(target=watch)
    for child in children:
        child.start()
    watching.start()
    try:
        got = dict(results.get(timeout=200) for _ in children)
        for child in children:
            child.join(60)
    finally:
        done.set()
        watching.join()
        for child in children:
            child.kill()
    assert got == expected
    assert limit // 2 < most[0] <= limit + WINDOW * size  # beyond the limit only what workers read ahead of the ranks
    assert sum(storage.served().values()) < 2 * 2 * SHARDS + 4 * SHARDS  # two epochs, and the faults
    # What the ranks were fetching for a third epoch when they ended is swept by whoever fetches next.
    small = storage.open(cache_dir=tmp_path, cache_bytes=1)
    assert [small.read(shard, 0).key for shard in range(SHARDS)]
    assert not list(tmp_path.rglob("*.part"))


def _bytes_in(cache: Path) -> int:
    total = 0
    for folder, _, names in os.walk(cache / "shards"):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
