"""Objects from one process to another over a socket, with the bytes of large tensors in shared memory.

A message is a pickle and, for each large tensor in it, an anonymous memory file. The files travel with the message
itself (SCM_RIGHTS, unix(7)), so the receiver needs nothing further of the sender: what was sent can be used although
the sender has died since. Anonymous memory files do not count against the size of /dev/shm, which containers keep
small. Both ends are processes of one loader; nothing from a shard or a file is unpickled.
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
from functools import partial
from typing import Any

import torch

from .errors import FramestreamError

_HEAD = struct.Struct("<QQ")  # bytes of the pickle, number of memory files
_LARGE = 1 << 16  # bytes; smaller tensors stay in the pickle, so that keeping one does not keep a memory file
_MOST_FILES = 200  # of one message; the system allows 253


class _Pickler(pickle.Pickler):
    """Takes the bytes of plain CPU tensors out of the pickle where they are many."""

    def __init__(self, file: io.BytesIO, large: list[torch.Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._large = large

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg():
            return NotImplemented
        if obj.nbytes < _LARGE or len(self._large) == _MOST_FILES:
            return _small, (bytes(_bytes_of(obj)), obj.dtype, tuple(obj.shape))
        self._large.append(obj)
        return _mapped, (len(self._large) - 1, obj.dtype, tuple(obj.shape))


class _Unpickler(pickle.Unpickler):
    """Puts tensors together again. A large one is a view of its memory file, which ends with it."""

    def __init__(self, data: bytearray, descriptors: list[int]) -> None:
        super().__init__(io.BytesIO(data))
        self._descriptors = descriptors

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != (__name__, "_mapped"):
            return super().find_class(module, name)
        # No method: what was found is kept here, and a cycle would keep all that was unpickled.
        return partial(_map, self._descriptors)


def _map(descriptors: list[int], number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    descriptor, size = descriptors[number], math.prod(shape) * dtype.itemsize
    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):  # Python's own map would keep a descriptor open for as long as the tensor lives
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    else:
        memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    return memory.view(dtype).view(shape)


def _mapped(number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    raise pickle.UnpicklingError("a tensor of shared memory was read without its memory")


def _small(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def send(channel: socket.socket, message: Any) -> None:
    """Send one message. Raises OSError where the other side has gone."""
    large: list[torch.Tensor] = []
    file = io.BytesIO()
    _Pickler(file, large).dump(message)
    data = file.getbuffer()
    head = _HEAD.pack(len(data), len(large))
    descriptors: list[int] = []
    try:
        for tensor in large:
            descriptors.append(_memory_file())
            _write(descriptors[-1], tensor)
        # Descriptors go with the first byte of the head.
        sent = socket.send_fds(channel, [head], descriptors) if descriptors else 0
        channel.sendall(head[sent:])
        channel.sendall(data)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def receive(channel: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError, OSError: the other side has gone, also in mid-message.
        FramestreamError: this process has no descriptor left to receive with.
    """
    head, descriptors, _, _ = socket.recv_fds(channel, _HEAD.size, _MOST_FILES)
    try:
        if not head:
            raise EOFError("the other side has closed the channel")
        length, count = _HEAD.unpack(head + bytes(_exactly(channel, _HEAD.size - len(head))))
        data = _exactly(channel, length)
        if len(descriptors) < count:  # the system delivers a message without what does not fit
            raise FramestreamError(
                "The memory of a batch could not be received, because this process has too many files open; allow "
                "more of them (ulimit -n)."
            )
        return _Unpickler(data, descriptors).load()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _write(descriptor: int, tensor: torch.Tensor) -> None:
    """Writing is faster than copying into a map, whose every page would be faulted in and cleared first."""
    rest = _bytes_of(tensor)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def _exactly(channel: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while len(rest):
        count = channel.recv_into(rest)
        if not count:
            raise EOFError("the other side has closed the channel in mid-message")
        rest = rest[count:]
    return data


def _memory_file() -> int:
    """A descriptor of memory without a name, which ends with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("framestream", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="framestream-")
    os.unlink(path)
    return descriptor
