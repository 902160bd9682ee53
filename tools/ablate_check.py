"""Refusals before an ablation trains: rows that would not see as much of each clip, sets without their known answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import Sampling

from .ablate_rows import Row
from .synthetic_sets import FRAMES, SHOWN

_CHOOSE = "Choose fewer slow or fast frames, smaller strides, or pool fast frames less"


def check_drawn(name: str, row: Row, sampling: Sampling) -> None:
    """Does a drawn set have all frames of a row, and does the row see of it what the set is made for?

    Raises:
        ConfigError: a clip is shorter than the row's frames; on `memory`, the newest frames show the bars before they
            are hidden, or slow frames do not.
    """
    plan = sampling.plan(FRAMES[name])
    if missing := int((~plan.valid).sum()):
        raise ConfigError(
            f"{missing} of the {plan.num_frames} frames of the row {row.title} would be padding: clips of the set "
            f"{name} have {FRAMES[name]} frames, and rows would not see as many tokens of each. {_CHOOSE}."
        )
    if name != "memory":
        return
    shown = bool((plan.frame_index < SHOWN).any())
    if shown and not row.fast_slow:
        raise ConfigError(
            f"The row {row.title} would begin at frame {plan.frame_index.min()} of the set memory, and its first "
            f"{SHOWN} frames show what only slow frames should know. {_CHOOSE}."
        )
    if row.fast_slow and not shown:
        raise ConfigError(
            f"No slow frame of the row {row.title} is one of the first {SHOWN} frames of the set memory, which alone "
            "show what is to be remembered: choose more slow frames, or slow_coverage clip."
        )


def tokens_of_batch(batch: Mapping[str, Any], patches: int | tuple[int, int]) -> list[int]:
    """Tokens of each clip of a batch without padding; `patches` per frame, or (slow, fast)."""
    of_stream = torch.tensor([patches, patches] if isinstance(patches, int) else list(patches))
    tokens = of_stream[batch["frame_stream"].long()] * batch["frame_valid"]
    padding = [meta.get("padding", False) for meta in batch.get("meta") or [{}] * len(tokens)]
    return [int(count) for count, filler in zip(tokens.sum(dim=1), padding, strict=True) if not filler]


def check_equal(counted: Mapping[str, Iterable[int]]) -> None:
    """Do all rows have the same tokens of the same clips?

    Args:
        counted: for each row the tokens of some clips, the same clips in the same order.

    Raises:
        ConfigError: they do not.
    """
    of_rows = {row: list(tokens) for row, tokens in counted.items()}
    most = max(of_rows.values(), key=sum)
    if short := [row for row, tokens in of_rows.items() if tokens != most]:
        told = ", ".join(f"{row} {sum(tokens) / len(tokens):g} ({min(tokens)})" for row, tokens in of_rows.items())
        raise ConfigError(
            f"Rows would not see as many tokens of each clip; mean and least of the first clips are {told}. Clips are "
            f"too short for {', '.join(short)}: use longer clips. {_CHOOSE}."
        )
