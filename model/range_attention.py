"""Attention over tiles of allowed pairs with plain scaled-dot-product kernels: no mask tensor, no masked score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from framestream.pipeline.frame_mask import Ranges

from .attention_tiles import Group, Tile, backward_tiles, forward_tiles


class TiledRun(NamedTuple):
    """Clips `first:last` of a batch, which share a pattern, and the calls that compute it."""

    first: int
    last: int
    forward: tuple[Tile, ...]
    backward: tuple[Tile, ...]

    @classmethod
    def of(cls, first: int, last: int, groups: tuple[Group, ...]) -> TiledRun:
        """From the groups of a mask."""
        return cls(first, last, forward_tiles(groups), backward_tiles(groups))


def range_attention(q: Tensor, k: Tensor, v: Tensor, runs: tuple[TiledRun, ...]) -> Tensor:
    """`[B, H, Nq, Dh]` queries over `[B, H, Nk, Dh]` keys and values -> `[B, H, Nq, Dh]`.

    The tiles of each run must hold every query once, forward.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and v.shape[-1] == q.shape[-1]:  # as its kernel wants it
        return _RangeAttention.apply(q, k, v, runs)
    whole = [_run(q[run.first : run.last], k[run.first : run.last], v[run.first : run.last], run) for run in runs]
    return whole[0] if len(whole) == 1 else torch.cat(whole, dim=0)


def _run(q: Tensor, k: Tensor, v: Tensor, run: TiledRun) -> Tensor:
    pieces: list[tuple[int, Tensor]] = []
    for tile in run.forward:
        part = F.scaled_dot_product_attention(taken(q, tile.queries), taken(k, tile.keys), taken(v, tile.keys))
        pieces += [(place.start, piece) for place, piece in _placed(part, tile.queries)]
    in_order = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
    return in_order[0] if len(in_order) == 1 else torch.cat(in_order, dim=2)


def taken(x: Tensor, ranges: Ranges) -> Tensor:
    """Tokens of `ranges` of `x [b, H, N, Dh]` or `[b, H, N]`: a view where there is one range."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _placed(part: Tensor, ranges: Ranges) -> Iterator[tuple[slice, Tensor]]:
    """The reverse of `taken`: what of `part` belongs to which tokens."""
    sizes = [stop - start for start, stop in ranges]
    for (start, stop), piece in zip(ranges, part.split(sizes, dim=2), strict=True):
        yield slice(start, stop), piece


def _put(x: Tensor, ranges: Ranges, part: Tensor) -> None:
    for place, piece in _placed(part, ranges):
        x[:, :, place] = piece


def _add(x: Tensor, ranges: Ranges, part: Tensor) -> None:
    for place, piece in _placed(part, ranges):
        x[:, :, place] += piece


class _RangeAttention(torch.autograd.Function):
    """All tiles as one node of the graph, on the CPU's flash kernels.

    Against one autograd node for each tile this saves the zero-padded gradient that every slice would add to the
    whole of k and v, keeps concatenated keys only while they are used, and lets the backward pass have its own tiles.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: tuple[TiledRun, ...]) -> Tensor:
        scale = 1.0 / math.sqrt(q.shape[-1])
        q, k, v = _last_dense(q), _last_dense(k), _last_dense(v)
        batch, heads, tokens, size = q.shape
        out = q.new_empty(batch, tokens, heads, size).transpose(1, 2)  # so that merging heads is a view
        sums = torch.empty(q.shape[:3], dtype=_sum_dtype(q.dtype), device=q.device)  # log of softmax sums
        for run in runs:
            clips = slice(run.first, run.last)
            for tile in run.forward:
                part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    taken(q[clips], tile.queries),
                    taken(k[clips], tile.keys),
                    taken(v[clips], tile.keys),
                    0.0,
                    False,
                    scale=scale,
                )
                _put(out[clips], tile.queries, part)
                _put(sums[clips], tile.queries, lse)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.runs = runs
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        grad = _last_dense(grads[0])
        scale = 1.0 / math.sqrt(q.shape[-1])
        # Several tiles add to one query or key: in half precision their sum would lose what the kernel kept.
        dq, dk, dv = (torch.zeros_like(x, dtype=sums.dtype) for x in (q, k, v))
        for run in ctx.runs:
            clips = slice(run.first, run.last)
            for tile in run.backward:
                dq_part, dk_part, dv_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    taken(grad[clips], tile.queries),
                    taken(q[clips], tile.queries),
                    taken(k[clips], tile.keys),
                    taken(v[clips], tile.keys),
                    taken(out[clips], tile.queries),
                    taken(sums[clips], tile.queries),
                    0.0,
                    False,
                    scale=scale,
                )
                _add(dq[clips], tile.queries, dq_part)
                _add(dk[clips], tile.keys, dk_part)
                _add(dv[clips], tile.keys, dv_part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
