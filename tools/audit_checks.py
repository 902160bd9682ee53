"""The questions of an audit, each a function that runs the module and compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from framestream.model.rollout import longest_rollout
from framestream.pipeline.errors import FramestreamError
from framestream.pipeline.masks import leaking_targets
from framestream.pipeline.sampling import FAST

from .audit_influence import changed
from .audit_report import Check
from .audit_runs import Runs

if TYPE_CHECKING:
    from framestream.model.autoregressive_reconstruction import ReconstructionOutput

_ROLLOUT_STEPS = 2


@dataclass(frozen=True)
class Perturbed:
    """What the change of each source did, bit by bit.

    Attributes:
        calm: the module's output with nothing changed.
        predictions: bool `[B, F]` for each source, predictions that changed.
        errors: the same for `frame_error`.
    """

    calm: ReconstructionOutput
    predictions: list[Tensor]
    errors: list[Tensor]


def perturb(runs: Runs) -> Perturbed:
    """Change each source in turn and run the whole module, from pixels to errors.

    Raises:
        FramestreamError: two runs on the same batch differ.
    """
    calm, again = runs.module(runs.batch), runs.module(runs.batch)
    runs.step(0)
    if changed(calm.predictions, again.predictions).any() or changed(calm.frame_error, again.frame_error).any():
        raise FramestreamError(
            "two runs on the same batch give different results, so that no comparison proves anything: use "
            "deterministic kernels, or another attention_backend."
        )
    predictions, errors, leaks = [], [], 0
    for source in runs.sources:
        out = runs.module(runs.changed_batch([source]))
        predictions.append(changed(calm.predictions, out.predictions))
        errors.append(changed(calm.frame_error, out.frame_error))
        leaks += int((predictions[-1] & ~runs.may_reach(source)).sum())
        runs.step(leaks)
    return Perturbed(calm, predictions, errors)


def check_frames(runs: Runs, found: Perturbed) -> Check:
    """Predictions change where they may see the change, and nowhere else."""
    leaks, silent = [], 0
    for source, moved in zip(runs.sources, found.predictions, strict=True):
        may = runs.may_reach(source)
        leaks += [_reaches(runs.source(source, b), runs, b, i) for b, i in (moved & ~may).nonzero().tolist()]
        silent += int((may & ~moved).sum())
    shown = sum(not source.is_padding for source in runs.sources)
    return Check(
        "frames",
        f"{shown} frames changed in turn: predictions that must not see it are equal in every bit",
        leaks,
        silent,
    )


def check_errors(runs: Runs, found: Perturbed) -> Check:
    """The error of a frame follows from what its prediction sees and from its target, and the loss from the errors."""
    leaks, silent = [], 0
    for source, moved in zip(runs.sources, found.errors, strict=True):
        may = runs.may_reach(source)
        for query, target in enumerate(runs.targets[source.clip]):
            may[source.clip, query] |= target in source.positions and not source.is_padding
        may &= runs.scored
        leaks += [
            f"{runs.source(source, b)} reaches the error at {runs.frame(b, i)}, which must not depend on it"
            for b, i in (moved & ~may).nonzero().tolist()
        ]
        silent += int((may & ~moved).sum())
    error = found.calm.frame_error.cpu()
    counted = error[runs.scored]
    mean = float(counted.double().mean()) * runs.module.config.loss_weight if len(counted) else 0.0
    if not torch.equal(~error.isnan(), runs.scored) or abs(float(found.calm.loss) - mean) > 1e-4 * abs(mean):
        leaks.append("the loss is not the mean error of the frames that are scored")
    said = f"{len(counted)} errors depend on what their prediction sees and on their target; the loss is their mean"
    return Check("errors", said, leaks, silent)


def check_states(runs: Runs) -> Check:
    """Hidden states of a host model, each made at the time of a frame, reach no prediction made before."""
    calm = runs.predictions_from_states()
    leaks, silent, count = [], 0, runs.state_times.shape[1]
    for state in range(count):
        moved = changed(calm, runs.predictions_from_states(state))
        may = runs.may_read[:, :, state]
        leaks += [_reaches(runs.state(b, state), runs, b, i) for b, i in (moved & ~may).nonzero().tolist()]
        silent += int((may & ~moved).sum())
        runs.step(len(leaks))
    said = f"{count} hidden states changed in turn: no frame reads one that is later than itself"
    return Check("states", said, leaks, silent)


def check_gradient(runs: Runs) -> tuple[Check, list[Tensor]]:
    """Derivatives of what each frame gives to the loss, by embeddings and hidden states; and bool `[F, F]` by clip."""
    leaks, silent, found = [], 0, []
    for b in range(len(runs.layouts)):
        frames, states = runs.derivatives(b)
        allowed, may_read = runs.allowed[b], runs.may_read[b]
        found.append(frames)
        for i, j in (frames & ~allowed).nonzero().tolist():
            leaks.append(_reaches(runs.clip(b) + runs.frame(b, j), runs, b, i))
        leaks += [_reaches(runs.state(b, s), runs, b, i) for i, s in (states & ~may_read).nonzero().tolist()]
        silent += int((allowed & ~frames).sum()) + int((may_read & ~states).sum())
        runs.step(len(leaks))
    where = "wherever" if silent else "exactly where"
    said = f"derivatives are zero {where} the mask through {runs.num_layers} layers says so"
    return Check("gradient", said, leaks, silent), found


def check_targets(runs: Runs, found: Perturbed, gradient: Sequence[Tensor], on_leak: str) -> Check:
    """No score for what can be seen: by measurement, and by what the package counts."""
    leaks = []
    for source, moved in zip(runs.sources, found.predictions, strict=True):
        if source.is_padding:
            continue
        b, at = source.clip, list(source.positions)
        reached = moved[b] | gradient[b][:, at].any(-1)
        shows = runs.after_target(b)[:, at].any(-1)
        for query in (shows & runs.scored[b] & reached).nonzero().flatten().tolist():
            at_query, target = runs.frame(b, query), runs.frame(b, runs.targets[b][query])
            leaks.append(f"{runs.source(source, b)} reaches the prediction at {at_query}, which is scored on {target}")
    visible = torch.tensor(
        [leaking_targets(layout, runs.clips.mask[b], runs.num_layers) for b, layout in enumerate(runs.layouts)]
    )
    if not leaks and (runs.scored & visible).any():
        leaks.append(f"{int((runs.scored & visible).sum())} targets are scored although the mask shows them")
    if on_leak == "raise" and visible.any():
        leaks.append(f"{int(visible.sum())} targets are visible, and on_leak: raise stops training at such a batch")
    targets, scored = int(runs.clips.has_target.sum()), int(runs.scored.sum())
    said = f"{scored} of {targets} targets are scored, and no prediction sees what it is scored on"
    if left_out := int((visible & ~runs.scored).sum()):
        said += f"; {left_out} that can be seen are left out of the loss"
    return Check("targets", said, leaks, 0, [] if scored else ["no target is left to learn from"])


def check_rollout(runs: Runs) -> Check | None:
    """Generated frames depend on the history only: change all that comes after it, and then its last frame.

    None where the clips have no room for a rollout.
    """
    steps = min(_ROLLOUT_STEPS, longest_rollout(runs.clips))
    if steps < 1:
        return None
    later, last = [], []
    for source in runs.sources:
        layout = runs.layouts[source.clip]
        fast = sorted(
            i for i, s, v in zip(layout.frame_index, layout.stream, layout.valid, strict=True) if s == FAST and v
        )
        if len(fast) > steps:
            later += [source] if source.index > fast[-steps - 1] else []
            last += [source] if source.index == fast[-steps - 1] else []
    calm = runs.module.rollout(runs.batch, steps).predictions
    after = runs.module.rollout(runs.changed_batch(later), steps).predictions
    leaks = [
        f"{runs.clip(b)}true frames after the history reach generated frame {s + 1}"
        for b, s in changed(calm, after).nonzero().tolist()
    ]
    before = runs.module.rollout(runs.changed_batch(last), steps).predictions
    clips = sorted({source.clip for source in last})
    silent = int((~changed(calm, before)[clips]).sum())
    said = f"{steps} generated frames of {len(clips)} clips depend on no true frame after the history"
    return Check("rollout", said, leaks, silent)


def _reaches(name: str, runs: Runs, clip: int, query: int) -> str:
    return f"{name} reaches the prediction at {runs.frame(clip, query)}, which must not see it"
