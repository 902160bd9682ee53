"""A local file that becomes a sample's video as it is: read when its shard is written, a block at a time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from framestream.pipeline.errors import SampleError
from framestream.pipeline.shard_writer import StreamedMember

from .inputs import Source
from .source_file import check_listed, open_regular, unreadable
from .trees import local_version

BLOCK_BYTES = 1 << 20  # of which each is hashed twice and written while it is in the processor's cache


@dataclass(frozen=True)
class WholeFile:
    """A member of a tar (`StreamedMember`) whose bytes stay where they are until it is their turn.

    Attributes:
        num_bytes: of the file.
        sha256: of its bytes when it was looked at, in hexadecimal.
    """

    source: Source
    num_bytes: int
    sha256: str

    def blocks(self) -> Iterator[memoryview]:
        """The bytes, in order; each block is good until the next.

        The file is read and not mapped: a map of somebody's file ends the process when that is cut short.

        Raises:
            SampleError: it cannot be read any more, or is not what was looked at; at the latest behind the last block.
        """
        digest, room, left = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES)), self.num_bytes
        try:
            file, facts = open_regular(self.source.path)
            with file:
                check_listed(self.source, facts.st_size, local_version(facts))
                while size := file.readinto(room[: min(left + 1, BLOCK_BYTES)]):
                    if (left := left - size) < 0:
                        break
                    digest.update(room[:size])
                    yield room[:size]
        except (OSError, ValueError) as err:
            raise unreadable(self.source, err) from err
        if left or digest.hexdigest() != self.sha256:
            raise SampleError(f"{self.source.source} was written to while it was read: it was changed")


@dataclass(frozen=True)
class Stoppable:
    """A streamed member that ends with an error when nobody waits for it any more: a long file takes its time."""

    member: StreamedMember
    stopped: threading.Event

    @property
    def num_bytes(self) -> int:
        return self.member.num_bytes

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Those of the member. Raises InterruptedError when it is stopped."""
        for block in self.member.blocks():
            if self.stopped.is_set():
                raise InterruptedError("stopped")
            yield block
