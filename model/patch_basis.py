"""Pixels in a basis in which small motion is visible: a fixed, invertible transform of each patch.

Nearly all the variance of a patch of pixels is its mean brightness; what a small motion changes is a hundredth of that.
A model that sees raw pixels learns brightness first and motion after very long. Here each patch is expressed in cosine
waves and opponent colours, and coarse waves are scaled down by the square root of how much stronger natural images
have them (amplitude falls with one over frequency, Field 1987). Nothing is lost: `to_pixels` inverts it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .predictor import TIME_BAND, Block, FramePredictor, _frequencies
from .towers import PixelTower

_GREY, _CONTRAST = 0.5, 0.25


class CosineTower(nn.Module):
    """Patches of pixels as scaled cosine coefficients: no trained weights.

    Args:
        image_size: height and width of the frames.
        patch_size: height and width of a patch; divides `image_size`. D is `3 * patch_size ** 2`.
    """

    basis: Tensor
    inverse: Tensor

    def __init__(self, image_size: int = 32, patch_size: int = 4) -> None:
        super().__init__()
        self.pixels = PixelTower(image_size, patch_size)
        self.dim = self.pixels.dim
        self.grid = self.pixels.grid
        wave = torch.arange(patch_size, dtype=torch.float64)
        cosine = torch.cos(math.pi * (wave + 0.5) * wave[:, None] / patch_size) * math.sqrt(2 / patch_size)
        cosine[0] /= math.sqrt(2)
        colour = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
        colour /= colour.norm(dim=1, keepdim=True)
        rotation = torch.kron(colour, torch.kron(cosine, cosine))  # orthonormal, rows are the waves
        strength = (0.35 + (wave[:, None] ** 2 + wave**2).sqrt()).reciprocal()
        strength = (torch.tensor([1.0, 0.3, 0.15], dtype=torch.float64)[:, None] * strength.flatten()).flatten()
        scale = 0.45 * strength.rsqrt()  # most coefficients come out around 1
        self.register_buffer("basis", (rotation.T * scale).float(), persistent=False)
        self.register_buffer("inverse", (rotation / scale[:, None]).float(), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """`[n, 3, S, S]` on a scale of 0 to 1 -> `[n, P, D]`."""
        return ((self.pixels(frames) - _GREY) / _CONTRAST) @ self.basis

    def to_pixels(self, patches: Tensor) -> Tensor:
        """`[..., P, D]` -> pixel patches `[..., P, D]` on a scale of 0 to 1, as `PixelTower` makes them."""
        return (patches.float() @ self.inverse.float()) * _CONTRAST + _GREY

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`[..., P, D]` -> frames `[..., 3, H, W]` on a scale of 0 to 1."""
        return self.pixels.unpatchify(self.to_pixels(patches))


@torch.no_grad()
def start_with_differences(predictor: FramePredictor, lag: float = 0.08, gain: float = 6.0) -> bool:
    """Let the first block begin as a difference of frames, which training then refines.

    Attention starts out blind to places, and needs thousands of steps to find "the same patch, one frame earlier".
    Here the query and key biases of the first block make its heads look there from the start (rotary positions turn a
    constant bias into a preference for an offset): one head at the patch itself, one at the same patch `lag` seconds
    earlier or the nearest visible frame, one around it. Their values write the scaled difference of the first two into
    free channels. The output is untouched: the untrained model still repeats each frame.

    Args:
        predictor: at least 3 heads, each of at least `embedding_dim` channels.
        lag: seconds that the second head looks back.
        gain: factor on the difference.

    Returns:
        False, with nothing changed, where the predictor is too narrow for it.
    """
    size, width, head = predictor.embed.in_features, predictor.embed.out_features, predictor.head_dim
    if head < size or width < 3 * size or width // head < 3:
        return False
    pairs = head // 2
    space = pairs // 3
    times = pairs - 2 * space
    turn = -_frequencies(times, TIME_BAND, predictor.embed.weight.device) * lag
    eye = torch.eye(size)
    predictor.embed.weight.zero_()
    predictor.embed.weight[:size] = eye
    predictor.embed.bias.zero_()
    for number, block in enumerate(predictor.blocks):
        assert isinstance(block, Block)
        first = number == 0
        bias = block.qkv.bias.view(3, block.num_heads, 2, pairs)
        bias.zero_()
        for h in range(block.num_heads):
            role = h % 3  # the patch itself, the patch before, around it
            near = 8.0 if first and role < 2 else 8.0 / 3
            when = 12.0 if first else 6.0
            angle = turn if role else torch.zeros_like(turn)
            bias[0, h, 0, :times], bias[0, h, 1, :times] = when * angle.cos(), when * angle.sin()
            bias[1, h, 0, :times] = when
            bias[:2, h, 0, times:] = near
        if first:
            block.qkv.weight[: 2 * width] *= 0.1
            block.qkv.weight[2 * width :].zero_()
            block.out_self.weight.zero_()
            block.out_self.bias.zero_()
            for role in range(3):
                rows = slice(2 * width + role * head, 2 * width + role * head + size)
                block.qkv.weight[rows, :size] = eye
            block.out_self.weight[size : 2 * size, :size] = gain * eye
            block.out_self.weight[size : 2 * size, head : head + size] = -gain * eye
            block.out_self.weight[2 * size : 3 * size, 2 * head : 2 * head + size] = eye
    return True
