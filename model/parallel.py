"""A module on several ranks: whole on each (DDP), or in shares (FSDP2); and its blocks compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ranks import Ranks

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction


def parallel(module: AutoregressiveReconstruction, kind: str, ranks: Ranks, device: torch.device) -> nn.Module:
    """What to call for the loss on one of several ranks; the module itself where there is one.

    Args:
        module: with the same weights on every rank.
        kind: "ddp", or "fsdp2", which turns parameters into shares in place: make the optimiser afterwards.
    """
    if ranks.world == 1:
        return module
    if kind == "ddp":
        devices = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Keys and values that blocks return are views; nobody changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Times stay float32: half precision cannot tell neighbouring frames apart.
    options: Any = {
        "mesh": init_device_mesh(device.type, (ranks.world,)),
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
    }
    if module.config.rollout_steps:
        # A rollout calls the predictor once more for each frame, on those ranks only whose clips are long enough. Each
        # call of a sharded part is a collective, which all ranks have to make: so the whole step is one.
        fully_shard(module, **options)
        return module
    for block in module.predictor.blocks:
        fully_shard(block, **options)
    fully_shard(module.predictor, **options)
    return module


def _sharded(module: nn.Module) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether this rank holds shares, so that whole tensors take all ranks."""
    return bool(_sharded(module))


@contextmanager
def sync_gradients(model: nn.Module, last_part: bool) -> Iterator[None]:
    """Ranks add up their gradients in the last accumulation part only."""
    for part in _sharded(model):
        part.set_requires_gradient_sync(last_part, recurse=False)
    quiet: AbstractContextManager[Any] = nullcontext()
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last_part:
        quiet = model.no_sync()
    with quiet:
        yield


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Every rank holds all weights, so that ranks may call parts of the module in their own way, without gradients."""
    parts = _sharded(module)
    inner = parts[1:]  # the outermost one keeps its weights after a forward pass anyway
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)


def whole(value: Tensor) -> Tensor:
    """A tensor from the ranks' shares of it, which all of them have to ask for; a plain tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def share(value: Any, like: Tensor) -> Any:
    """This rank's share of a tensor, as it has one of the parameter `like`; anything else as it is."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def compile_blocks(module: AutoregressiveReconstruction) -> None:
    """Compile each block of the predictor in place: names of parameters stay, and equal blocks share their code."""
    for block in module.predictor.blocks:
        block.compile()


def eager() -> AbstractContextManager[Any]:
    """Run compiled blocks as they are written."""
    return torch.compiler.set_stance("force_eager")
