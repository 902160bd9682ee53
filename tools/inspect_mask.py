"""What the chosen mask lets the frames of a clip see, in numbers and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.masks import FrameMask, leaking_targets, make_mask

from .inspect_clips import Sheet

RULE_SENTENCES = {
    "time_causal": "A frame sees every frame, slow or fast, that is not later in the video than itself.",
    "frame_causal": "A frame sees the frames that stand at or before it in the model's sequence.",
    "sliding_window": "A frame sees only the last frames of the model's sequence, itself included.",
    "fast_slow": "Slow frames see all slow frames; fast frames see all slow frames and the fast ones up to themselves.",
    "fast_slow_causal": "As fast_slow, but no frame sees one that is later in the video than itself.",
    "full": "Every frame sees every frame of its clip.",
}


@dataclass(frozen=True)
class MaskFacts:
    """The mask of one clip. `targets` frames are to be predicted, `leaking` of them can be seen by what predicts them,
    through `layers` layers."""

    rule: str
    key: str
    layout: FrameLayout
    mask: FrameMask
    layers: int
    targets: int
    leaking: int

    @property
    def sentence(self) -> str:
        """What it means, for somebody who is about to train with it."""
        said = RULE_SENTENCES[self.rule]
        if not self.targets:
            return f"{said} There is nothing to predict in this clip: it has too few frames."
        if not self.leaking:
            return f"{said} No frame can see what it has to predict."
        return (
            f"{said} {self.leaking} of {self.targets} frames can see what they have to predict: a model trained under "
            "this mask learns to copy there, unless those targets are left out of the loss (on_leak: exclude)."
        )


def mask_facts(sheets: Sequence[Sheet], rule: str, window_size: int, patches: int, layers: int) -> MaskFacts | None:
    """The mask for the clip that fills the sampling best, the first of them; None where no clip could be made.

    Raises:
        ConfigError: an impossible `window_size`, or `patches` below 1.
    """
    made = [(sheet.key, sheet.clip) for sheet in sheets if sheet.clip is not None]
    if not made:
        return None
    key, clip = max(made, key=lambda item: sum(item[1].valid))
    layout = clip.layout(patches)
    mask = make_mask(rule, layout, **({"window_size": window_size} if rule == "sliding_window" else {}))
    targets = sum(target >= 0 for target in next_frame_targets(layout))
    return MaskFacts(rule, key, layout, mask, layers, targets, sum(leaking_targets(layout, mask, layers)))
