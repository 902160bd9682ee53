"""`framestream shard` from object storage to object storage, with requests that fail in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.errors import ConfigError, ShardError, StorageError
from framestream.pipeline.shards import ShardSet
from framestream.tools import shard_run
from framestream.tools.cli import main
from framestream.tools.inspect_splits import open_splits
from framestream.tools.shard_job import Part, Unfinished
from framestream.tools.shard_options import Cutting, Encoding, ShardOptions
from framestream.tools.shard_run import build_shards, run, shard_job

from remote_storage import Storage, s3_server, s3_storage
from shard_setup import make_folder, tree, write_jsonl

OPTIONS = ShardOptions(
    samples_per_shard=3, cutting=Cutting(clip_seconds=0.5), encoding=Encoding(short_side=48), val_share=0.5
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos") / "in")


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is made of the same videos in a local folder."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    build_shards([str(videos)], folder, OPTIONS, workers=1)
    return tree(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    with s3_server() as address:
        yield address


@pytest.fixture
def storage(
    server: str, videos: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Storage]:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))
    with s3_storage(videos, server, f"{request.node.name}/videos") as storage:
        yield storage


def out_of(storage: Storage) -> str:
    return storage.url.rpartition("/")[0] + "/out"


def stored(storage: Storage) -> dict[str, bytes]:
    """All objects of the output, but for the plan."""
    import s3fs

    fs = s3fs.S3FileSystem(**storage.options)
    fs.invalidate_cache()
    root = out_of(storage).removeprefix("s3://")
    names = {name.removeprefix(root + "/"): name for name in fs.find(root)}
    return {short: fs.cat_file(name) for short, name in names.items() if short != ".plan.sqlite"}


def same_samples(objects: dict[str, bytes], reference: dict[str, bytes]) -> None:
    assert objects.keys() == reference.keys()
    for name, data in objects.items():
        assert data == reference[name], name


def test_a_bucket_becomes_the_shards_that_a_folder_becomes(
    storage: Storage, reference: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["shard", storage.url, "--output", out_of(storage), "--storage-options", json.dumps(storage.options)]
    argv += [
        "--clip-seconds",
        "0.5",
        "--short-side",
        "48",
        "--samples-per-shard",
        "3",
        "--val-share",
        "0.5",
        "--workers",
        "1",
        "--log",
        "json",
    ]
    assert main(argv) == 0
    end = json.loads(capsys.readouterr().out)
    assert end["inputs"]["found"] == 4
    same_samples(stored(storage), reference)
    shards = ShardSet.open(f"{out_of(storage)}/train", storage_options=storage.options)
    assert len(shards) == end["splits"]["train"]["samples"]


@pytest.mark.slow
def test_requests_that_fail_are_tried_again(storage: Storage, reference: dict[str, bytes]) -> None:
    storage.proxy.inject("a.mp4", "503", 2)
    storage.proxy.inject("b.c%20d.MOV", "cut", 1)
    for name in ("clips-000000.tar", "clips-000000.idx.json", "index.json", ".plan.sqlite"):
        storage.proxy.inject(name, "503", 1, method="PUT")
    build_shards([storage.url], out_of(storage), OPTIONS, workers=1, storage_options=storage.options)
    same_samples(stored(storage), reference)


def test_what_is_stored_is_kept_and_the_rest_made(storage: Storage, reference: dict[str, bytes]) -> None:
    settings: dict[str, Any] = {"workers": 1, "storage_options": storage.options}
    job = shard_job(out_of(storage), OPTIONS, **settings)
    with job.alone():
        planned = run(job, [storage.url], plan_only=True)
    assert isinstance(planned, Unfinished)
    elsewhere = shard_job(out_of(storage), OPTIONS, work=storage.folder.parent / "another-machine", **settings)
    with elsewhere.alone(Part(1, 2)):
        half = run(elsewhere, [], part=Part(1, 2))
    assert half == Unfinished((planned.num_shards + 1) // 2, planned.num_shards)
    written: list[str] = []
    job.progress = lambda step, done, total, rejects: written.append(f"{step} {done}/{total}")
    with job.alone():
        run(job, [storage.url])
    assert not any(line.startswith(("listing", "probing", "writing 0/")) for line in written)
    same_samples(stored(storage), reference)


def test_a_source_that_cannot_be_fetched_is_no_reject_and_comes_the_next_time(
    storage: Storage, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_run, "ATTEMPTS", 2)
    settings: dict[str, Any] = {"workers": 1, "storage_options": storage.options}
    storage.proxy.inject("a.mp4", "503", 2)
    with pytest.raises(StorageError, match=r"1 sources could not be fetched; the first: .*a\.mp4"):
        build_shards([storage.url], out_of(storage), OPTIONS, **settings)
    job = shard_job(out_of(storage), OPTIONS, **settings)
    with job.alone():
        run(job, [storage.url], plan_only=True)
    storage.proxy.inject("a.mp4", "503", 2)
    with pytest.raises(StorageError, match=r"shards could not be made; the first: .*a\.mp4"):
        build_shards([storage.url], out_of(storage), OPTIONS, **settings)
    assert "report.json" not in stored(storage)
    build_shards([storage.url], out_of(storage), OPTIONS, **settings)
    same_samples(stored(storage), reference)


def test_with_reject_unfetched_it_is_a_reject(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_run, "ATTEMPTS", 2)
    storage.proxy.inject("a.mp4", "503", 99)
    report = build_shards(
        [storage.url], out_of(storage), OPTIONS, workers=1, storage_options=storage.options, reject_unfetched=True
    )
    assert report.inputs["rejected"] == 2
    assert any("could not be fetched" in reject["reason"] for reject in report.rejects)


def test_a_plan_whose_publication_was_cut_off_is_published_the_next_time(storage: Storage) -> None:
    job = shard_job(out_of(storage), OPTIONS, workers=1, storage_options=storage.options)
    with job.alone():
        run(job, [storage.url], plan_only=True)
        job.output.remove(".plan.sqlite")  # as if it had been killed before
        run(job, [storage.url], plan_only=True)
    assert ".plan.sqlite" in job.output.sizes("")
    other = shard_job(out_of(storage) + "2", OPTIONS, workers=1, storage_options=storage.options)
    assert other.place.folder != job.place.folder


@pytest.mark.slow  # eight attempts, each after a longer wait
def test_storage_that_stays_away_is_a_sentence(storage: Storage) -> None:
    storage.proxy.inject("clips-000000.tar", "503", 1000, method="PUT")
    with pytest.raises(ShardError, match=r"clips-000000\.tar could not be written in 8 attempts"):
        build_shards([storage.url], out_of(storage), OPTIONS, workers=1, storage_options=storage.options)
    assert "report.json" not in stored(storage)


def test_where_objects_are_not_whole_files_are_moved_into_place(
    videos: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    build_shards([str(videos)], "memory://moved/out", OPTIONS, workers=1)
    names = {name.removeprefix("/moved/out/"): name for name in fs.find("/moved/out")}
    assert names.pop(".plan.sqlite")
    same_samples({short: fs.cat_file(name) for short, name in names.items()}, reference)


def test_whole_files_go_to_remote_shards_side_by_side(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of two splits with the same name are made at the same time."""
    import fsspec

    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))
    options = ShardOptions(samples_per_shard=1, val_share=0.5)
    build_shards([str(videos)], tmp_path / "out", options, workers=2)
    build_shards([str(videos)], "memory://copies/out", options, workers=2)
    local, fs = tree(tmp_path / "out"), fsspec.filesystem("memory")
    names = {name.removeprefix("/copies/out/"): name for name in fs.find("/copies/out")}
    assert names.pop(".plan.sqlite")
    assert {"train/clips-000000.tar", "val/clips-000000.tar"} <= set(names)
    assert {short: fs.cat_file(name) for short, name in names.items() if not short.endswith("report.json")} == {
        short: data for short, data in local.items() if not short.endswith("report.json")
    }


