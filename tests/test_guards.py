"""Guards of the sharding tool: kinds of storage errors, pipes in place of texts, and workers that must not go on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from framestream.pipeline.download import download
from framestream.pipeline.errors import SampleError, ShardError, StorageError, WorkerError
from framestream.pipeline.remote import Remote
from framestream.tools import pool as pool_module
from framestream.tools.inputs import Source, list_inputs
from framestream.tools.pool import WorkerPool
from framestream.tools.source_file import read_text

from pool_tasks import act
from remote_storage import QUICK, http_storage


def answer(status: int) -> aiohttp.ClientResponseError:
    """The error that aiohttp raises for a status."""
    about = aiohttp.RequestInfo(URL("http://h/x"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://h/x"))
    return aiohttp.ClientResponseError(about, (), status=status)


@pytest.mark.parametrize(
    ("url", "error", "kind"),
    [
        ("s3://b/x", ConnectionError("gone"), StorageError),
        ("s3://b/x", TimeoutError("slow"), StorageError),
        ("s3://b/x", PermissionError("no"), StorageError),
        ("http://h/x", answer(503), StorageError),
        ("http://h/x", answer(403), StorageError),
        ("http://h/x", answer(410), ShardError),
        ("http://h/x", answer(416), ShardError),
        ("s3://b/x", IsADirectoryError("a folder"), ShardError),
        ("s3://b/x", ValueError("no such name"), ShardError),
        ("zip://x::file:///a.zip", OSError("damaged"), ShardError),
        ("s3://b/x", FileNotFoundError("x"), FileNotFoundError),
        ("s3://b/x", OSError(errno.ENOSPC, "full"), OSError),
        ("s3://b/x", OSError(errno.EDQUOT, "full"), OSError),
    ],
)
def test_whether_the_storage_is_at_fault_or_the_file(url: str, error: Exception, kind: type[Exception]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(Exception) as told:  # noqa: PT011
        Remote(attempts=2, backoff_s=0.0).call(url, fail)
    assert type(told.value) is kind


def test_a_file_that_is_longer_than_expected_shows_no_secret(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1000)
    (tmp_path / "part").touch()
    with http_storage(tmp_path) as web, pytest.raises(ShardError, match=r"a\.tar has more than the 500") as told:
        download(Remote(**QUICK), f"{web.url}/a.tar?X-Signature=SECRET", tmp_path / "part", 500, None)
    assert "SECRET" not in str(told.value)


def test_a_pipe_beside_a_video_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"x")
    os.mkfifo(tmp_path / "v.txt")
    for listed in (tmp_path, tmp_path / "v.mp4"):
        (source,) = list_inputs([str(listed)])
        assert isinstance(source, Source)
        assert source.text is None
    with pytest.raises(SampleError, match=r"v\.mp4: its text v\.txt cannot be read \(it is no regular file"):
        read_text(Source("v.mp4", "v.mp4", "v", text_file=str(tmp_path / "v.txt")), Remote())


def test_results_that_wait_for_their_turn_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WAITING_BYTES", 0)
    tasks = ["sleep1.0", *"abcdef"]
    with WorkerPool(act, workers=2, timeout_s=30.0, weigh=len) as pool:
        results = pool.map(tasks)
        first = next(results)
        assert len(pool._outcomes) == 1  # the other worker rested, with one result in hand
        assert [first, *results] == [(task, task) for task in tasks]


class Strange:
    """Cannot be made again by who receives it, as after an update of the package in the midst of a run."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_a_worker_of_another_version_ends_the_run() -> None:
    with (
        WorkerPool(act, workers=1, timeout_s=30.0) as pool,
        pytest.raises(WorkerError, match=r"a worker process cannot be told what to do \(ValueError: invalid literal"),
    ):
        list(pool.map(["a", Strange(), "b"]))  # type: ignore[list-item]
