"""Clips and batches in the form that the loader has, of frames that are drawn and not decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, Rule, make_mask
from framestream.pipeline.sampling import SamplingPlan


def drawn_batch(
    video: Tensor, plan: SamplingPlan, rule: str | Rule, patches: int | tuple[int, int], fps: float
) -> dict[str, Any]:
    """What a model needs of a batch, on the device of the clips.

    Args:
        video: `[B, T, 3, H, W]`, all frames.
        plan: of T frames, the same for all clips.
        rule: mask rule.
        patches: tokens per frame, or (slow, fast).
        fps: frames per second.
    """
    clips, device = len(video), video.device
    index = torch.from_numpy(plan.frame_index).to(device)
    mask = make_mask(rule, FrameLayout.from_plan(plan, patches))
    return {
        "video_frames": video[:, index],
        "frame_index": index.expand(clips, -1),
        "frame_time": (index / fps).float().expand(clips, -1),
        "frame_stream": torch.from_numpy(plan.stream).to(device).expand(clips, -1),
        "frame_valid": torch.from_numpy(plan.valid).to(device).expand(clips, -1),
        "frame_mask": FrameMask.stack([mask] * clips),
    }


def drawn_clip(frames: Tensor, plan: SamplingPlan, fps: float, key: str = "drawn") -> dict[str, Any]:
    """What `ClipTransform` would give of a clip, for a collator; `frames` are those of the plan, `[F, 3, H, W]`."""
    return {
        "frames": frames,
        "frame_index": torch.from_numpy(plan.frame_index),
        "frame_time": torch.from_numpy(plan.frame_index / fps).float(),
        "frame_stream": torch.from_numpy(plan.stream),
        "frame_valid": torch.from_numpy(plan.valid),
        "key": key,
        "text": "",
        "meta": {},
    }
