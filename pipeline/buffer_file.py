"""A file that lies in memory, without a copy of it."""

from __future__ import annotations

import io
import os
from typing import BinaryIO, cast


def buffer_file(data: bytes | memoryview) -> BinaryIO:
    """A file to read `data` from. `io.BytesIO` copies whatever is not `bytes`, as an hour of video in a memory map."""
    return io.BytesIO(data) if isinstance(data, bytes) else cast("BinaryIO", _ViewFile(data))


class _ViewFile(io.RawIOBase):
    """Reads from a view, and gives it back when closed."""

    def __init__(self, data: memoryview) -> None:
        self._view = data[:]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        stop = len(self._view) if size < 0 else self._at + size
        part = bytes(self._view[self._at : stop])
        self._at += len(part)
        return part

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._view)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._view.release()
        super().close()
