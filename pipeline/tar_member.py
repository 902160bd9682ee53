"""Reading one member out of an open tar, by its place."""

from __future__ import annotations

import os
import tarfile

from .errors import SampleError
from .shard_index import BLOCK, split_name


def read_member(descriptor: int, path: str, key: str, ext: str, offset: int, size: int) -> bytes:
    """Read a member with the header in front of it, which proves that the index still speaks of this tar."""
    try:
        data = _pread(descriptor, offset - BLOCK, BLOCK + size)
    except OSError as err:
        raise SampleError(f"sample {key!r} of {path}: its .{ext} cannot be read ({err.strerror or err})") from err
    if len(data) < BLOCK + size:
        raise SampleError(f"sample {key!r} of {path}: the shard ends inside its .{ext}, it was cut after indexing")
    try:
        header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as err:
        raise SampleError(f"sample {key!r} of {path}: the tar header of its .{ext} is damaged ({err})") from err
    # A long or non-ASCII name may stand in a header of its own, further ahead; the size is always here.
    plain = key.isascii() and len(header.name) < 100
    if header.size != size or (plain and split_name(header.name) != (key, ext)):
        raise SampleError(
            f"sample {key!r} of {path}: found {header.name!r} where its .{ext} should be; the index belongs to "
            f"another version of the shard, delete it to have it built again"
        )
    return data[BLOCK:]


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]  # one call stops at 2 GiB and may return less for other reasons
    got = len(data)
    while got < size and (data := os.pread(descriptor, size - got, offset + got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)
