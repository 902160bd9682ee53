"""Attention of frames to frames, computed only where the mask allows it.

Three ways to the same numbers. `ranges` runs plain scaled-dot-product attention on the key slices that each group
of query tokens may see, so that no mask tensor exists and no masked score is computed; `flex` hands torch's
FlexAttention a precomputed block mask; `dense` is the reference with a boolean `[N, N]` mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.masks import FrameMask

BACKENDS = ("auto", "ranges", "dense", "flex")

# One group of queries that see the same keys: (q_start, q_stop, ((k_start, k_stop), ...)), in tokens.
Group = tuple[int, int, tuple[tuple[int, int], ...]]
# Neighbouring clips of one pattern: (first clip, one past the last clip, their groups).
Run = tuple[int, int, tuple[Group, ...]]


class AttentionPlan(NamedTuple):
    """What a mask means for one batch on one device. Made once, used by every layer."""

    backend: str
    runs: tuple[Run, ...] = ()  # for "ranges"
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
        return AttentionPlan("ranges", runs=_runs(mask, batch_size, token_causal), token_causal=token_causal)
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


@lru_cache(maxsize=256)
def _runs(mask: FrameMask, batch_size: int, per_frame: bool) -> tuple[Run, ...]:
    plans = [tuple((g.start, g.stop, tuple(g.keys)) for g in groups) for groups in mask.ranges()]
    if per_frame:
        plans = [_split_groups(plan, pattern.offsets()) for plan, pattern in zip(plans, mask.patterns, strict=True)]
    clips = mask.clips if mask.clips is not None else (0,) * batch_size
    runs: list[Run] = []
    first = 0
    for clip in range(1, batch_size + 1):
        if clip == batch_size or clips[clip] != clips[first]:
            runs.append((first, clip, plans[clips[first]]))
            first = clip
    return tuple(runs)


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
        return _assemble(q, k, v, plan.runs, _token_causal_group)
    if q.device.type == "cpu" and torch.is_grad_enabled():
        return _RangeAttention.apply(q, k, v, plan.runs)
    return _assemble(q, k, v, plan.runs, _plain_group)


def _slices(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """Tokens of `ranges` of `x [b, H, N, Dh]`: a view where there is one range."""
    parts = [x[:, :, a:b] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _plain_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _token_causal_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # The frame's own tokens are the last of its keys: [n, K] with a triangle at the end, never [N, N].
    n, length = q.shape[2], k.shape[2]
    allowed = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def _assemble(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    outs = []
    for first, last, groups in runs:
        kr, vr, qr = k[first:last], v[first:last], q[first:last]
        parts = [attend(qr[:, :, a:b], _slices(kr, keys), _slices(vr, keys)) for a, b, keys in groups]
        outs.append(torch.cat(parts, dim=2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=0)


class _RangeAttention(torch.autograd.Function):
    """All groups as one node of the graph, on the CPU's flash kernels.

    Against one autograd node for each group this saves the zero-padded gradient that every slice would add to the
    whole of k and v, and keeps concatenated keys only while they are used.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> Tensor:
        scale = 1.0 / math.sqrt(q.shape[-1])
        q, k, v = _last_dense(q), _last_dense(k), _last_dense(v)
        out = torch.empty_like(q)
        sums = torch.empty(q.shape[:3], dtype=_sum_dtype(q.dtype), device=q.device)  # log of softmax sums
        for first, last, groups in runs:
            kr, vr = k[first:last], v[first:last]
            for a, b, keys in groups:
                part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[first:last, :, a:b], _slices(kr, keys), _slices(vr, keys), 0.0, False, scale=scale
                )
                out[first:last, :, a:b] = part
                sums[first:last, :, a:b] = lse
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.runs = runs
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        grad = _last_dense(grads[0])
        scale = 1.0 / math.sqrt(q.shape[-1])
        # Many groups add to one key: in half precision their sum would lose what the kernel kept.
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=sums.dtype), torch.zeros_like(v, dtype=sums.dtype)
        for first, last, groups in ctx.runs:
            kr, vr, dkr, dvr = k[first:last], v[first:last], dk[first:last], dv[first:last]
            for a, b, keys in groups:
                dq_part, dk_part, dv_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad[first:last, :, a:b],
                    q[first:last, :, a:b],
                    _slices(kr, keys),
                    _slices(vr, keys),
                    out[first:last, :, a:b],
                    sums[first:last, :, a:b],
                    0.0,
                    False,
                    scale=scale,
                )
                dq[first:last, :, a:b] = dq_part
                at = 0
                for start, stop in keys:
                    dkr[:, :, start:stop] += dk_part[:, :, at : at + stop - start]
                    dvr[:, :, start:stop] += dv_part[:, :, at : at + stop - start]
                    at += stop - start
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
