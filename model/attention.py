"""Attention of frames to frames, computed only where the mask allows it.

Three ways to the same numbers. `ranges` runs plain scaled-dot-product attention on rectangles of allowed pairs, so that
no mask tensor exists and no masked score is computed; `flex` hands torch's
FlexAttention a precomputed block mask; `dense` is the reference with a boolean `[N, N]` mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.masks import FrameMask

from .attention_tiles import Group
from .range_attention import TiledRun, range_attention, taken

Value = TypeVar("Value")

BACKENDS = ("auto", "ranges", "dense", "flex")

# Neighbouring clips of one pattern: (first clip, one past the last clip, their groups).
Run = tuple[int, int, tuple[Group, ...]]


class AttentionPlan(NamedTuple):
    """What a mask means for one batch on one device. Made once, used by every layer."""

    backend: str
    runs: tuple[Run, ...] = ()  # for "ranges"
    tiles: tuple[TiledRun, ...] = ()  # what these runs mean for the kernels
    bias: Tensor | None = None  # for "dense": bool [N, N] or [B, 1, N, N]
    block_mask: Any = None  # for "flex"
    token_causal: bool = False  # inside a frame, a token sees only itself and those before it


def choose_backend(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """The backend that `backend` stands for: `auto` is `flex` on CUDA where its kernel can run, else `ranges`.

    Raises:
        ConfigError: unknown name.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown attention backend {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    # The Triton kernel of FlexAttention wants heads of at least 16 and has no double precision.
    flex_fits = device.type == "cuda" and head_dim >= 16 and dtype != torch.float64
    return "flex" if flex_fits else "ranges"


@torch.compiler.disable
def plan_attention(
    mask: FrameMask,
    batch_size: int,
    device: torch.device | str,
    backend: str = "ranges",
    *,
    token_causal: bool = False,
) -> AttentionPlan:
    """Turns a mask into what `backend` works from (`auto` must have been resolved by `choose_backend`).

    Args:
        mask: unbatched, or with as many clips as the batch.
        batch_size: clips in the batch.
        device: where queries and keys live.
        backend: "ranges", "dense" or "flex".
        token_causal: additionally order the tokens inside each frame. The mask must then let each frame see
            itself last, as `frame_causal` does. Not for "flex".

    Raises:
        ConfigError: the mask has another number of clips, or `flex` is asked for with `token_causal`.
    """
    if mask.batch_size is not None and mask.batch_size != batch_size:
        raise ConfigError(
            f"the frame mask is for {mask.batch_size} clips and the batch has {batch_size}: "
            "use an unbatched mask, or one row for each clip"
        )
    if backend == "ranges":
        return ranges_plan(_runs(mask, batch_size, token_causal), token_causal=token_causal)
    if backend == "dense":
        allowed = mask.dense(device)
        if token_causal:
            allowed = allowed & torch.ones(allowed.shape[-2:], dtype=torch.bool, device=device).tril()
        return AttentionPlan("dense", bias=allowed, token_causal=token_causal)
    if backend == "flex":
        if token_causal:
            raise ConfigError("token-level causal attention needs the backend 'ranges' or 'dense', not 'flex'")
        return AttentionPlan("flex", block_mask=mask.block_mask(device))
    raise ConfigError(f"unknown attention backend {backend!r}: use one of ranges, dense, flex")


def ranges_plan(runs: tuple[Run, ...], *, token_causal: bool = False) -> AttentionPlan:
    """The plan for `ranges` from runs of one's own: with a KV cache, queries and keys count from different places."""
    tiles = () if token_causal else tuple(TiledRun.of(first, last, groups) for first, last, groups in runs)
    return AttentionPlan("ranges", runs=runs, tiles=tiles, token_causal=token_causal)


@lru_cache(maxsize=256)
def _runs(mask: FrameMask, batch_size: int, per_frame: bool) -> tuple[Run, ...]:
    plans = [tuple((g.start, g.stop, tuple(g.keys)) for g in groups) for groups in mask.ranges()]
    if per_frame:
        plans = [_split_groups(plan, pattern.offsets()) for plan, pattern in zip(plans, mask.patterns, strict=True)]
    clips = mask.clips if mask.clips is not None else (0,) * batch_size
    return tuple((first, last, plans[pattern]) for first, last, pattern in equal_runs(clips))


def equal_runs(values: Sequence[Value]) -> list[tuple[int, int, Value]]:
    """Neighbouring equal values as one: (first, one past the last, value)."""
    runs: list[tuple[int, int, Value]] = []
    for place, value in enumerate(values):
        if runs and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], place + 1, value)
        else:
            runs.append((place, place + 1, value))
    return runs


def _split_groups(groups: tuple[Group, ...], bounds: tuple[int, ...]) -> tuple[Group, ...]:
    """The same groups cut at the frames' bounds, each with its own frame as the last of its keys."""
    cut: list[Group] = []
    for start, stop, keys in groups:
        for a, b in pairwise(bounds):
            if start <= a < stop:
                if keys[-1][1] != b:
                    raise ConfigError("token-level causal attention needs a mask whose frames see themselves last")
                cut.append((a, b, keys))
    return tuple(cut)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | AttentionPlan, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention under a frame mask.

    Args:
        q: `[B, H, N, Dh]` queries. With a plan of one's own, fewer than the keys (KV cache).
        k: `[B, H, N, Dh]` keys.
        v: `[B, H, N, Dh]` values.
        mask: which frame sees which, `[F, F]` or `[B, F, F]`; or the plan made from it, to make it only once.
        backend: "auto" (flex on CUDA, ranges elsewhere), "ranges", "dense" or "flex". Ignored with a plan.

    Returns:
        `[B, H, N, Dh]` in the dtype of the inputs, or of autocast where that is on.

    Raises:
        ConfigError: unknown backend; mask and batch disagree; flex asked to train on a CPU.
    """
    if isinstance(mask, AttentionPlan):
        plan = mask
    else:
        if mask.num_tokens != q.shape[2] or mask.num_tokens != k.shape[2]:
            raise ConfigError(
                f"the frame mask is for {mask.num_tokens} tokens, the queries have {q.shape[2]} "
                f"and the keys {k.shape[2]}"
            )
        plan = plan_attention(mask, q.shape[0], q.device, choose_backend(backend, q.device, q.shape[-1], q.dtype))
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if plan.backend == "dense":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.bias)
    if plan.backend == "flex":
        return _flex(q, k, v, plan.block_mask)
    if plan.token_causal:
        return _token_causal(q, k, v, plan.runs)
    return range_attention(q, k, v, plan.tiles or tuple(TiledRun.of(*run) for run in plan.runs))


def _token_causal(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> Tensor:
    outs = []
    for first, last, groups in runs:
        kr, vr, qr = k[first:last], v[first:last], q[first:last]
        parts = [_token_causal_group(qr[:, :, a:b], taken(kr, keys), taken(vr, keys)) for a, b, keys in groups]
        outs.append(torch.cat(parts, dim=2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=0)


def _token_causal_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # The frame's own tokens are the last of its keys: [n, K] with a triangle at the end, never [N, N].
    n, length = q.shape[2], k.shape[2]
    allowed = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Static shapes: with dynamic ones the mask rule's tables break at the second sequence length.
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and needs_grad:
        raise ConfigError("FlexAttention has no backward pass on the CPU: use the backend 'ranges'")
    if q.device.type == "cpu":  # it refuses tensors that could need gradients even where none are recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=block_mask)
    return _compiled_flex()(q, k, v, block_mask=block_mask)
