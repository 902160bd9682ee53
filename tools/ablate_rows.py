"""The rows of the ablation: what each changes in one configuration, at an equal number of tokens per clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FastSlowSampling, make_sampling

from .config import TrainConfig
from .train import patches_of


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        title: its name in the table.
        frame_mask: frames see frames; without it tokens see the tokens before them.
        fast_slow: slow frames over the whole clip and the newest ones, in place of the newest alone.
        mask: rule for the frames.
        on_leak: what becomes of targets that can be seen.
    """

    title: str
    frame_mask: bool
    fast_slow: bool
    mask: str
    on_leak: str = "exclude"

    @property
    def leaks(self) -> bool:
        """The row is trained on targets that it can see."""
        return self.on_leak == "allow"


ROWS: Mapping[str, Row] = {
    "baseline": Row("Baseline", False, False, "frame_causal"),
    "frame_mask": Row("+Frame mask", True, False, "frame_causal"),
    "fast_slow": Row("+Fast-slow", False, True, "frame_causal"),
    "full": Row("Full", True, True, "time_causal"),
    "leaky": Row("Leaky", True, True, "fast_slow", "allow"),
}


def fast_slow_of(config: TrainConfig) -> FastSlowSampling:
    """The sampling that the rows with fast-slow frames share.

    Its frames stand in order of time, ties slow first: token order is then an honest mask too. With all slow frames
    first every fast token would see slow frames of its future.

    Raises:
        ConfigError: the config samples one stream, or by a clock of its own.
    """
    sampling = make_sampling(config.sampling())
    if not isinstance(sampling, FastSlowSampling):
        raise ConfigError(
            "The ablation compares fast and slow frames with the newest ones alone, and this config samples one "
            "stream: set model.use_fast_slow_frames to true, or data.sampling to kind fast_slow."
        )
    return replace(sampling, order="time")


def tokens_of(sampling: FastSlowSampling, patches: int | tuple[int, int]) -> int:
    """Tokens of a clip under fast and slow frames; `patches` per frame, or (slow, fast)."""
    slow, fast = (patches, patches) if isinstance(patches, int) else patches
    return sampling.num_slow * slow + sampling.num_fast * fast


def row_config(config: TrainConfig, row: Row, tower: nn.Module) -> TrainConfig:
    """The config of one row: as many tokens as every other one, of clips that are long enough.

    Raises:
        ConfigError: no number of full frames has as many tokens as the slow and fast frames together.
    """
    sampling = fast_slow_of(config)
    patches = patches_of(config, tower)
    tokens = tokens_of(sampling, patches)
    per_frame = patches if isinstance(patches, int) else patches[1]
    if tokens % per_frame:
        raise ConfigError(
            f"{sampling.num_slow} slow and {sampling.num_fast} fast frames have {tokens} tokens, which is no whole "
            f"number of frames of {per_frame}: choose num_slow and model.slow_pool so that the rows can be compared."
        )
    chosen: dict[str, Any]
    if row.fast_slow:
        chosen = {"kind": "fast_slow", **{name: getattr(sampling, name) for name in sampling.__dataclass_fields__}}
    else:
        chosen = {"kind": "dense", "num_frames": tokens // per_frame, "stride": sampling.fast_stride}
        if sampling.fps is not None:
            chosen["fps"] = sampling.fps
    model = replace(
        config.model,
        use_frame_causal_mask=row.frame_mask,
        use_fast_slow_frames=row.fast_slow,
        mask=None,
        window_size=None,
        on_leak=row.on_leak,
    )
    data = replace(config.data, sampling=chosen, mask=row.mask)
    return replace(config, data=data, model=model)
