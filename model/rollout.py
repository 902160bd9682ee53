"""Generation frame by frame: the fast stream goes on from the model's own predictions, the slow context stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FAST

from .clips import frames_at
from .continuation import within_clip
from .frame_stream import FrameStream
from .losses import patch_error

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction
    from .clips import PreparedClips


@dataclass
class RolloutOutput:
    """Generated frames and their errors. NaN for clips with fewer valid fast frames than `steps` + 1.

    Attributes:
        predictions: `[B, steps, P, D]` generated embeddings, P being the patches of a fast frame.
        frame_error: float32 `[B, steps]`, against the true frames, in the units of the module's loss.
        copy_last_error: the same for repeating the last true history frame.
    """

    predictions: Tensor
    frame_error: Tensor
    copy_last_error: Tensor


@torch.no_grad()
def rollout(
    module: AutoregressiveReconstruction,
    batch: Mapping[str, Any],
    steps: int,
    *,
    hidden_states: Tensor | None = None,
    hidden_time: Tensor | None = None,
    teacher_forced: bool = False,
) -> RolloutOutput:
    """Predicts the last `steps` fast frames of each clip, feeding predictions back.

    The history ends before the first of them: later frames are invisible, whatever the mask and the stream. Keys and
    values of the history are computed once and kept, so that each step costs one frame. Host states that have seen
    a generated frame (by `hidden_time`) are hidden too.

    Args:
        module: the reconstruction module.
        batch: as for its `forward`.
        steps: frames to generate.
        hidden_states, hidden_time: as for its `forward`.
        teacher_forced: feed the true frames back instead, which gives what the parallel pass predicts.

    Raises:
        ConfigError: `steps` no whole number, below 1, or no fewer than the fast frames of the batch; hidden states of
            another batch size; a packed batch.
    """
    return generate(module, module.prepare(batch), steps, hidden_states, hidden_time, teacher_forced=teacher_forced)


def longest_rollout(clips: PreparedClips) -> int:
    """Steps that the clip with most fast frames, valid or not, has room for; -1 without any fast frame.

    Raises:
        ConfigError: clips share sequences.
    """
    if clips.clip is not None:
        raise ConfigError(
            "a rollout continues one clip, and the sequences of this batch hold several: build the batch without "
            "pack_to (and train on packed ones with rollout_steps: 0)"
        )
    return max(sum(s == FAST for s in layout.stream) for layout in clips.layouts) - 1


def generate(
    module: AutoregressiveReconstruction,
    clips: PreparedClips,
    steps: int,
    hidden_states: Tensor | None = None,
    hidden_time: Tensor | None = None,
    *,
    teacher_forced: bool = False,
) -> RolloutOutput:
    """As `rollout`, on prepared clips, and differentiable."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ConfigError(f"steps of a rollout must be a whole number, got {steps!r}")
    most = longest_rollout(clips)
    if not 1 <= steps <= most:
        allowed = f"1 to {most}" if most >= 1 else "none"
        raise ConfigError(
            f"a rollout of {steps} steps needs at least 1 step and, before them, a fast frame to start from: "
            f"these clips allow {allowed}"
        )
    check_states(len(clips.layouts), hidden_states, hidden_time)
    found = [within_clip(layout, clips.mask[i], steps) for i, layout in enumerate(clips.layouts)]
    usable = [i for i, way in enumerate(found) if way is not None]
    size, device = len(found), clips.embeddings.device
    patches = next(one.patches[one.stream.index(FAST)] for one in clips.layouts if FAST in one.stream)
    predictions = torch.full((size, steps, patches, clips.embeddings.shape[-1]), torch.nan, device=device)
    errors = torch.full((2, size, steps), torch.nan, device=device)
    if not usable:
        return RolloutOutput(predictions, errors[0], errors[1])
    at = torch.tensor(usable, device=device)
    states = None if hidden_states is None else hidden_states[at.to(hidden_states.device)]
    times = None if hidden_time is None else hidden_time[at.to(hidden_time.device)]
    clips = clips.select(usable)
    ways = [way for way in found if way is not None]
    # The last true frame, then those that are generated: [b, steps + 1].
    positions = torch.tensor([(way.start, *way.positions) for way in ways], device=device)
    truth = frames_at(clips.embeddings, positions)[:, :, :patches]
    when = clips.time.gather(1, positions)
    if times is not None and not teacher_forced:
        times = hide_later(times, when[:, 1])
    stream = FrameStream(module, clips, ways, patches, when[:, 1] - when[:, 0], states, times)
    made = [stream.frame]
    for k in range(1, steps):
        fed = truth[:, k] if teacher_forced else made[-1]
        made.append(stream.feed(fed, when[:, k], when[:, k + 1] - when[:, k]))
    generated = torch.stack(made, dim=1)
    error = patch_error(generated, truth[:, 1:], module.config.loss).mean(-1)
    copied = patch_error(truth[:, :1].expand_as(truth[:, 1:]), truth[:, 1:], module.config.loss).mean(-1)
    predictions = predictions.to(generated.dtype).index_copy(0, at, generated)
    return RolloutOutput(predictions, errors[0].index_copy(0, at, error), errors[1].index_copy(0, at, copied))


def check_states(clips: int, hidden_states: Tensor | None, hidden_time: Tensor | None) -> None:
    """Raises a ConfigError unless host states, where given, have a row for each clip."""
    for name, given in (("hidden_states", hidden_states), ("hidden_time", hidden_time)):
        if given is not None and (given.dim() == 0 or len(given) != clips):
            raise ConfigError(f"{name} must have a row for each of {clips} clips, got {list(given.shape)}")


def hide_later(hidden_time: Tensor, first: Tensor) -> Tensor:
    """Host states that have seen a frame which is now generated would give the true one away: they count as padding.

    Args:
        hidden_time: `[b, S]` seconds.
        first: `[b]` seconds of the first generated frame.
    """
    return torch.where(hidden_time < first[:, None].to(hidden_time.device), hidden_time, torch.inf)
