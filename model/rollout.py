"""Generation frame by frame: the fast stream goes on from the model's own predictions, the slow context stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, FramePattern
from framestream.pipeline.sampling import FAST

from .attention import AttentionPlan, Run
from .geometry import Geometry
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


@dataclass(frozen=True)
class _Continuation:
    """Which frames of a clip are generated, from where, and what they may see."""

    start: int  # position of the last true fast frame
    positions: tuple[int, ...]  # of the generated frames, in time
    history: FrameMask  # the clip's mask without everything from the first generated frame on
    known: int  # bitset of the frames of the history


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
    for name, given in (("hidden_states", hidden_states), ("hidden_time", hidden_time)):
        if given is not None and (given.dim() == 0 or len(given) != len(clips.layouts)):
            raise ConfigError(f"{name} must have a row for each of {len(clips.layouts)} clips, got {list(given.shape)}")
    found = [_continuation(layout, clips.mask[i], steps) for i, layout in enumerate(clips.layouts)]
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
    positions = torch.tensor([way.positions for way in ways], device=device)  # [b, steps]
    starts = torch.tensor([[way.start] for way in ways], device=device)  # [b, 1]
    truth = _frames(clips.embeddings, positions)[:, :, :patches]
    last = _frames(clips.embeddings, starts)[:, :, :patches]
    if times is not None and not teacher_forced:
        # A state that has seen a frame which is now generated would give the true one away.
        times = torch.where(times < clips.time.gather(1, positions[:, :1]), times, torch.inf)
    made = _run(module, clips, ways, starts, positions, truth if teacher_forced else None, states, times, patches)
    error = patch_error(made, truth, module.config.loss).mean(-1)
    copied = patch_error(last.expand_as(truth), truth, module.config.loss).mean(-1)
    predictions = predictions.to(made.dtype).index_copy(0, at, made)
    return RolloutOutput(predictions, errors[0].index_copy(0, at, error), errors[1].index_copy(0, at, copied))


def _run(
    module: AutoregressiveReconstruction,
    clips: PreparedClips,
    ways: list[_Continuation],
    starts: Tensor,
    positions: Tensor,
    forced: Tensor | None,
    hidden_states: Tensor | None,
    hidden_time: Tensor | None,
    patches: int,
) -> Tensor:
    """`[b, steps, P, D]` predictions."""
    restricted = replace(clips, mask=FrameMask.stack([way.history for way in ways]))
    tokens, cache = module.predict(restricted, hidden_states, hidden_time)
    origin = clips.time.amin(dim=1, keepdim=True)
    made = [_frames(clips.unpack(tokens), starts)[:, 0, :patches]]
    for step in range(1, positions.shape[1]):
        fed = made[-1] if forced is None else forced[:, step - 1]
        here, there = positions[:, step - 1 : step], positions[:, step : step + 1]
        time = clips.time.gather(1, here)
        geometry = Geometry.build(
            [(patches,)] * len(ways),
            time,
            clips.stream.gather(1, here),
            clips.time.gather(1, there) - time,
            clips.grids,
        )
        plan = _step_plan(clips, ways, step, patches, token_causal=not module.config.use_frame_causal_mask)
        tokens, cache = module.predictor(
            fed, geometry, plan, hidden_states, hidden_time, cache=cache, time_origin=origin
        )
        made.append(tokens)
    return torch.stack(made, dim=1)


def _continuation(layout: FrameLayout, mask: FrameMask, steps: int) -> _Continuation | None:
    fast = [i for i in range(layout.num_frames) if layout.valid[i] and layout.stream[i] == FAST]
    fast.sort(key=layout.frame_index.__getitem__)
    if len(fast) < steps + 1:
        return None
    positions = tuple(fast[-steps:])
    now = layout.frame_index[positions[0]]
    known = sum(1 << i for i in range(layout.num_frames) if layout.valid[i] and layout.frame_index[i] < now)
    rows = mask.patterns[0].rows
    history = tuple(row & known if known >> i & 1 else 1 << i for i, row in enumerate(rows))
    pattern = FramePattern(history, mask.patterns[0].lengths)
    return _Continuation(fast[-steps - 1], positions, FrameMask((pattern,)), known)


def _step_plan(
    clips: PreparedClips, ways: list[_Continuation], step: int, patches: int, *, token_causal: bool
) -> AttentionPlan:
    """Who the frame fed at `step` sees: history by its place in the cache, generated frames behind it, itself last."""
    seen = [
        _visible(layout, clips.mask[i].patterns[0].rows, way, step, patches)
        for i, (layout, way) in enumerate(zip(clips.layouts, ways, strict=True))
    ]
    runs: list[Run] = []
    first = 0
    for clip in range(1, len(seen) + 1):
        if clip == len(seen) or seen[clip] != seen[first]:
            runs.append((first, clip, ((0, patches, seen[first]),)))
            first = clip
    return AttentionPlan("ranges", runs=tuple(runs), token_causal=token_causal)


def _visible(
    layout: FrameLayout, rows: tuple[int, ...], way: _Continuation, step: int, patches: int
) -> tuple[tuple[int, int], ...]:
    row = rows[way.positions[step - 1]]
    offsets = layout.offsets()
    places = [(offsets[j], offsets[j + 1]) for j in range(layout.num_frames) if row & way.known & 1 << j]
    for k, position in enumerate(way.positions[:step]):
        if row >> position & 1:
            places.append((layout.num_tokens + k * patches, layout.num_tokens + (k + 1) * patches))
    merged: list[tuple[int, int]] = []
    for start, stop in places:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)


def _frames(frames: Tensor, positions: Tensor) -> Tensor:
    """`[B, F, P, D]` at `[B, n]` -> `[B, n, P, D]`."""
    return frames.gather(1, positions[:, :, None, None].expand(-1, -1, *frames.shape[2:]))
