"""Reading one member out of an open tar, by its place: whole, or only some of its bytes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from typing import Protocol

from .errors import SampleError
from .file_parts import FileParts
from .shard_index import BLOCK, split_name


class OpenFile(Protocol):
    """A file that stays open for as long as somebody refers to this."""

    descriptor: int


class StoredMember:
    """A member that has not been read yet. It belongs to its process, and cannot be pickled.

    Raises:
        SampleError: when made, where the header in front of it does not prove that the index still speaks of this tar.
    """

    def __init__(self, file: OpenFile, path: str, key: str, ext: str, offset: int, size: int) -> None:
        self._file, self._path, self._key, self._ext, self._offset, self._size = file, path, key, ext, offset, size
        self._check_header()

    def __len__(self) -> int:
        """Its bytes."""
        return self._size

    def __reduce__(self) -> str:
        raise TypeError("a member that has not been read yet cannot be sent to another process; read it first")

    def read(self) -> bytes:
        """All of it. Raises SampleError where it cannot be read."""
        return self._read(0, self._size)

    def read_parts(self, ranges: Iterable[range]) -> FileParts:
        """The bytes of `ranges` alone; raises as `read`."""
        return FileParts(self._size, [(part.start, self._read(part.start, len(part))) for part in ranges])

    def _read(self, start: int, size: int) -> bytes:
        name = f"sample {self._key!r} of {self._path}"
        try:
            data = _pread(self._file.descriptor, self._offset + start, size)
        except OSError as err:
            raise SampleError(f"{name}: its .{self._ext} cannot be read ({err.strerror or err})") from err
        if len(data) < size:
            raise SampleError(f"{name}: the shard ends inside its .{self._ext}, it was cut after indexing")
        return data

    def _check_header(self) -> None:
        name = f"sample {self._key!r} of {self._path}"
        try:
            header = tarfile.TarInfo.frombuf(self._read(-BLOCK, BLOCK), "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError) as err:
            raise SampleError(f"{name}: the tar header of its .{self._ext} is damaged ({err})") from err
        # A long or non-ASCII name may stand in a header of its own, further ahead; the size is always here.
        plain = self._key.isascii() and len(header.name) < 100
        if header.size != self._size or (plain and split_name(header.name) != (self._key, self._ext)):
            raise SampleError(
                f"{name}: found {header.name!r} where its .{self._ext} should be; the index belongs to another version "
                "of the shard, delete it to have it built again"
            )


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset) if size else b""
    if len(data) == size or not data:
        return data
    parts = [data]  # one call stops at 2 GiB and may return less for other reasons
    got = len(data)
    while got < size and (data := os.pread(descriptor, size - got, offset + got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)
