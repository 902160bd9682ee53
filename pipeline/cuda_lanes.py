"""CUDA streams for the threads of a loader, and how what they make gets to the training step safely.

Each thread launches on a stream of its own. Otherwise all would share the default stream with the training step: a
resize would wait for the step's kernels, and the step for the resize. Two things have to be seen to then.

- *Order.* A tensor may be read on another stream only when what fills it is done. A thread waits for its stream before
  it lets go of a result (`settle`); it is the thread that waits, not the training step, and what is handed over can be
  read on any stream. Readers launch on the stream that is current where they are called (TorchCodec does, and orders
  NVDEC's own streams before it), so that this covers decoding as well.
- *Memory.* PyTorch's allocator gives memory back to the stream that it was allocated on, at once when the last
  reference goes: the next clip would overwrite a batch that the step has let go of and that its kernels still read.
  `record_stream` tells the allocator who else uses it (`hand_over`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Lanes:
    """One CUDA stream for each thread of a loader, by number; without a device there are none and nothing happens.

    They are kept from one loop to the next: memory stays with the stream that it was allocated on, so that new streams
    for each epoch would take new memory for each epoch.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._streams: dict[int, torch.cuda.Stream] = {}

    def enter(self, number: int) -> None:
        """Have the calling thread launch on its own stream of the loader's device from now on."""
        if self._device is None:
            return
        torch.cuda.set_device(self._device)  # the current device is each thread's own, and 0 at first
        stream = self._streams.get(number)
        if stream is None:
            stream = self._streams[number] = torch.cuda.Stream(self._device)
        torch.cuda.set_stream(stream)

    def settle(self) -> None:
        """Wait until all that the calling thread has launched on its stream is done."""
        if self._device is None:
            return
        done = torch.cuda.Event(blocking=True)  # asleep, not in a loop: cores are for decoding
        done.record()
        done.synchronize()

    def hand_over(self, batch: Mapping[str, Any]) -> None:
        """The calling thread's stream uses the tensors of `batch` from now on."""
        if self._device is None:
            return
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(torch.cuda.current_stream(value.device))