def test_a_bucket_that_does_not_exist_is_known_before_anything_is_listed(storage: Storage) -> None:
    steps = []
    with pytest.raises(ConfigError, match=r"nothing can be written to s3://nosuchbucket/out .*: check that the bucket"):
        build_shards(
            [storage.url], "s3://nosuchbucket/out", workers=1, storage_options=storage.options,
            progress=lambda step, *_: steps.append(step),
        )  # fmt: skip
    assert steps == []


def test_a_remote_set_is_inspected_by_the_folders_that_it_has(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))
    rows = [{"path": str(videos / "a.mp4"), "split": split} for split in ("train", "validation", "test")]
    rows = [{**row, "note": n} for n, row in enumerate(rows)]
    build_shards([str(write_jsonl(tmp_path / "m.jsonl", rows))], tmp_path / "out", workers=1)
    build_shards([str(tmp_path / "m.jsonl")], "memory://named/out", workers=1)
    for place in ("memory://named/out", f"file://{tmp_path}/out", str(tmp_path / "out")):
        assert [split.name for split in open_splits([place])] == ["test", "train", "validation"]


def test_no_room_for_temporary_files_is_said_of_them(videos: Path, tmp_path: Path) -> None:
    """And not of the output, where nothing is wrong."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes((videos / "a.mp4").read_bytes() + bytes(3 << 20))
    code = """
import resource, signal
from framestream.tools.shard_run import build_shards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
build_shards(["in"], "memory://full/out", workers=1)
"""
    (tmp_path / "tmp").mkdir()
    own = {"FRAMESTREAM_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("framestream.pipeline.errors.ConfigError")
    assert f"{tmp_path / 'tmp'} has no room for clips-000000.tar" in last
    assert list((tmp_path / "tmp").iterdir()) == []
