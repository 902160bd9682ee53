"""What a training config can get wrong although each of its sections is possible, found before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.masks import FrameMask, leaking_targets, make_mask
from framestream.pipeline.sampling import FAST, FastSlowSampling, Sampling, make_sampling

from .config import TrainConfig


def check_config(config: TrainConfig, device: torch.device) -> None:
    """What sections of the config, each possible in itself, say against each other, the device or the disk.

    Raises:
        ConfigError: something that cannot be.
    """
    from framestream.model.mask_choice import own_mask

    output = Path(config.output)
    if taken := next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None):
        raise ConfigError(f"output {output} cannot be made, {taken} is no folder: give one.")
    if config.model.attention_backend == "flex" and device.type == "cpu":
        raise ConfigError(
            "model.attention_backend flex cannot train on the CPU, where it has no backward pass: use auto or ranges."
        )
    if config.train.feature_cache is not None and (config.data.augment or config.data.crop == "random"):
        raise ConfigError(
            "train.feature_cache keeps frames that come back as they were, and data.augment and data.crop random make "
            "each of them anew: set data.augment to false and data.crop to center, or leave the cache out."
        )
    if config.data.pack_to is not None and config.model.rollout_steps:
        raise ConfigError(
            "model.rollout_steps continues one clip, and data.pack_to puts several into a sequence: set one of them to "
            "null or 0."
        )
    sampling = make_sampling(config.sampling())
    fast = sampling.num_fast if isinstance(sampling, FastSlowSampling) else sampling.num_frames
    sections = {"model": config.model.rollout_steps, "train": config.train.rollout_steps if config.data.held_out else 0}
    for section, steps in sections.items():
        if steps >= fast:
            raise ConfigError(
                f"{section}.rollout_steps is {steps}, and the sampling takes {fast} fast frames, one of which the "
                f"rollout starts from: set it to at most {fast - 1}."
            )
    rule, window = config.mask()
    options = {"window_size": window} if rule == "sliding_window" else {}
    layouts = [_layout(sampling, length) for length in (sampling.num_frames, _full_length(sampling))]
    masks = [make_mask(rule, layout, **options) for layout in layouts]
    if config.model.mask is not None or not config.model.use_frame_causal_mask:  # else it takes what the data brings
        for layout, mask in zip(layouts, masks, strict=True):
            if own_mask(config.model.reconstruction(), layout).patterns != mask.patterns:
                said = f"mask {config.model.mask}" if config.model.mask else "use_frame_causal_mask false"
                raise ConfigError(
                    f"data.mask {rule} and model.{said} are different masks: leave data.mask unset (null), which then "
                    "follows the model."
                )
    _check_targets(config, layouts[-1], masks[-1])


def _full_length(sampling: Sampling) -> int:
    """Frames of a clip in which no stream is cut short."""
    if isinstance(sampling, FastSlowSampling):
        return max(1000, sampling.num_fast * sampling.fast_stride, sampling.num_slow * sampling.slow_stride)
    return max(1000, sampling.num_frames * getattr(sampling, "stride", 1))


def _layout(sampling: Sampling, length: int) -> FrameLayout:
    """How a clip of `length` frames is laid out, one patch each."""
    # Twice as far apart as the sampling wants them, so that it takes each one.
    facts: dict[str, Any] = {"timestamps": np.arange(length) * 2 / (sampling.fps or 30)}
    if isinstance(sampling, FastSlowSampling):
        facts["key_frames"] = range(length)
    return FrameLayout.from_plan(sampling.plan(length, **facts), 1)


def _check_targets(config: TrainConfig, layout: FrameLayout, mask: FrameMask) -> None:
    """That there is something to learn from: a run without would go on to its end at a loss of 0."""
    from framestream.model.mask_choice import limited

    model = config.model.reconstruction()
    wanted = [
        target >= 0 and (model.slow_targets or stream == FAST)
        for target, stream in zip(next_frame_targets(layout), layout.stream, strict=True)
    ]
    if not any(wanted):
        raise ConfigError(
            "The sampling takes no frame that has to be predicted, and nothing could be learned: take at least 2 fast "
            "frames, with data.sampling or model.num_fast."
        )
    leaks = leaking_targets(layout, limited(model, mask, layout), model.num_layers)
    if model.on_leak == "exclude" and all(leak for leak, want in zip(leaks, wanted, strict=True) if want):
        key, rule = "data.mask" if config.data.mask is not None else "model.mask", config.mask()[0]
        raise ConfigError(
            f"{key} {rule} shows every frame the one that it has to predict. Such targets are left out of the loss and "
            "none is left: use time_causal, or frame_causal for one stream. To train on copies all the same, set "
            "model.on_leak to allow."
        )
