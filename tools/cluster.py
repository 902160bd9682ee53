"""What a training run asks of machines, by arithmetic: time, decoding cores, bytes, what gives out first (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from framestream.pipeline.errors import ConfigError

from .scaling import FLOAT, StepSize


@dataclass(frozen=True)
class Node:
    """A machine, as assumed. The defaults are no measurement: put your own figures here.

    Attributes:
        gpus: GPUs.
        peak_flops: operations a second that the maker states for one GPU; by default for dense bf16 on an H100 SXM.
        utilisation: share of these that training reaches.
        decode_cores: processor cores that are free to decode.
        storage_bytes_s: bytes a second that object storage gives this machine.
        link_bytes_s: bytes a second that it sends to other machines.

    Raises:
        ConfigError: a figure that is not positive, or a utilisation above 1.
    """

    gpus: int = 8
    peak_flops: float = 989e12
    utilisation: float = 0.3
    decode_cores: int = 96
    storage_bytes_s: float = 2.5e9
    link_bytes_s: float = 25e9

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.utilisation > 1:
            raise ConfigError(f"utilisation is {self.utilisation:g}; it is a share of peak_flops, at most 1.")


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        size: a step on one GPU.
        tower_flops: operations of the frozen tower for one frame; 0 = none.
        clips: clips to train on.
        clip_bytes: mean bytes of a clip in its shard.
        clips_per_core: clips a second that one core decodes; see `framestream doctor --loader`.

    Raises:
        ConfigError: a figure that is not positive.
    """

    size: StepSize
    tower_flops: float = 0
    clips: int = 10_000_000
    clip_bytes: float = 312_500
    clips_per_core: float = 17.7

    def __post_init__(self) -> None:
        _check_positive(self, besides=("size", "tower_flops"))
        if self.tower_flops < 0:
            raise ConfigError(f"tower_flops is {self.tower_flops:g}; it cannot be negative.")

    def clip_flops(self) -> float:
        """Operations for one clip: predictor, forward and backward, and tower, forward."""
        return self.size.flops().total / self.size.clips + self.size.frames * self.tower_flops


@dataclass(frozen=True)
class Needs:
    """What a job needs on some nodes, and what they can give.

    Attributes:
        steps: optimiser steps for all clips, of `size.clips` on each GPU.
        step_s: seconds of one step, if nothing but the GPUs takes time.
        clips_s: clips a second with which all GPUs are busy.
        hours: for all clips at that speed.
        decode_cores_per_gpu: cores that decode so many.
        storage_bytes_s: bytes a second from storage to each node. Ranks share every batch, and so every window of
            shards: each machine fetches all shards, those of other machines' clips too.
        link_bytes_s: bytes a second of gradients out of each node; 0 with one node.
        gpu_bytes: weights, gradients and optimiser state of the predictor, and the peak of a step, on each GPU. The
            tower's weights come on top.
        checkpoint_bytes: of one checkpoint.
        limits: clips a second of all nodes that each part could sustain, the first to give out first.
    """

    steps: int
    step_s: float
    clips_s: float
    hours: float
    decode_cores_per_gpu: float
    storage_bytes_s: float
    link_bytes_s: float
    gpu_bytes: int
    checkpoint_bytes: int
    limits: dict[str, float]

    @property
    def first_limit(self) -> str:
        """What gives out first."""
        return next(iter(self.limits))


def needs(job: Job, node: Node, nodes: int = 1) -> Needs:
    """What `job` needs on `nodes` machines like `node`, trained with DDP.

    Raises:
        ConfigError: less than one node.
    """
    if nodes < 1:
        raise ConfigError(f"nodes is {nodes}, it has to be at least 1.")
    gpus = nodes * node.gpus
    per_gpu = node.peak_flops * node.utilisation / job.clip_flops()
    # A ring of all GPUs enters and leaves each machine once; every gradient goes round almost twice.
    gradients = 2 * (nodes - 1) / nodes * FLOAT * job.size.parameters()
    sent_per_clip = gradients / (gpus * job.size.clips)  # bytes out of each node for one clip of the run
    limits = {
        "GPUs": gpus * per_gpu,
        "decoding": nodes * node.decode_cores * job.clips_per_core,
        "storage": node.storage_bytes_s / job.clip_bytes,
        "gradients": node.link_bytes_s / sent_per_clip if sent_per_clip else math.inf,
    }
    return Needs(
        steps=math.ceil(job.clips / (gpus * job.size.clips)),
        step_s=job.size.clips / per_gpu,
        clips_s=gpus * per_gpu,
        hours=job.clips / (gpus * per_gpu) / 3600,
        decode_cores_per_gpu=per_gpu / job.clips_per_core,
        storage_bytes_s=gpus * per_gpu * job.clip_bytes,
        link_bytes_s=gpus * per_gpu * sent_per_clip,
        gpu_bytes=job.size.state_bytes() - FLOAT * job.size.parameters() + job.size.peak_bytes(),
        checkpoint_bytes=job.size.checkpoint_bytes(),
        limits=dict(sorted(limits.items(), key=lambda item: item[1])),
    )


def _check_positive(value: Job | Node, besides: tuple[str, ...] = ()) -> None:
    for name, figure in vars(value).items():
        if name not in besides and not 0 < figure < math.inf:
            raise ConfigError(f"{name} is {figure:g}; it has to be positive and finite.")
