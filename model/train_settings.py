"""How a run trains, checked before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from framestream.pipeline.errors import ConfigError

from .losses import LOSSES


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        steps: optimiser steps in all.
        lr: highest learning rate, reached after the warm-up.
        min_lr_share: the cosine ends at this share of `lr`.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's, on matrices only.
        beta1: AdamW's first moment.
        beta2: AdamW's second moment.
        grad_clip: largest gradient norm; 0 does not clip.
        accumulate: batches per step.
        precision: "fp32", or "bf16" autocast.
        parallel: what several ranks hold: "ddp" the whole model each; "fsdp2" a share each of weights, gradients and
            optimiser state, and a block's weights while it is at work. The steps are the same.
        compile: compile the blocks of the predictor (torch.compile); worth its minutes where batches keep one shape
            and, with the attention backend ranges, one mask pattern.
        feature_cache: folder in which the frozen tower's embeddings of frames are kept; null encodes them anew. It
            takes clips that come back unchanged, so neither `data.augment` nor `data.crop: random`.
        feature_cache_gb: limit of that folder, in 10^9 bytes; what no longer fits is encoded anew. Several runs at the
            same time may exceed it by a twentieth each.
        eval_every: evaluate on held-out clips every so many steps; 0 only after the last one.
        eval_batches: batches per evaluation; null takes all.
        eval_loss: error that evaluations measure, e.g. mse; null takes the model's own loss.
        rollout_steps: frames that an evaluation generates from the model's own output.
        checkpoint_every: save every so many steps; 0 only after the last one.
        keep_last: checkpoints to keep; the best one is kept besides.
        log_every: steps per line of metrics.jsonl.
        tensorboard: also write TensorBoard event files.
        seed: of weights, dropout and whatever else is random in a step.
        threads: of torch on the CPU; 0 leaves its default. On a busy machine one thread is often far faster than two.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
    """

    steps: int = 1000
    lr: float = 3e-4
    min_lr_share: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    compile: bool = False
    feature_cache: str | None = None
    feature_cache_gb: float = 20.0
    eval_every: int = 500
    eval_batches: int | None = None
    eval_loss: str | None = None
    rollout_steps: int = 4
    checkpoint_every: int = 500
    keep_last: int = 2
    log_every: int = 10
    tensorboard: bool = True
    seed: int = 0
    threads: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}.")
        for name in (
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "eval_every",
            "rollout_steps",
            "checkpoint_every",
            "threads",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        if not 0 <= self.min_lr_share <= 1:
            raise ConfigError(f"train.min_lr_share must be between 0 and 1, got {self.min_lr_share}.")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ConfigError(f"train.eval_batches must be at least 1, or null for all, got {self.eval_batches}.")
        if self.eval_loss is not None and self.eval_loss not in LOSSES:
            raise ConfigError(f"train.eval_loss must be one of {', '.join(LOSSES)}, got {self.eval_loss!r}.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"train.lr must be a positive number, got {self.lr}.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"train.precision must be 'fp32' or 'bf16', got {self.precision!r}.")
        if self.parallel not in ("ddp", "fsdp2"):
            raise ConfigError(f"train.parallel must be 'ddp' or 'fsdp2', got {self.parallel!r}.")
        if self.feature_cache is not None and not self.feature_cache.strip():  # the current directory, to a path
            raise ConfigError(f"train.feature_cache must be a folder, or null for none, got {self.feature_cache!r}.")
        if not 0 < self.feature_cache_gb < math.inf:
            raise ConfigError(
                f"train.feature_cache_gb must be a positive number of 10^9 bytes, got {self.feature_cache_gb}."
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (0-based): linear warm-up, then a cosine down to `lr * min_lr_share`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (self.min_lr_share + (1 - self.min_lr_share) * 0.5 * (1 + math.cos(math.pi * share)))
