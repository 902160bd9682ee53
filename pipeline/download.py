"""One file from remote storage into one local file, whole and checked, or an error."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .errors import ShardError
from .redaction import shown_url
from .remote import GiveUpError, Remote

CHUNK_BYTES = 16 << 20  # asked for at once: what a broken connection costs, and what is in memory


_without_ranges: set[str] = set()  # servers, as met by this process


class _NoRangesError(GiveUpError):
    """The server sent more than was asked for."""


class _BadContentError(Exception):
    """The bytes are not the ones that were expected; another download may bring the right ones."""


def download(remote: Remote, url: str, part: Path, num_bytes: int | None, sha256: str | None) -> int:
    """Write the bytes of `url` into the file `part`, which exists, and return how many they are.

    They come in ranges that are retried one by one, so that a broken connection costs one range; from servers
    that know no ranges or tell no size they come in one piece. Size and sha256 are checked where they are given, on
    the way, and a file that turns out wrong is fetched anew.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: it cannot be fetched, or is another one than expected.
        OSError: the local disk is full (`remote.disk_full`), or `part` cannot be written.
    """
    server = "/".join(url.split("/", 3)[:3])

    def once() -> int:
        if num_bytes is not None and server not in _without_ranges:
            try:
                return _in_ranges(remote, url, part, num_bytes, sha256)
            except _NoRangesError:
                _without_ranges.add(server)
        return _whole(remote, url, part, num_bytes, sha256)

    return remote.call(url, once)


def _in_ranges(remote: Remote, url: str, part: Path, num_bytes: int, sha256: str | None) -> int:
    fs, path = remote.filesystem(url)
    digest = hashlib.sha256()
    with open(part, "r+b", buffering=0) as file:
        for start in range(0, num_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, num_bytes)
            # One byte more than there should be, at the end: a file that is longer than expected shows itself.
            asked = stop + (stop == num_bytes)

            def chunk(start: int = start, stop: int = stop, asked: int = asked) -> bytes:
                data: bytes = fs.cat_file(path, start=start, end=asked)
                if len(data) > asked - start:
                    raise _NoRangesError
                if len(data) < stop - start:
                    raise OSError(f"{start + len(data)} of {num_bytes} bytes arrived")
                return data

            data = remote.call(url, chunk)
            if len(data) > stop - start:
                raise ShardError(
                    f"{shown_url(url)} has more than the {num_bytes} bytes that were expected: its index is stale"
                )
            digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        file.truncate(num_bytes)
        _check_sha(digest.hexdigest(), sha256)
        os.fsync(file.fileno())
    return num_bytes


def _whole(remote: Remote, url: str, part: Path, num_bytes: int | None, sha256: str | None) -> int:
    fs, path = remote.filesystem(url)

    def fetch() -> int:
        fs.get_file(path, str(part))
        size = part.stat().st_size
        if num_bytes is not None and size != num_bytes:
            raise OSError(f"{size} of {num_bytes} bytes arrived")
        return size

    size = remote.call(url, fetch)
    with open(part, "rb", buffering=0) as file:
        if sha256 is not None:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
            while got := file.readinto(buffer):
                digest.update(buffer[:got])
            _check_sha(digest.hexdigest(), sha256)
        os.fsync(file.fileno())
    return size


def _check_sha(got: str, expected: str | None) -> None:
    if expected is not None and got != expected:
        raise _BadContentError("its sha256 is not the one in index.json")
