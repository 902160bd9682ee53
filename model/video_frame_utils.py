"""Helper names used by lmms-engine style code: masks as plain tensors, frame sampling, position IDs.

Masks here are bool `[N, N]`, True = may attend. `nn.TransformerDecoder` wants the inverse, and wants it twice, as
`tgt_mask=~mask` **and** `memory_mask=~mask`: without the second the memory shows every frame its future. The
framestream predictor takes a `FrameMask` instead and never builds `[N, N]`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout, frame_position_ids
from framestream.pipeline.masks import fast_slow, frame_causal, sliding_window
from framestream.pipeline.sampling import FAST, SLOW, FastSlowSampling

Device = torch.device | str | None


class FrameLevelMaskGenerator:
    """Frame masks as dense tensors. All methods work on the class and on an instance."""

    @staticmethod
    def create_causal_frame_mask(num_frames: int, num_patches_per_frame: int, device: Device = None) -> Tensor:
        """bool `[N, N]`: a patch sees all patches of its own and of earlier frames.

        Raises:
            ConfigError: counts below 1.
        """
        return frame_causal(_layout(num_frames, num_patches_per_frame)).dense(device).clone()

    @staticmethod
    def create_sliding_window_frame_mask(
        num_frames: int, num_patches_per_frame: int, window_size: int = 3, device: Device = None
    ) -> Tensor:
        """bool `[N, N]`: a patch sees the last `window_size` frames, its own among them.

        Raises:
            ConfigError: counts or window below 1.
        """
        layout = _layout(num_frames, num_patches_per_frame)
        return sliding_window(layout, window_size=window_size).dense(device).clone()

    @staticmethod
    def create_fast_slow_frame_mask(
        num_fast_frames: int, num_slow_frames: int, num_patches_per_frame: int, device: Device = None
    ) -> Tensor:
        """bool `[N, N]` for slow frames followed by fast ones: slow see all slow; fast see slow and earlier fast.

        Slow frames of a clip lie between the fast ones in time, so this mask shows fast frames their future; for
        training use the mask time_causal of a `FrameLayout`.

        Raises:
            ConfigError: counts below 1.
        """
        _count("num_fast_frames", num_fast_frames)
        _count("num_slow_frames", num_slow_frames)
        stream = [SLOW] * num_slow_frames + [FAST] * num_fast_frames
        patches = [_count("num_patches_per_frame", num_patches_per_frame)] * len(stream)
        return fast_slow(FrameLayout.from_arrays(range(len(stream)), stream, patches=patches)).dense(device).clone()

    @staticmethod
    def visualize_mask(mask: Tensor, title: str = "Frame Mask") -> Path:
        """Writes a picture of a bool `[N, N]` mask and returns its path.

        The file lies in the working directory and is named after the title: "My Frame Mask" gives
        `my_frame_mask.png`.

        Raises:
            ConfigError: no square mask.
        """
        from framestream.pipeline.mask_plot import plot_matrix

        if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
            raise ConfigError(f"visualize_mask takes a mask [N, N], got {list(mask.shape)}")
        slug = re.sub(r"\W+", "_", title.lower()).strip("_") or "frame_mask"
        return plot_matrix(mask.detach().bool().cpu().numpy(), Path(f"{slug}.png"), title)


class VideoFrameSampler:
    """Fast and slow frames of video tensors. All methods work on the class and on an instance."""

    @staticmethod
    def sample_fast_slow_frames(
        video_frames: Tensor, fast_stride: int = 1, slow_stride: int = 4, num_fast: int = 8, num_slow: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Dense recent frames and sparse long-range frames of `[B, T, C, H, W]`.

        Fast frames end at the last frame. Slow frames are the most recent at `slow_stride`, or evenly spread where
        the clip is shorter than `num_slow * slow_stride`. A stream that wants more frames than there are repeats
        its earliest at the front; which ones those are `FastSlowSampling.plan(T).valid` says.

        Returns:
            `[B, num_fast, C, H, W]` and `[B, num_slow, C, H, W]`.

        Raises:
            ConfigError: another shape, or counts and strides below 1.
        """
        if video_frames.dim() != 5:
            raise ConfigError(f"video_frames must be [B, T, C, H, W], got {list(video_frames.shape)}")
        sampling = FastSlowSampling(num_fast, num_slow, fast_stride, slow_stride, slow_coverage="stride")
        plan = sampling.plan(video_frames.shape[1])
        fast, slow = (
            video_frames[:, torch.from_numpy(plan.frame_index[plan.stream == stream]).to(video_frames.device)]
            for stream in (FAST, SLOW)
        )
        return fast, slow

    @staticmethod
    def merge_fast_slow_frames(
        fast_frames: Tensor, slow_frames: Tensor, merge_strategy: Literal["concat", "interleave"] = "concat"
    ) -> Tensor:
        """One sequence of both streams: slow then fast, or alternating. No frame is dropped, whatever the counts.

        Args:
            fast_frames: `[B, num_fast, C, H, W]`.
            slow_frames: `[B, num_slow, C, H, W]`.
            merge_strategy: "concat" or "interleave" (element k of n stands at (k + 0.5) / n, ties slow first).

        Raises:
            ConfigError: another strategy, or streams that differ in more than their frames.
        """
        if merge_strategy not in ("concat", "interleave"):
            raise ConfigError(f"merge_strategy must be 'concat' or 'interleave', got {merge_strategy!r}")
        if fast_frames.dim() < 2 or fast_frames.shape[:1] + fast_frames.shape[2:] != (
            slow_frames.shape[:1] + slow_frames.shape[2:]
        ):
            raise ConfigError(
                f"fast and slow frames must agree in all but their number, got {list(fast_frames.shape)} and "
                f"{list(slow_frames.shape)}"
            )
        num_slow, num_fast = slow_frames.shape[1], fast_frames.shape[1]
        merged = torch.cat([slow_frames, fast_frames], dim=1)
        if merge_strategy == "concat":
            return merged
        streams = FastSlowSampling(num_fast, num_slow, order="interleave").streams()
        place = {SLOW: iter(range(num_slow)), FAST: iter(range(num_slow, num_slow + num_fast))}
        order = [next(place[int(stream)]) for stream in streams]
        return merged[:, torch.tensor(order, device=merged.device)]


def create_causal_frame_mask(num_frames: int, num_patches_per_frame: int, device: Device = None) -> Tensor:
    """See `FrameLevelMaskGenerator.create_causal_frame_mask`."""
    return FrameLevelMaskGenerator.create_causal_frame_mask(num_frames, num_patches_per_frame, device)


def create_frame_position_ids(num_frames: int, num_patches_per_frame: int, device: Device = None) -> Tensor:
    """int64 `[N]`, the frame of each patch: 0, 0, 1, 1, 2, 2 for three frames of two patches.

    Raises:
        ConfigError: counts below 1.
    """
    return frame_position_ids(_layout(num_frames, num_patches_per_frame), "sequence").to(device or "cpu")


def _layout(num_frames: int, num_patches_per_frame: int) -> FrameLayout:
    patches = [_count("num_patches_per_frame", num_patches_per_frame)] * _count("num_frames", num_frames)
    return FrameLayout.from_arrays(range(num_frames), patches=patches)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
