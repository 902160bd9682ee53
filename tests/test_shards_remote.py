"""Remote shards read through the cache, from a web server and from an S3 server, both of which misbehave."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from framestream.pipeline.cache import ShardCache
from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shards import ShardSet

from fault_proxy import running
from remote_storage import Storage, http_storage, s3_request, s3_server, s3_storage, upload
from synthetic_shards import clip_key, make_shards

ALL = [clip_key(i) for i in range(8)]
TARS = [f"clips-00000{i}.tar" for i in range(4)]
RANGE = "clips-{000000..000003}.tar"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 clips in 4 shards. Not to be changed."""
    return make_shards(tmp_path_factory.mktemp("remote"), num_samples=8, samples_per_shard=2)


@pytest.fixture
def folder(shards_folder: Path, tmp_path: Path) -> Path:
    """What is served, to be changed at will."""
    return Path(shutil.copytree(shards_folder, tmp_path / "remote"))


@pytest.fixture(params=["http", "s3"])
def storage(request: pytest.FixtureRequest, folder: Path) -> Iterator[Storage]:
    if request.param == "http":
        with http_storage(folder) as storage:
            yield storage
    else:
        with s3_storage(folder, request.getfixturevalue("s3"), f"set{next(_numbers)}") as storage:
            yield storage


@pytest.fixture
def web(folder: Path) -> Iterator[Storage]:
    with http_storage(folder) as storage:
        yield storage


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


def keys(shards: ShardSet) -> list[str]:
    return [shards.read(*shards.locate(i)).key for i in range(shards.num_samples)]


def cached(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("shards/*/*.tar"))


def leftovers(folder: Path) -> list[str]:
    """What should not be in a cache at rest."""
    known = {folder / "shards" / "eviction.lock"}
    files = {p for p in folder.rglob("*") if p.is_file()} - known
    return sorted(p.name for p in files if not p.name.endswith((".tar", ".idx.json")))


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", RANGE])
def test_a_server_is_read_through_the_cache(storage: Storage, folder: Path, tmp_path: Path, named: str) -> None:
    shards = storage.open(named)
    assert shards.fingerprint == ShardSet.open(folder).fingerprint
    assert storage.served() == {}  # counting needs the index only
    assert keys(shards) == ALL
    assert shards.read(0, 0).shard == f"{storage.url}/{TARS[0]}"
    assert keys(storage.open(named)) == ALL
    assert storage.served() == dict.fromkeys(TARS, 1)
    assert storage.proxy.count(".idx.json") == 4
    assert cached(tmp_path / "cache") == TARS
    assert leftovers(tmp_path / "cache") == []


def test_a_read_tells_whether_it_had_to_wait(storage: Storage, folder: Path) -> None:
    shards = storage.open()
    assert [shards.read(0, i % 2).cached for i in range(3)] == [False, True, True]
    assert storage.open().read(0, 0).cached is True
    assert ShardSet.open(folder).read(0, 0).cached is None
    assert shards.read(0, 0) == shards.read(0, 0)
    assert "cached" not in repr(shards.read(0, 0))


