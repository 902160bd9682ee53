"""`framestream shard --engine ray` on a Ray of this machine: the same bytes, and what a lost process costs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framestream.pipeline.errors import ConfigError
from framestream.tools.shard_job import Part
from framestream.tools.shard_options import Cutting, Encoding, ShardOptions
from framestream.tools.shard_run import build_shards

from shard_setup import make_folder, tree

psutil = pytest.importorskip("psutil")

OPTIONS = ShardOptions(
    samples_per_shard=3, cutting=Cutting(clip_seconds=0.5), encoding=Encoding(short_side=48), val_share=0.5
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos") / "in")


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference") / "out"
    build_shards([str(videos)], folder, OPTIONS, workers=2)
    return tree(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_makes_the_same_bytes(videos: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    build_shards([str(videos)], tmp_path / "out", OPTIONS, engine="ray")
    assert tree(tmp_path / "out") == reference
    build_shards([str(videos)], tmp_path / "out", OPTIONS, workers=1)  # and another engine finds nothing to do
    assert tree(tmp_path / "out") == reference


@pytest.mark.usefixtures("cluster")
def test_a_lost_ray_process_costs_its_shard_a_second_try(
    videos: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        """End the first two processes that make a shard."""
        until = time.monotonic() + 120
        while len(killed) < 2 and time.monotonic() < until:
            for process in psutil.process_iter(["name", "cmdline"]):
                if "ray::_write" in " ".join(process.info["cmdline"] or []) and process.pid not in killed:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    report = build_shards([str(videos)], tmp_path / "out", OPTIONS, engine="ray")
    thread.join()
    assert len(killed) == 2
    assert report.clips["rejected"] == 0
    assert tree(tmp_path / "out") == reference


def test_ray_without_ray_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"framestream\[ray\]"):
        build_shards([str(tmp_path)], tmp_path / "out", engine="ray")


def test_a_part_is_one_of_so_many() -> None:
    assert Part.parse("3/8") == (3, 8)
    for text in ("0/8", "9/8", "3", "3/", "-1/8", "a/b", "1/0"):
        with pytest.raises(ConfigError, match="such as 3/8"):
            Part.parse(text)
