"""Remote shards through the bounded cache: a real server that misbehaves, real processes, real limits."""

from __future__ import annotations

import hashlib
import multiprocessing
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest

from framestream.pipeline.cache import ShardCache
from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.shards import ShardSet

from synthetic_shards import clip_key, make_shards


class Server(socketserver.ThreadingTCPServer):
    """Serves a folder. `faults` maps a path to what goes wrong with its next requests."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.served: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), lambda *a: _Handler(*a, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.served[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else ""
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes() if fault else b""
        if not fault:
            super().do_GET()
        elif fault == "500":
            self.send_error(500)
        else:  # "reset": hang up in the middle; "short": half a body that claims to be whole; "flip": another byte
            body = data if fault == "flip" else data[: len(data) // 2]
            body = body[:-2000] + b"?" + body[-1999:] if fault == "flip" else body
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) if fault == "reset" else len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    make_shards(tmp_path / "remote", num_samples=8, samples_per_shard=2)
    with Server(tmp_path / "remote") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


def keys(shards: ShardSet) -> list[str]:
    return [shards.read(*shards.locate(i)).key for i in range(shards.num_samples)]


def cached(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("shards/*/*.tar"))


ALL = [clip_key(i) for i in range(8)]


def test_a_server_is_read_through_the_cache(server: Server, tmp_path: Path) -> None:
    urls = server.url + "/clips-{000000..000003}.tar"
    shards = ShardSet.open(urls)
    assert shards.fingerprint == ShardSet.open(tmp_path / "remote").fingerprint
    assert not any(path.endswith(".tar") for path in server.served)  # counting needs the index only
    assert keys(shards) == ALL
    assert shards.read(0, 0).shard == server.url + "/clips-000000.tar"
    assert {n for path, n in server.served.items() if path.endswith(".tar")} == {1}
    assert keys(ShardSet.open(urls)) == ALL
    assert {n for path, n in server.served.items() if path.endswith(".tar")} == {1}
    assert cached(tmp_path / "cache") == [f"clips-00000{i}.tar" for i in range(4)]


@pytest.mark.parametrize("fault", ["reset", "short", "flip", "500"])
def test_a_download_that_fails_is_tried_again(server: Server, fault: str) -> None:
    server.faults["/clips-000001.tar"] = [fault]
    assert keys(ShardSet.open(server.url + "/clips-{000000..000003}.tar")) == ALL
    assert server.served["/clips-000001.tar"] == 2


def test_a_download_that_never_works_is_a_shard_error(server: Server, tmp_path: Path) -> None:
    server.faults["/clips-000001.tar"] = ["short"] * 10
    cache = ShardCache(tmp_path / "cache", attempts=3, backoff_s=0.01)
    with pytest.raises(ShardError, match=r"clips-000001\.tar could not be fetched in 3 attempts .*bytes arrived"):
        cache.open(server.url + "/clips-000001.tar")
    assert server.served["/clips-000001.tar"] == 3
    assert cached(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").rglob("*.part"))
    with pytest.raises(ShardError, match="does not exist"):
        cache.open(server.url + "/nothing.tar")


def test_any_fsspec_url_and_tars_without_index(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in make_shards(tmp_path / "s", num_samples=8, samples_per_shard=2).glob("*.tar"):
        memory.pipe_file(f"/foreign/{path.name}", path.read_bytes())
    memory.pipe_file("/cut/x.tar", (tmp_path / "s" / "clips-000000.tar").read_bytes()[:-9000])
    try:
        assert keys(ShardSet.open("memory://foreign")) == ALL
        assert keys(ShardSet.open("memory://foreign/clips-00000[01].tar")) == ALL[:4]
        assert "x.tar" in " ".join(ShardSet.open("memory://cut/x.tar").problems)
        with pytest.raises(ShardError, match=r"no \.tar"):
            ShardSet.open("memory://empty")
        with pytest.raises(ShardError, match="does not exist"):
            ShardSet.open("memory://foreign/nothing.tar")
    finally:
        for folder in ("/foreign", "/cut"):
            memory.rm(folder, recursive=True)


def test_the_cache_stays_in_its_bounds_and_drops_the_oldest(server: Server, tmp_path: Path) -> None:
    size = max(p.stat().st_size for p in (tmp_path / "remote").glob("*.tar"))
    cache = ShardCache(tmp_path / "cache", limit_bytes=2 * size + 100)
    urls = [f"{server.url}/clips-00000{i}.tar" for i in range(4)]
    held = cache.open(urls[0])
    for url in urls[1:]:
        with open(cache.open(url), "rb") as file:
            assert hashlib.sha256(file.read()).digest()
        total = sum(p.stat().st_size for p in (tmp_path / "cache").glob("shards/*/*.tar"))
        assert total <= cache.limit_bytes
    assert cached(tmp_path / "cache") == ["clips-000000.tar", "clips-000003.tar"]  # the first is in use
    with open(held, "rb") as file:
        assert file.read() == (tmp_path / "remote" / "clips-000000.tar").read_bytes()
    cache.open(urls[1])
    assert "clips-000000.tar" not in cached(tmp_path / "cache")


def test_a_set_larger_than_its_cache_is_read_again_and_again(server: Server, tmp_path: Path) -> None:
    shards = ShardSet.open(server.url + "/clips-{000000..000003}.tar", cache_bytes=1)
    for _ in range(2):
        assert keys(shards) == ALL


def _open_and_read(url: str, folder: Path, queue: Any) -> None:
    queue.put(keys(ShardSet.open(url, cache_dir=folder)))


def test_processes_share_one_download(server: Server, tmp_path: Path) -> None:
    """Also after a fork from a process that has an open set, as DataLoader workers are made."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    url = server.url + "/clips-{000000..000003}.tar"
    assert ShardSet.open(url).num_samples == 8
    children = [context.Process(target=_open_and_read, args=(url, tmp_path / "cache", queue)) for _ in range(3)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get(timeout=120) == ALL
    for child in children:
        child.join()
    assert {n for path, n in server.served.items() if path.endswith(".tar")} == {1}


def test_a_shard_that_was_replaced_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    url = server.url + "/clips-000000.tar"
    assert keys(ShardSet.open(url)) == ALL[:2]
    for path in (tmp_path / "remote").iterdir():
        path.unlink()
    make_shards(tmp_path / "remote", num_samples=3, samples_per_shard=3)
    assert keys(ShardSet.open(url)) == ALL[:3]


def test_impossible_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte"):
        ShardCache(tmp_path, limit_bytes=0)
    with pytest.raises(ConfigError, match="nosuch"):
        ShardSet.open("nosuch://x/{0..3}.tar")
