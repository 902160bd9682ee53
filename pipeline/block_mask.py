"""FlexAttention's `BlockMask` straight from a frame matrix.

`torch.nn.attention.flex_attention.create_block_mask` evaluates its rule on all N x N token pairs. Frames are
long runs of tokens that are treated alike, so whether a block of tokens is empty, partial or full follows from
the few frames that it touches: `searchsorted` finds them, 2-D prefix sums over the frame matrix count them. That
is O((N / block)^2 + F^2) time and memory for an equal result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from .errors import ConfigError

if TYPE_CHECKING:
    from .frame_mask import FrameMask, FramePattern


class FrameMaskMod:
    """The element rule of a frame mask: a class, not a closure, so that it pickles.

    Attributes:
        frame_of_token: int32 `[P, N]` for P patterns.
        matrix: bool `[P, F, F]`.
        pattern_of_clip: int32 `[B]`; None where one pattern serves every clip, whatever the batch size.
    """

    def __init__(
        self, frame_of_token: torch.Tensor, matrix: torch.Tensor, pattern_of_clip: torch.Tensor | None
    ) -> None:
        self.frame_of_token = frame_of_token
        self.matrix = matrix
        self.pattern_of_clip = pattern_of_clip

    def __call__(self, b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        p = b * 0 if self.pattern_of_clip is None else self.pattern_of_clip[b]
        return self.matrix[p, self.frame_of_token[p, q_idx], self.frame_of_token[p, kv_idx]]


def mask_mod(mask: FrameMask, device: torch.device | str = "cpu") -> FrameMaskMod:
    """The rule `(b, h, q_idx, kv_idx) -> bool` of a mask, with its tables on `device`."""
    frame_of_token = np.stack([np.repeat(np.arange(len(p.lengths), dtype=np.int32), p.lengths) for p in mask.patterns])
    batch = _batch_patterns(mask)
    return FrameMaskMod(
        torch.from_numpy(frame_of_token).to(device),
        torch.from_numpy(np.stack([p.matrix() for p in mask.patterns])).to(device),
        None if len(batch) == 1 else torch.tensor(batch, dtype=torch.int32, device=device),
    )


def build_block_mask(mask: FrameMask, device: torch.device | str, block_size: int = 128) -> BlockMask:
    """The `BlockMask` of `mask`, equal to `create_block_mask`'s in block lists and element rule.

    Raises:
        ConfigError: for a block size that is not positive.
    """
    if block_size < 1:
        raise ConfigError(f"block_size must be positive, got {block_size}.")
    blocks = [_classify(pattern, block_size) for pattern in mask.patterns]
    batch = _batch_patterns(mask)
    partial = _ordered(np.stack([blocks[k][0] for k in batch]), device)
    full = _ordered(np.stack([blocks[k][1] for k in batch]), device)
    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod(mask, device),
        seq_lengths=(mask.num_tokens, mask.num_tokens),
    )


def _batch_patterns(mask: FrameMask) -> tuple[int, ...]:
    # A batch axis of 1 broadcasts: one pattern serves the whole batch, whatever its size.
    return (0,) if mask.clips is None or len(mask.patterns) == 1 else mask.clips


def _classify(pattern: FramePattern, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks are partial and which are full: two bool arrays `[N / block, N / block]`, rounded up."""
    matrix = pattern.matrix().astype(np.int64)
    sums = np.zeros((len(matrix) + 1, len(matrix) + 1), np.int64)
    sums[1:, 1:] = matrix.cumsum(0).cumsum(1)
    offsets = np.asarray(pattern.offsets())
    tokens = pattern.num_tokens
    start = np.arange(0, tokens, block_size)
    stop = np.minimum(start + block_size, tokens)
    first = np.searchsorted(offsets, start, side="right") - 1  # first frame of each block
    last = np.searchsorted(offsets, stop, side="left")  # one past its last frame
    allowed = (
        sums[np.ix_(last, last)] - sums[np.ix_(first, last)] - sums[np.ix_(last, first)] + sums[np.ix_(first, first)]
    )
    frames = last - first
    # The reference pads to whole blocks with False: a ragged last block is never full.
    whole = stop - start == block_size
    full = (allowed == frames[:, None] * frames[None, :]) & whole[:, None] & whole[None, :]
    return (allowed > 0) & ~full, full


def _ordered(dense: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts `[B, 1, Q]` and column lists `[B, 1, Q, K]`: present blocks first, each part ascending."""
    counts = dense.sum(-1, dtype=np.int32)
    columns = np.argsort(~dense, axis=-1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts[:, None]).to(device), torch.from_numpy(columns[:, None]).to(device)
