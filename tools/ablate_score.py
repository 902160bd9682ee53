"""Scores that can be compared over the rows: the same target frames, teacher-forced and generated.

`framestream.model.evaluate` leaves targets out that a mask shows to their query. Here they count, with what they gain:
what a leak pretends is one of the two numbers, and what is left of it in generation the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction, PreparedClips
from framestream.model.clips import frames_at
from framestream.model.evaluate import ErrorSum, last_fast, move_batch, view_of
from framestream.model.losses import patch_error
from framestream.model.rollout import generate
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import leaking_targets


@dataclass
class Score:
    """Errors of one run on held-out clips. Every row is scored on the same frames of the same clips.

    Attributes:
        teacher_forced: the newest `num_fast - 1` frames, each predicted from true frames.
        forced_steps: `[step]`, the same for the frames that are generated below.
        rollout: `[step]`, frames generated one after the other; copy-last repeats the last true frame.
        clips: with enough frames to be scored.
        targets: digest of which frames of which clips were predicted.
        leaking: how many of the scored targets their query can see.
        tokens: that a clip gives the model, mean over the clips; padding is none.
        fewest_tokens: the same of the clip with the fewest.
    """

    teacher_forced: ErrorSum
    forced_steps: list[ErrorSum]
    rollout: list[ErrorSum]
    clips: int
    targets: str
    leaking: int
    tokens: float
    fewest_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with the ratios written out."""
        return {
            "teacher_forced": self.teacher_forced.to_json(),
            "forced_steps": [step.to_json() for step in self.forced_steps],
            "rollout": [step.to_json() for step in self.rollout],
            "clips": self.clips,
            "targets": self.targets,
            "leaking": self.leaking,
            "tokens": self.tokens,
            "fewest_tokens": self.fewest_tokens,
        }


def valid_tokens(layout: FrameLayout) -> int:
    """Tokens of the frames that are there; those of padding only keep the shape static."""
    return sum(patches for patches, valid in zip(layout.patches, layout.valid, strict=True) if valid)


@torch.no_grad()
def score(
    module: AutoregressiveReconstruction,
    loader: Iterable[Mapping[str, Any]],
    *,
    frames: int,
    rollout_steps: int,
    loss: str | None = None,
    max_batches: int | None = None,
) -> Score:
    """Measure a module on the newest `frames` fast frames of each clip; the first of them is no target.

    Args:
        module: put into eval mode and back.
        loader: held-out batches, in a fixed order.
        frames: fast frames that every row of the ablation has.
        rollout_steps: frames to generate, fewer than `frames`.
        loss: error to measure in place of the module's own. Towers that can give patches back as pixels
            (`to_pixels`) are measured in pixels, without `target_norm`.
        max_batches: stop after so many; None takes all.

    Raises:
        ConfigError: no clip has `frames` fast frames.
    """
    was_training, config = module.training, module.config
    device = next(module.parameters()).device
    metric, view = loss or config.loss, view_of(module)
    digest, leaking = hashlib.sha256(), 0
    tokens: list[int] = []  # of each clip
    forced = [ErrorSum()] * (frames - 1)
    made = [ErrorSum()] * rollout_steps
    module.eval()
    module.config = replace(config, on_leak="allow")  # count leaking targets, whatever the row was trained on
    try:
        for number, batch in enumerate(loader):
            if number == max_batches:
                break
            at = last_fast(batch, frames)
            kept = [
                row
                for row, meta in enumerate(batch.get("meta") or [{}] * len(at))
                if at[row, 0] >= 0 and not meta.get("padding")
            ]
            if not kept:
                continue
            for row in kept:
                digest.update(f"{batch['keys'][row]} {batch['frame_index'][row][at[row]].tolist()}\n".encode())
            prepared = module.prepare(move_batch(batch, device))
            predicted = prepared.unpack(module.predict(prepared).float())
            free = generate(module, prepared, rollout_steps).predictions.float()
            patches = free.shape[2]  # of a fast frame
            place = at.clamp(min=0).to(device)
            pair = (frames_at(values, place)[:, :, :patches] for values in (prepared.embeddings, predicted))
            true, guess = map(view, pair)
            free = view(free)
            model, copied = (_errors(values[:, :-1], true[:, 1:], metric, kept) for values in (guess, true))
            free_model = _errors(free, true[:, frames - rollout_steps :], metric, kept)
            start = true[:, frames - rollout_steps - 1, None].expand_as(free)
            free_copied = _errors(start, true[:, frames - rollout_steps :], metric, kept)
            for i in range(frames - 1):
                forced[i] += ErrorSum.over(model[:, i], copied[:, i])
            for step in range(rollout_steps):
                made[step] += ErrorSum.over(free_model[:, step], free_copied[:, step])
            tokens += [valid_tokens(prepared.layouts[row]) for row in kept]
            leaking += _leaking(module, prepared, at, kept)
    finally:
        module.config = config
        module.train(was_training)
    if not tokens:
        raise ConfigError(f"No held-out clip has {frames} fast frames to be scored on: use longer clips.")
    steps = forced[len(forced) - rollout_steps :]
    mean = sum(tokens) / len(tokens)
    return Score(sum(forced, ErrorSum()), steps, made, len(tokens), digest.hexdigest()[:16], leaking, mean, min(tokens))


def _errors(guess: Tensor, true: Tensor, metric: str, kept: list[int]) -> Tensor:
    """float32 `[kept, n]` on the CPU."""
    return patch_error(guess, true, metric).mean(-1).float().cpu()[kept]


def _leaking(module: AutoregressiveReconstruction, prepared: PreparedClips, at: Tensor, kept: list[int]) -> int:
    found = 0
    for row in kept:
        seen = leaking_targets(prepared.layouts[row], prepared.mask[row], module.config.num_layers)
        found += sum(bool(seen[int(query)]) for query in at[row, :-1])
    return found
