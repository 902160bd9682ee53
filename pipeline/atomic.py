"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMP_SUFFIX = ".tmp"  # of every unfinished file, so that what a killed process left behind can be swept up


def fsync(path: Path) -> None:
    """Make a file's bytes, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file under a temporary name that takes its own name when the block ends without an error."""
    # Random, too: processes of two machines that share a disk may have the same numbers.
    own = f"{os.getpid()}-{threading.get_native_id()}-{os.urandom(4).hex()}"
    temporary = path.with_name(f".{path.name}.{own}{TEMP_SUFFIX}")
    file = open(temporary, "wb")  # noqa: SIM115  (closed below on both ways out)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # it writes what is buffered, which a full disk refuses once more
            file.close()
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)
