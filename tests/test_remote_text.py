"""A text beside a remote video may be as long as one beside a local one, and is not fetched whole to find that out."""

from __future__ import annotations

from pathlib import Path

import pytest

from framestream.pipeline.errors import StorageError
from framestream.pipeline.remote import Remote
from framestream.tools.remote_text import read_at_most

from remote_storage import QUICK, http_storage

LIMIT = 1000


@pytest.mark.parametrize("ranges", [True, False])
def test_no_more_than_may_be(tmp_path: Path, ranges: bool) -> None:
    for name, size in (("none", 0), ("most", LIMIT), ("more", LIMIT + 1), ("film", 64 << 20)):
        with open(tmp_path / f"{name}.txt", "wb") as file:
            file.truncate(size)
    with http_storage(tmp_path) as server:
        if not ranges:
            server.proxy.inject(".txt", "whole", 99)
        remote = Remote(**QUICK)
        assert read_at_most(f"{server.url}/none.txt", remote, LIMIT) == b""
        assert len(read_at_most(f"{server.url}/most.txt", remote, LIMIT)) == LIMIT
        for name in ("more", "film"):
            with pytest.raises(ValueError, match="more than 1000 bytes"):
                read_at_most(f"{server.url}/{name}.txt", remote, LIMIT)
        with pytest.raises(FileNotFoundError):
            read_at_most(f"{server.url}/gone.txt", remote, LIMIT)


def test_faults_are_tried_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a text")
    with http_storage(tmp_path) as web:
        web.proxy.inject("a.txt", "503", 2)
        assert read_at_most(f"{web.url}/a.txt", Remote(**QUICK), LIMIT) == b"a text"
        web.proxy.inject("a.txt", "503", 99)
        with pytest.raises(StorageError, match=r"a\.txt could not be fetched in 4 attempts"):
            read_at_most(f"{web.url}/a.txt", Remote(**QUICK), LIMIT)
