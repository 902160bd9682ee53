"""How good is the model? Its error divided by the error of repeating the last frame.

Ratios are of sums over frames, never means of ratios, so that clips in which nothing moves cannot dominate. Below 1
the model knows more about the next frame than the current frame does. Two numbers belong together: *teacher-forced*
(true history) and *rollout* (its own predictions as history). A mask that shows the target makes the first one
splendid and leaves the second one poor; targets that the mask can see are therefore left out, and counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction

FAST = 1


@dataclass(frozen=True)
class ErrorSum:
    """Errors summed over `frames` target frames; both sums run over the same frames."""

    model: float = 0.0
    copy_last: float = 0.0
    frames: int = 0

    @property
    def ratio(self) -> float:
        """Model error / copy-last error; NaN where nothing was measured or nothing moved."""
        return self.model / self.copy_last if self.frames and self.copy_last > 0 else float("nan")

    def __add__(self, other: ErrorSum) -> ErrorSum:
        return ErrorSum(self.model + other.model, self.copy_last + other.copy_last, self.frames + other.frames)

    @classmethod
    def over(cls, model: Tensor, copy_last: Tensor) -> ErrorSum:
        """Sum errors of any one shape over the frames where both are measured (NaN = no target)."""
        there = torch.isfinite(model) & torch.isfinite(copy_last)
        return cls(float(model[there].double().sum()), float(copy_last[there].double().sum()), int(there.sum()))


@dataclass(frozen=True)
class Evaluation:
    """Errors on held-out clips.

    `teacher_forced` is over every fast target frame, `slow` over every slow one (further apart in time, so harder to
    copy). `rollout[s]` is the (s+1)-th frame that the model generates from its own output, and `forced_steps[s]`
    the teacher-forced error on exactly those frames. In `rollout`, copy-last repeats the last true history frame.
    """

    clips: int
    teacher_forced: ErrorSum
    slow: ErrorSum
    rollout: tuple[ErrorSum, ...]
    forced_steps: tuple[ErrorSum, ...]
    leaking_targets: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with the ratios written out."""

        def one(errors: ErrorSum) -> dict[str, Any]:
            return {**asdict(errors), "ratio": errors.ratio if errors.ratio == errors.ratio else None}

        return {
            "clips": self.clips,
            "teacher_forced": one(self.teacher_forced),
            "slow": one(self.slow),
            "rollout": [one(step) for step in self.rollout],
            "forced_steps": [one(step) for step in self.forced_steps],
            "leaking_targets": self.leaking_targets,
            "seconds": self.seconds,
        }


def _forced_steps(batch: Mapping[str, Any], steps: int, error: Tensor, copied: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher-forced errors `[B, steps]` of the predictions whose targets are the last `steps` fast frames."""
    picked = torch.full((2, error.shape[0], steps), float("nan"))
    for row in range(error.shape[0]):
        usable = batch["frame_valid"][row].cpu() & (batch["frame_stream"][row].cpu() == FAST)
        fast = torch.nonzero(usable).flatten()
        fast = fast[batch["frame_index"][row].cpu()[fast].argsort(stable=True)]
        queries = fast[-steps - 1 : -1]  # the prediction of a frame is made at the frame before it
        if len(queries) == steps:
            picked[0, row], picked[1, row] = error[row, queries], copied[row, queries]
    return picked[0], picked[1]


@torch.no_grad()
def evaluate(
    module: AutoregressiveReconstruction,
    loader: Iterable[Mapping[str, Any]],
    *,
    rollout_steps: int = 4,
    max_batches: int | None = None,
    loss: str | None = None,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Measure a reconstruction module on the clips of a loader.

    Args:
        module: an `AutoregressiveReconstruction`; put into eval mode and back.
        loader: batches of `build_loader(..., shuffle=False, drop_last=False)`.
        rollout_steps: how many frames to generate; 0 leaves rollout out.
        max_batches: stop after this many batches; None takes them all.
        loss: measure this error instead of the module's own loss, e.g. "mse" of a model trained on "l1".
        autocast: run under autocast with this dtype.

    Returns:
        Sums over this process's clips; `gather_evaluation` adds up those of all ranks.
    """
    from .rollout import rollout

    device = next(module.parameters()).device
    was_training, started = module.training, time.perf_counter()
    module.eval()
    config = module.config
    # A run that trains on leaking targets is still not measured on them.
    on_leak = "exclude" if config.on_leak == "allow" else config.on_leak
    module.config = replace(config, on_leak=on_leak, loss=loss or config.loss)
    clips = leaking = 0
    forced = slow = ErrorSum()
    forced_steps = [ErrorSum()] * rollout_steps
    generated = [ErrorSum()] * rollout_steps
    try:
        for number, batch in enumerate(loader):
            if number == max_batches:
                break
            batch = move_batch(batch, device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                output = module(batch)
                error, copied = output.frame_error.float().cpu(), output.copy_last_error.float().cpu()
                # A rank without a row of its own repeats one, which must not count twice.
                real = torch.tensor([not meta.get("padding") for meta in batch["meta"]])
                error[~real] = torch.nan
                fast = batch["frame_stream"].cpu() == FAST
                forced += ErrorSum.over(error[fast], copied[fast])
                slow += ErrorSum.over(error[~fast], copied[~fast])
                if rollout_steps:
                    step_error, step_copied = _forced_steps(batch, rollout_steps, error, copied)
                    free = rollout(module, batch, rollout_steps)
                    for s in range(rollout_steps):
                        forced_steps[s] += ErrorSum.over(step_error[:, s], step_copied[:, s])
                        generated[s] += ErrorSum.over(
                            free.frame_error[real, s].float().cpu(), free.copy_last_error[real, s].float().cpu()
                        )
            leaking += int(output.leaking_targets)
            clips += int(real.sum())
    finally:
        module.config = config
        module.train(was_training)
    seconds = time.perf_counter() - started
    return Evaluation(clips, forced, slow, tuple(generated), tuple(forced_steps), leaking, seconds)


def gather_evaluation(mine: Evaluation) -> Evaluation:
    """The sum over all ranks of a distributed run; the evaluation itself where there is one process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)

    def total(parts: Iterable[ErrorSum]) -> ErrorSum:
        return sum(parts, ErrorSum())

    return Evaluation(
        clips=sum(e.clips for e in everyone),
        teacher_forced=total(e.teacher_forced for e in everyone),
        slow=total(e.slow for e in everyone),
        rollout=tuple(total(parts) for parts in zip(*(e.rollout for e in everyone), strict=True)),
        forced_steps=tuple(total(parts) for parts in zip(*(e.forced_steps for e in everyone), strict=True)),
        leaking_targets=sum(e.leaking_targets for e in everyone),
        seconds=max(e.seconds for e in everyone),
    )


def move_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with everything that has `.to` (tensors, the mask) on `device`."""
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor)
        else value.to(device)
        if hasattr(value, "to")
        else value
        for name, value in batch.items()
    }
