"""One process among several: devices, process groups, and the two things that ranks have to agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from framestream.pipeline.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    world: int = 1
    local: int = 0


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" is this rank's CUDA device where there is one, else the CPU. ConfigError when a named one is missing."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    unknown = f"train.device {name!r} is unknown: use auto, cpu, cuda or cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ConfigError(unknown) from err
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(unknown)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {name!r}, but torch sees no CUDA device: use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device is {name!r}, and there are {torch.cuda.device_count()} CUDA devices.")
    return torch.device("cuda", local_rank) if name == "cuda" else device


@contextmanager
def distributed(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group when torchrun started us: nccl for CUDA, gloo for the CPU. Alone: a group of one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))
    target = pick_device(device, ranks.local)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def mean_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    if ranks.world > 1:
        dist.all_reduce(value)
        value /= ranks.world
    return value


def any_rank(flag: bool, device: torch.device, ranks: Ranks) -> bool:
    """Whether any rank was asked to stop: all have to stop at the same step."""
    if ranks.world == 1:
        return flag
    asked = torch.tensor(float(flag), device=device)
    dist.all_reduce(asked)
    return bool(asked.item())
