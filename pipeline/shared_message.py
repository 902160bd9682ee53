"""Objects from one process to another over a socket, with the bytes of tensors in shared memory.

A message is a pickle and, where it holds tensors, one anonymous memory file with all of their bytes. The file travels
with the message itself (SCM_RIGHTS, unix(7)), so the receiver needs nothing further of the sender: what was sent
can be used although the sender has died since. Anonymous memory files do not count against the size of /dev/shm,
which containers keep small. Both ends are processes of one loader; nothing from a shard or a file is unpickled.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import socket
import struct
import tempfile
from typing import Any

import torch

from .errors import FramestreamError

_HEAD = struct.Struct("<QQ")  # bytes of the pickle, bytes of the memory file
_ALIGN = 64  # of each tensor in the memory file


class _Pickler(pickle.Pickler):
    """Takes the bytes of plain CPU tensors out of the pickle."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg() or not obj.numel():
            return NotImplemented
        self._tensors.append(obj)
        return _tensor, (len(self._tensors) - 1, obj.dtype, tuple(obj.shape))


class _Unpickler(pickle.Unpickler):
    """Puts tensors together again: views of the memory file, which lives as long as one of them does."""

    def __init__(self, data: bytearray, memory: torch.Tensor | None) -> None:
        super().__init__(io.BytesIO(data))
        self._memory, self._offset = memory, 0

    def find_class(self, module: str, name: str) -> Any:
        return self._view if (module, name) == (__name__, "_tensor") else super().find_class(module, name)

    def _view(self, number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        # In the order of pickling, so that offsets need not be sent.
        assert self._memory is not None
        size = math.prod(shape) * dtype.itemsize
        place = self._memory[self._offset : self._offset + size]
        self._offset += _aligned(size)
        return place.view(dtype).view(shape)


def _tensor(number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    raise pickle.UnpicklingError("a tensor of shared memory was read without its memory")


def send(channel: socket.socket, message: Any) -> None:
    """Send one message. Raises OSError where the other side has gone."""
    tensors: list[torch.Tensor] = []
    file = io.BytesIO()
    _Pickler(file, tensors).dump(message)
    data = file.getbuffer()
    if not tensors:
        channel.sendall(_HEAD.pack(len(data), 0))
        channel.sendall(data)
        return
    descriptor = _memory_file()
    try:
        size = _write(descriptor, tensors)
        # The descriptor goes with the first byte of the head.
        head = _HEAD.pack(len(data), size)
        sent = socket.send_fds(channel, [head], [descriptor])
        channel.sendall(head[sent:])
        channel.sendall(data)
    finally:
        os.close(descriptor)


def receive(channel: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError, OSError: the other side has gone, also in mid-message.
        FramestreamError: this process has no descriptor left to receive with.
    """
    head, descriptors, _, _ = socket.recv_fds(channel, _HEAD.size, 1)
    try:
        if not head:
            raise EOFError("the other side has closed the channel")
        length, size = _HEAD.unpack(head + bytes(_exactly(channel, _HEAD.size - len(head))))
        data = _exactly(channel, length)
        if size and not descriptors:  # the system delivers a message without what does not fit
            raise FramestreamError(
                "The memory of a batch could not be received, because this process has too many files open; allow "
                "more of them (ulimit -n)."
            )
        memory = _mapped(descriptors[0], size) if size else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return _Unpickler(data, memory).load()


def _write(descriptor: int, tensors: list[torch.Tensor]) -> int:
    """Write the tensors one after the other, aligned; return the size. Writing is faster than copying into a map,
    whose every page would be faulted in and cleared first."""
    offset = 0
    for tensor in tensors:
        data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        rest = memoryview(data)
        place, offset = offset, offset + _aligned(len(rest))
        while len(rest):
            written = os.pwrite(descriptor, rest, place)
            rest, place = rest[written:], place + written
    os.ftruncate(descriptor, offset)
    return offset


def _exactly(channel: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while len(rest):
        count = channel.recv_into(rest)
        if not count:
            raise EOFError("the other side has closed the channel in mid-message")
        rest = rest[count:]
    return data


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    """The bytes of a memory file: uint8 [size]."""
    if os.path.exists(f"/proc/self/fd/{descriptor}"):  # Python's own map would keep a descriptor open for each batch
        return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _memory_file() -> int:
    """A descriptor of memory without a name, which ends with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("framestream", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="framestream-")
    os.unlink(path)
    return descriptor


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
