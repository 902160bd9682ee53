"""What an audit found: sources of information, checks, and matrices of who reaches whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.sampling import FAST, SLOW

STREAM_NAMES = {SLOW: "slow", FAST: "fast"}


@dataclass(frozen=True)
class Source:
    """What is changed on its own: a frame of a clip's video, wherever it stands in the model's sequence, or padding.

    Attributes:
        clip: row of the batch.
        positions: places in the sequence that show it.
        index: of the frame in its video; -1 for padding.
    """

    clip: int
    positions: tuple[int, ...]
    index: int

    @property
    def is_padding(self) -> bool:
        return self.index < 0


@dataclass
class Check:
    """One question, its answer in a sentence, and what speaks against it."""

    name: str
    said: str
    leaks: list[str] = field(default_factory=list)
    silent: int = 0  # allowed pairs without influence
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.leaks


@dataclass
class ModelAudit:
    """What an audit found. B clips of F frames; rows are the frames that predict, columns the frames that are seen.

    Attributes:
        checks: all of them, in order.
        layouts: of the clips.
        attends: bool `[F, F]` for each clip, the mask of one layer.
        allowed: bool `[F, F]`, what may be reached through all layers, `(A | I)^L`.
        measured: bool `[F, F]`, what was reached.
        revealing: bool `[F, F]`, what was reached of the row's target, or of what comes after it.
        scored: bool `[B, F]`, frames whose target is in the loss.
        num_layers: L.
        proves_nothing: no frame reached any other although it may, so that nothing was shown.
        seconds: time of each frame, `[B][F]`.
    """

    checks: list[Check]
    layouts: tuple[FrameLayout, ...]
    attends: list[Tensor]
    allowed: list[Tensor]
    measured: list[Tensor]
    revealing: list[Tensor]
    scored: Tensor
    num_layers: int
    proves_nothing: bool
    seconds: list[list[float]]

    @property
    def leaks(self) -> list[str]:
        """All leaks, a sentence each."""
        return [leak for check in self.checks for leak in check.leaks]

    @property
    def causal(self) -> bool:
        """Every check passed, and something was measured."""
        return not self.leaks and not self.proves_nothing

    @property
    def shown_clip(self) -> int:
        """The clip to look at: the first with a leak, else the first."""
        for clip, (measured, allowed) in enumerate(zip(self.measured, self.allowed, strict=True)):
            if (measured & ~allowed | self.revealing[clip] & self.scored[clip][:, None]).any():
                return clip
        return 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; matrices as rows of 0 and 1, row = frame that predicts."""
        clips = []
        for b, layout in enumerate(self.layouts):
            clips.append(
                {
                    "frame_index": list(layout.frame_index),
                    "stream": [STREAM_NAMES[s] for s in layout.stream],
                    "valid": list(layout.valid),
                    "patches": list(layout.patches),
                    "seconds": [round(t, 6) for t in self.seconds[b]],
                    "attends": self.attends[b].int().tolist(),
                    "allowed": self.allowed[b].int().tolist(),
                    "measured": self.measured[b].int().tolist(),
                    "scored": self.scored[b].tolist(),
                }
            )
        checks = [
            {"name": c.name, "passed": c.passed, "said": c.said, "leaks": c.leaks, "silent": c.silent, "notes": c.notes}
            for c in self.checks
        ]
        return {
            "causal": self.causal,
            "proves_nothing": self.proves_nothing,
            "num_layers": self.num_layers,
            "checks": checks,
            "clips": clips,
        }


def sources_of(clip: int, layout: FrameLayout) -> list[Source]:
    """The frames of a clip's video that its layout shows, in time, and its padding as one."""
    found = []
    for index in sorted({i for i, valid in zip(layout.frame_index, layout.valid, strict=True) if valid}):
        positions = tuple(j for j, i in enumerate(layout.frame_index) if i == index)
        found.append(Source(clip, positions, index))
    if padding := tuple(j for j, valid in enumerate(layout.valid) if not valid):
        found.append(Source(clip, padding, -1))
    return found


def frame_name(layout: FrameLayout, position: int, seconds: float) -> str:
    """`frame 12 (fast, 0.40 s)`: the frame's place in its video, and how it is shown."""
    if not layout.valid[position]:
        return f"position {position} (padding)"
    return f"frame {layout.frame_index[position]} ({STREAM_NAMES[layout.stream[position]]}, {seconds:.2f} s)"
