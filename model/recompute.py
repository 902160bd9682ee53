"""A cheap step and the matrix product behind it, where the backward pass computes the cheap step again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(cheap: nn.Module, product: nn.Module, x: Tensor) -> Tensor:
    """`product(cheap(x))` that keeps `x` for the backward pass, and not what the product takes in.

    The product itself is not repeated: recomputation ends as soon as everything is there that the backward pass asks
    for (non-reentrant checkpointing, with early stop). The weights are those of the forward pass, also where a module's
    are swapped for a call. Layers that somebody has replaced, wrapped or hooked (LoRA, quantisation) are called as they
    are, and keep what they keep: what they do may be random, or more than a product. A compiler decides by itself.

    Raises:
        RuntimeError: in the backward pass, where a weight was changed in place since the forward pass.
    """
    plain = _untouched(product, nn.Linear) and (_untouched(cheap, nn.LayerNorm) or _untouched(cheap, nn.GELU))
    if not plain or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return product(cheap(x))
    weights = (product.weight, product.bias, *((cheap.weight, cheap.bias) if isinstance(cheap, nn.LayerNorm) else ()))
    versions = [weight._version for weight in weights if weight is not None]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *norm: Tensor | None) -> Tensor:
        if [w._version for w in (weight, bias, *norm) if w is not None] != versions:
            raise RuntimeError("a weight of the predictor was changed in place between forward and backward pass")
        if isinstance(cheap, nn.LayerNorm):
            made = F.layer_norm(x, cheap.normalized_shape, norm[0], norm[1], cheap.eps)
        else:
            made = cheap(x)  # a GELU, which has no weights
        return F.linear(made, weight, bias)

    return checkpoint(run, x, *weights, use_reentrant=False, preserve_rng_state=False)


def _untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of a kind, so that its weights are all there is to it."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and not any(hooks)
