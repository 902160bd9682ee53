"""How far a predicted patch embedding is from the true one. One number for each patch, mean over its channels."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _mse(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().mean(-1)


def _l1(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs().mean(-1)


def _smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)


def _cosine(predicted: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predicted, target, dim=-1)


# `[..., D]`, `[..., D]` -> `[...]`, in float32 whatever comes in.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mse,
    "l1": _l1,
    "smooth_l1": _smooth_l1,
    "cosine": _cosine,
}


def patch_error(predicted: Tensor, target: Tensor, loss: str) -> Tensor:
    """Error of each patch: `[..., D]` and `[..., D]` to float32 `[...]`."""
    return LOSSES[loss](predicted.float(), target.float())
