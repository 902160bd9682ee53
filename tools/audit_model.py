"""The audit of a reconstruction module: what reaches what, through tower, predictor, conditioning, loss and rollout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError

from .audit_checks import (
    Perturbed,
    check_errors,
    check_frames,
    check_gradient,
    check_rollout,
    check_states,
    check_targets,
    perturb,
)
from .audit_report import ModelAudit
from .audit_runs import Progress, Runs

if TYPE_CHECKING:
    from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction


def audit_reconstruction(
    module: AutoregressiveReconstruction, batch: Mapping[str, Any], *, seed: int = 0, progress: Progress | None = None
) -> ModelAudit:
    """Show for a built module that nothing reaches a prediction which its mask hides, and that no score is a copy.

    Pixels are changed through the whole module; derivatives begin at the tower's embeddings. A module whose last layers
    are still zero repeats every frame, which proves nothing: see `framestream.tools.audit_batch.wake`.

    Args:
        module: it is run in eval mode, and left as it was.
        batch: as its `forward` takes it.
        seed: of what frames and states are changed into.
        progress: called with (runs done, runs in all, leaks so far).

    Raises:
        FramestreamError: two runs on one input differ, so that nothing can be proved.
        ConfigError: as the module's `forward`; a packed batch, whose clips are audited one by one.
    """
    if "frame_clip" in batch:
        raise ConfigError("an audit takes clips one by one, and this batch is packed: leave pack_to out.")
    on_leak = module.config.on_leak
    with _quiet_eval(module), torch.no_grad():
        runs = Runs(module, batch, seed, progress or (lambda done, total, leaks: None))
        found = perturb(runs)
        checks = [check_frames(runs, found), check_errors(runs, found), check_states(runs)]
        gradient_check, gradient = check_gradient(runs)
        checks += [gradient_check, check_targets(runs, found, gradient, on_leak)]
        if (rollout := check_rollout(runs)) is not None:
            checks.append(rollout)
    runs.end(sum(len(check.leaks) for check in checks))
    measured = [_measured(runs, found, b, gradient[b]) for b in range(len(gradient))]
    return ModelAudit(
        checks=checks,
        layouts=runs.layouts,
        attends=runs.attends,
        allowed=runs.allowed,
        measured=measured,
        revealing=[reached & runs.after_target(b) for b, reached in enumerate(measured)],
        scored=runs.scored,
        num_layers=runs.num_layers,
        proves_nothing=_proves_nothing(runs, found, gradient),
        seconds=runs.seconds,
    )


@contextmanager
def _quiet_eval(module: AutoregressiveReconstruction) -> Iterator[None]:
    """Eval mode, without the warning about leaks, and counting them where the config would raise."""
    was_training, config = module.training, module.config
    module.eval()
    if config.on_leak == "raise":
        module.config = replace(config, on_leak="exclude")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        module.config = config
        module.train(was_training)


def _measured(runs: Runs, found: Perturbed, clip: int, gradient: Tensor) -> Tensor:
    """bool `[F, F]` by place in the sequence: the gradient's, and leaks that only a change of pixels shows."""
    measured = gradient.clone()
    for source, moved in zip(runs.sources, found.predictions, strict=True):
        if source.clip == clip:
            unexplained = moved[clip] & ~runs.may_reach(source)[clip]
            measured[:, list(source.positions)] |= unexplained[:, None]
    return measured


def _proves_nothing(runs: Runs, found: Perturbed, gradient: list[Tensor]) -> bool:
    """Frames may see others, and one of the instruments never noticed that any did."""
    changed_another = False
    for source, moved in zip(runs.sources, found.predictions, strict=True):
        elsewhere = moved[source.clip].clone()
        elsewhere[list(source.positions)] = False
        changed_another |= bool(elsewhere.any())
    return any(map(_off_diagonal, runs.allowed)) and not (changed_another and any(map(_off_diagonal, gradient)))


def _off_diagonal(matrix: Tensor) -> bool:
    return bool((matrix & ~torch.eye(len(matrix), dtype=torch.bool)).any())
