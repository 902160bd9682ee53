"""Models that leak the way models leak, each with its repair: what an audit has to catch, and to let pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framestream.model.towers import PixelTower
from framestream.model.video_frame_utils import create_causal_frame_mask


class TokenDecoder(nn.Module):
    """torch's decoder over the patches of frames, which are target and memory at once: `[B, F, P, D]` to the same.

    Args:
        memory_masked: hide later frames from cross-attention too. Without it every frame sees every frame.
        inverted: hand over the mask as it is, where torch wants True = hidden.
    """

    def __init__(self, dim: int = 8, *, memory_masked: bool, inverted: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(dim, 2, 16, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.memory_masked, self.inverted = memory_masked, inverted

    def forward(self, frames: Tensor) -> Tensor:
        allowed = create_causal_frame_mask(frames.shape[1], frames.shape[2])
        hidden = allowed if self.inverted else ~allowed
        tokens = frames.flatten(1, 2)
        out = self.decoder(tokens, tokens, tgt_mask=hidden, memory_mask=hidden if self.memory_masked else None)
        return out.unflatten(1, frames.shape[1:3])


class NormOverTime(nn.Module):
    """Frames normed with the statistics of the whole clip, or (repaired) of each frame alone."""

    def __init__(self, *, per_frame: bool) -> None:
        super().__init__()
        self.per_frame = per_frame

    def forward(self, frames: Tensor) -> Tensor:
        axes = (2, 3) if self.per_frame else (1, 2, 3)
        return (frames - frames.mean(axes, keepdim=True)) / frames.std(axes, keepdim=True)


class SmoothingTower(PixelTower):
    """Patches of pixels, each frame mixed with the one after it, as a temporal convolution does that pads both sides.

    Args:
        mix: share of the following frame; 0 is repaired.
    """

    def __init__(self, image_size: int, patch_size: int, mix: float) -> None:
        super().__init__(image_size, patch_size)
        self.mix = mix

    def forward(self, frames: Tensor) -> Tensor:
        following = torch.cat([frames[1:], frames[-1:]])
        return super().forward((1 - self.mix) * frames + self.mix * following)