def test_a_shard_that_is_fetched_for_its_index_was_waited_for(web: Storage, folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    shards = web.open()
    shutil.rmtree(tmp_path / "cache")
    assert shards.read(0, 0).cached is False
    assert shards.read(0, 1).cached is True


def test_large_shards_come_in_ranges(storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framestream.pipeline.download.CHUNK_BYTES", 12_000)
    assert keys(storage.open()) == ALL
    for name, count in storage.served().items():
        assert count == -(-(folder / name).stat().st_size // 12_000)
    asked = [r.range for r in storage.proxy.requests if r.path.endswith(TARS[0])]
    assert asked[:2] == ["bytes=0-11999", "bytes=12000-23999"]


def test_opening_costs_a_constant_number_of_requests(s3: str, tmp_path: Path, shards_folder: Path) -> None:
    """Whether a set has 4 shards or 40; `index.json` is all that is read, and a listing."""
    many = tmp_path / "many"
    make_shards(many, num_samples=40, samples_per_shard=1, num_frames=8)
    counts: dict[str, list[int]] = {"http": [], "s3": []}
    for folder in (shards_folder, many):
        with http_storage(folder) as storage:
            assert len(storage.open().names) == len(list(folder.glob("*.tar")))
            counts["http"].append(len(storage.proxy.requests))
        with s3_storage(folder, s3, f"set{next(_numbers)}") as storage:
            assert len(storage.open().names) == len(list(folder.glob("*.tar")))
            counts["s3"].append(len(storage.proxy.requests))
    assert counts["http"][0] == counts["http"][1] <= 4
    assert counts["s3"][0] == counts["s3"][1] <= 4


def test_any_fsspec_url_and_tars_without_index(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in make_shards(tmp_path / "s", num_samples=8, samples_per_shard=2).glob("*.tar"):
        memory.pipe_file(f"/foreign/{path.name}", path.read_bytes())
    memory.pipe_file("/cut/x.tar", (tmp_path / "s" / "clips-000000.tar").read_bytes()[:-12000])
    try:
        assert keys(ShardSet.open("memory://foreign")) == ALL
        assert keys(ShardSet.open("memory://foreign/clips-00000[01].tar")) == ALL[:4]
        assert "x.tar" in " ".join(ShardSet.open("memory://cut/x.tar").problems)
        with pytest.raises(ShardError, match=r"no \.tar"):
            ShardSet.open("memory://empty")
        with pytest.raises(ShardError, match="use num_workers=0"):
            ShardSet.open("memory://foreign/nothing.tar")
    finally:
        for folder in ("/foreign", "/cut"):
            memory.rm(folder, recursive=True)


def test_a_server_that_lists_no_folders_is_opened_by_its_index(web: Storage) -> None:
    for status in ("403", "404", "500"):
        web.proxy.inject("/", status, 4)  # 500: each attempt
        assert keys(web.open()) == ALL


def test_a_listing_and_an_index_that_disagree(storage: Storage, folder: Path, s3: str) -> None:
    """A shard that the index lists and that is gone, and, where the listing tells sizes, one that has changed."""
    content = json.loads((folder / "index.json").read_bytes())
    content["shards"].append({"name": "clips-000009.tar", "samples": 2, "bytes": 10240, "sha256": None})
    content["shards"][1]["bytes"] += 512
    (folder / "index.json").write_text(json.dumps(content))
    tells_sizes = storage.url.startswith("s3")
    if tells_sizes:
        upload(s3, folder, storage.url.rpartition("/")[2])
    problems = storage.open().problems
    assert any("clips-000009.tar is listed" in problem for problem in problems)
    assert any("clips-000001.tar has" in problem for problem in problems) == tells_sizes


# --- tars without index ------------------------------------------------------------------------------------------


def test_indexes_are_read_side_by_side_in_order_and_only_once(storage: Storage, folder: Path, s3: str) -> None:
    (folder / "index.json").unlink()
    if storage.url.startswith("s3"):
        s3_request(s3, "DELETE", f"/{storage.url.rpartition('/')[2]}/index.json")
    shards = storage.open()
    assert shards.sizes == (2, 2, 2, 2)
    assert [path.rpartition("/")[2] for path in shards.paths] == TARS
    assert storage.served() == {}
    assert storage.proxy.count(".idx.json") == 4
    assert storage.open().fingerprint == shards.fingerprint
    assert storage.proxy.count(".idx.json") == 4  # kept in the cache
    assert keys(shards) == ALL


def test_an_interrupted_opening_goes_on_where_it_was(web: Storage, folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    web.proxy.inject(TARS[3], "500", 4)
    with pytest.raises(ShardError, match=r"clips-000003\.tar could not be fetched in 4 attempts"):
        web.open()
    before = web.served()
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 3
    assert keys(web.open()) == ALL
    assert web.served() == {**before, TARS[3]: before[TARS[3]] + 1}


def test_problems_of_foreign_shards_come_in_their_order(web: Storage, folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    for name in TARS[:3]:
        (folder / name).write_bytes((folder / name).read_bytes()[:-12000])
    shards = web.open()
    named = [next(name for name in TARS if name in problem) for problem in shards.problems]
    assert named == sorted(named)
    assert set(named) == set(TARS[:3])
    assert web.open().problems == shards.problems


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "chunk"),
    [(fault, None) for fault in ("refuse", "reset", "cut", "short", "flip", "drip", "500", "503", "429", "whole")]
    + [(fault, 12_000) for fault in ("reset", "cut", "short", "flip", "503", "whole")],
)
def test_a_download_that_goes_wrong_ends_well(
    storage: Storage, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, chunk: int | None
) -> None:
    """Whole shards and shards in ranges; the second of them fails where there are several."""
    monkeypatch.setattr("framestream.pipeline.download._without_ranges", set())
    if chunk:
        monkeypatch.setattr("framestream.pipeline.download.CHUNK_BYTES", chunk)
    shards = storage.open()
    storage.proxy.inject(TARS[1], fault, 1, skip=1 if chunk else 0)
    assert keys(shards) == ALL
    assert sum(bool(r.fault) for r in storage.proxy.requests) == 1
    assert cached(tmp_path / "cache") == TARS
    for path in (tmp_path / "cache").glob("shards/*/*.tar"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert leftovers(tmp_path / "cache") == []
    chunks = -(-(folder / TARS[1]).stat().st_size // chunk) if chunk else 1
    # A broken range costs that range; a wrong checksum costs the file, a server without ranges too.
    extra = {"drip": 0, "flip": chunks, "whole": 3 - chunks if chunk else 0}.get(fault, 1)
    assert storage.served()[TARS[1]] == chunks + extra


def test_a_server_without_ranges_is_asked_for_whole_files_from_then_on(
    storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framestream.pipeline.download.CHUNK_BYTES", 12_000)
    monkeypatch.setattr("framestream.pipeline.download._without_ranges", set())
    storage.proxy.inject(".tar", "whole", 1000)
    assert keys(storage.open()) == ALL
    assert storage.served() == {TARS[0]: 2, **dict.fromkeys(TARS[1:], 1)}


def test_a_server_that_stalls_is_given_up_and_asked_again(storage: Storage) -> None:
    storage.proxy.inject(TARS[1], "stall")
    assert keys(storage.open(stall_s=0.5)) == ALL
    assert storage.served()[TARS[1]] == 2


def test_faults_while_opening(storage: Storage) -> None:
    storage.proxy.inject("index.json", "503")
    storage.proxy.inject("index.json", "reset")
    storage.proxy.inject("index.json", "short")  # looks like a damaged index
    for path in ("/", "bucket"):  # the listing
        storage.proxy.inject(path, "500")
    shards = storage.open()
    assert shards.problems == ()
    assert storage.served() == {}
    storage.proxy.inject(".idx.json", "short")
    assert keys(shards) == ALL


@pytest.mark.parametrize(
    ("fault", "words", "asked"),
    [
        ("short", r"could not be fetched in 3 attempts .*bytes arrived", 3),
        ("500", r"could not be fetched in 3 attempts", 3),
        ("flip", r"could not be fetched in 3 attempts .*sha256 is not the one in index\.json", 3),
        ("403", "check access rights", 1),
        ("404", "does not exist: check the address", 1),
    ],
)
def test_a_download_that_never_works_is_a_shard_error(
    storage: Storage, tmp_path: Path, fault: str, words: str, asked: int
) -> None:
    shards = storage.open(attempts=3)
    storage.proxy.inject(TARS[1], fault, 100)
    assert shards.read(0, 0).key == ALL[0]
    with pytest.raises(ShardError, match=rf"{TARS[1]} .*{words}"):
        shards.read(1, 0)
    assert storage.served()[TARS[1]] == asked
    assert cached(tmp_path / "cache") == TARS[:1]
    assert leftovers(tmp_path / "cache") == []


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with running(_server(tmp_path)) as server:
        url = server.url
    with pytest.raises(ShardError, match="could not be fetched in 2 attempts"):
        ShardSet.open(f"{url}/x.tar", attempts=2, backoff_s=0.001)


def _server(folder: Path) -> Any:
    from fault_proxy import RangeServer

    return RangeServer(folder)


def test_trouble_while_asking_for_a_size_is_not_taken_for_a_missing_shard(web: Storage, tmp_path: Path) -> None:
    """fsspec's HTTP file system says "not found" for any failure of `info`."""
    cache = ShardCache(tmp_path / "cache", **web.cache_settings(attempts=2))
    url = f"{web.url}/{TARS[0]}"
    for method in ("HEAD", "GET"):
        web.proxy.inject(TARS[0], "500", 2, method=method)
    with pytest.raises(ShardError, match="could not be fetched in 2 attempts"):
        cache.open(url)
    for method in ("HEAD", "GET"):
        web.proxy.inject(TARS[0], "403", 1, method=method)
    with pytest.raises(ShardError, match="check access rights"):
        cache.open(url)
    with pytest.raises(ShardError, match="does not exist"):
        cache.open(web.url + "/nothing.tar")
    with cache.open(url) as lease:
        assert lease.num_bytes > 0


def test_a_file_longer_than_its_index_says(storage: Storage, folder: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", **storage.cache_settings())
    size = (folder / TARS[0]).stat().st_size
    with pytest.raises(ShardError, match="its index is stale"):
        cache.open(f"{storage.url}/{TARS[0]}", num_bytes=size - 512)


# --- processes, versions, settings -------------------------------------------------------------------------------


def _open_and_read(storage: Storage, folder: Path, queue: Any) -> None:
    queue.put(keys(storage.open(RANGE, cache_dir=folder)))


def test_processes_share_one_download(storage: Storage, tmp_path: Path) -> None:
    """Also after a fork from a process that has an open set, as DataLoader workers are made."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    assert storage.open().num_samples == 8
    children = [context.Process(target=_open_and_read, args=(storage, tmp_path / "cache", queue)) for _ in range(3)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get(timeout=120) == ALL
    for child in children:
        child.join()
    # The servers run in this process, so what they recorded is seen here.
    assert storage.served() == dict.fromkeys(TARS, 1)


def test_a_pickled_set_goes_on_reading(storage: Storage) -> None:
    assert keys(pickle.loads(pickle.dumps(storage.open()))) == ALL


@pytest.mark.parametrize("same_size", [False, True])
def test_a_shard_that_was_replaced_is_fetched_anew(web: Storage, folder: Path, same_size: bool) -> None:
    assert keys(web.open(TARS[0])) == ALL[:2]
    for path in folder.iterdir():
        path.unlink()
    make_shards(folder, num_samples=2 if same_size else 3, samples_per_shard=3, num_frames=16 if same_size else 32)
    if same_size:  # what differs is the checksum
        video = (folder / TARS[0]).read_bytes()
        assert web.open(TARS[0]).read(0, 0).video in video
    else:
        assert keys(web.open(TARS[0])) == ALL[:3]


def test_impossible_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte"):
        ShardCache(tmp_path, limit_bytes=0)
    for settings in ({"attempts": 0}, {"backoff_s": -1}, {"stall_s": 0}):
        with pytest.raises(ConfigError, match="at least 1 attempt"):
            Remote(**settings)
    with pytest.raises(ConfigError, match="nosuch"):
        ShardSet.open("nosuch://x/{0..3}.tar")
    for url in ("filecache::http://x/a.tar", "simplecache::s3://x/{0..3}.tar", "reference://x/*.tar"):
        with pytest.raises(ConfigError, match="may run what its files or options hold"):
            ShardSet.open(url)


def test_options_of_the_user_win() -> None:
    import aiohttp

    own = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=7)}}
    assert Remote(own).filesystem("http://127.0.0.1:1/x")[0].client_kwargs == own["client_kwargs"]
    ours = Remote(stall_s=9).filesystem("http://127.0.0.1:1/x")[0].client_kwargs["timeout"]
    assert (ours.total, ours.sock_read, ours.sock_connect) == (None, 9, 9)
    pytest.importorskip("s3fs")
    fs = Remote({"config_kwargs": {"read_timeout": 3}}).filesystem("s3://bucket/x")[0]
    assert (fs.config_kwargs, fs.retries) == ({"read_timeout": 3}, 5)
    fs = Remote(stall_s=9).filesystem("s3://bucket/x")[0]
    assert (fs.config_kwargs["read_timeout"], fs.retries) == (9, 1)
