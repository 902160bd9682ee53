"""How good is the model? Its error divided by the error of repeating the last frame.

Ratios are of sums over frames, never means of ratios, so that clips in which nothing moves cannot dominate. Below 1
the model knows more about the next frame than the current frame does. Two numbers belong together: *teacher-forced*
(true history) and *rollout* (its own predictions as history). A mask that shows the target makes the first one
splendid and leaves the second one poor; targets that the mask can see are therefore left out, and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FAST

from .clips import frames_at
from .losses import patch_error

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction, PreparedClips

View = Callable[[Tensor], Tensor]


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

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with the ratio written out; None where it is NaN."""
        return {**asdict(self), "ratio": self.ratio if self.ratio == self.ratio else None}

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
    the teacher-forced error on those frames, as far as the mask hides them from their query. In `rollout`, copy-last
    repeats the last true history frame. Of `unreadable` clips nothing is measured: the spares that a loader gives in
    their place are clips of the same set, which would count twice.
    """

    clips: int
    teacher_forced: ErrorSum
    slow: ErrorSum
    rollout: tuple[ErrorSum, ...]
    forced_steps: tuple[ErrorSum, ...]
    leaking_targets: int
    seconds: float
    unreadable: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave, of this or an earlier version."""

        def errors(entry: Mapping[str, Any]) -> ErrorSum:
            return ErrorSum(float(entry["model"]), float(entry["copy_last"]), int(entry["frames"]))

        return cls(
            clips=int(values["clips"]),
            teacher_forced=errors(values["teacher_forced"]),
            slow=errors(values["slow"]),
            rollout=tuple(map(errors, values["rollout"])),
            forced_steps=tuple(map(errors, values["forced_steps"])),
            leaking_targets=int(values["leaking_targets"]),
            seconds=float(values["seconds"]),
            unreadable=int(values.get("unreadable", 0)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with the ratios written out."""
        return {
            "clips": self.clips,
            "unreadable": self.unreadable,
            "teacher_forced": self.teacher_forced.to_json(),
            "slow": self.slow.to_json(),
            "rollout": [step.to_json() for step in self.rollout],
            "forced_steps": [step.to_json() for step in self.forced_steps],
            "leaking_targets": self.leaking_targets,
            "seconds": self.seconds,
        }


def view_of(module: AutoregressiveReconstruction) -> View:
    """Patches as they are measured: pixels where the tower can undo what it did, and nothing was done after it."""
    to_pixels = None if module.config.target_norm else getattr(module.tower.tower, "to_pixels", None)
    return to_pixels or (lambda patches: patches)


def last_fast(batch: Mapping[str, Any], count: int) -> Tensor:
    """int64 `[B, count]`: positions of the newest `count` fast frames in order of time; -1 for clips with fewer."""
    fast = ((batch["frame_stream"] == FAST) & batch["frame_valid"].bool()).cpu()
    found = torch.full((len(fast), count), -1)
    for row, (usable, index) in enumerate(zip(fast, batch["frame_index"].cpu(), strict=True)):
        places = usable.nonzero()[:, 0]
        if len(places) >= count:
            found[row] = places[index[places].argsort(stable=True)][-count:]
    return found


def _picked(error: Tensor, at: Tensor) -> Tensor:
    """`[B, F]` at positions `[B, n]`, NaN where the position is -1."""
    return torch.where(at >= 0, error.gather(1, at.clamp(min=0)), torch.nan)


def _errors(clips: PreparedClips, predicted: Tensor, view: View, metric: str) -> tuple[Tensor, Tensor]:
    """Teacher-forced errors of the model and of copying, float32 `[B, F]` on the CPU; NaN where nothing is scored."""
    truth = view(frames_at(clips.embeddings, clips.targets))
    pair = (clips.frame_error(view(guess), truth, metric) for guess in (predicted, clips.embeddings))
    model, copied = (torch.where(clips.scored, error, torch.nan).float().cpu() for error in pair)
    return model, copied


def _rollout_errors(clips: PreparedClips, made: Tensor, last: Tensor, view: View, metric: str) -> tuple[Tensor, Tensor]:
    """Errors of generated frames and of repeating the last true one, float32 `[B, steps]`; NaN without a rollout."""
    at = last.clamp(min=0).to(clips.embeddings.device)
    frames = view(frames_at(clips.embeddings, at)[:, :, : made.shape[2]])  # [B, steps + 1, P, D]
    pair = (patch_error(guess, frames[:, 1:], metric).mean(-1) for guess in (view(made), frames[:, :1]))
    known = last[:, 1:] >= 0
    model, copied = (torch.where(known, error.cpu(), torch.nan) for error in pair)
    return model, copied


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
        loss: measure this error instead of the module's own loss, e.g. "mse" of a model trained on "l1". Towers that
            can give their patches back as pixels (`to_pixels`) are measured in pixels, without `target_norm`.
        autocast: predict under autocast with this dtype; what is measured against stays in full precision.

    Returns:
        Sums over this process's clips; `gather_evaluation` adds up those of all ranks. Clips that could not be read
        are counted and left out, with the spares in their place.

    Raises:
        ConfigError: clips share sequences (`pack_to`).
    """
    from .rollout import generate

    device = next(module.parameters()).device
    was_training, started = module.training, time.perf_counter()
    module.eval()
    config = module.config
    # A run that trains on leaking targets is still not measured on them.
    on_leak = "exclude" if config.on_leak == "allow" else config.on_leak
    module.config = replace(config, on_leak=on_leak)
    metric, view = loss or config.loss, view_of(module)
    clips = unreadable = leaking = 0
    forced = slow = ErrorSum()
    forced_steps = [ErrorSum()] * rollout_steps
    generated = [ErrorSum()] * rollout_steps
    try:
        for number, batch in enumerate(loader):
            if number == max_batches:
                break
            batch = move_batch(batch, device)
            frames = module.prepare(batch)
            if frames.clip is not None:
                raise ConfigError("an evaluation counts clips, and these share sequences: use a loader without pack_to")
            rows = batch.get("meta") or [{}] * len(frames.layouts)
            # A rank without a row of its own repeats one, and a clip that cannot be read is replaced by a spare, which
            # is another one of the set: neither must count twice.
            padding = torch.tensor([bool(meta.get("padding")) for meta in rows])
            spare = torch.tensor([meta.get("spare_for") is not None for meta in rows])
            real = ~(padding | spare)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                tokens = module.predict(frames)
                made = generate(module, frames, rollout_steps).predictions if rollout_steps else None
            error, copied = _errors(frames, frames.unpack(tokens.float()), view, metric)
            error[~real] = torch.nan
            fast = frames.stream.cpu() == FAST
            forced += ErrorSum.over(error[fast], copied[fast])
            slow += ErrorSum.over(error[~fast], copied[~fast])
            if made is not None:
                last = last_fast(batch, rollout_steps + 1)  # the last true one of the rollout first
                step_error, step_copied = _rollout_errors(frames, made.float(), last, view, metric)
                step_error[~real] = torch.nan
                for s in range(rollout_steps):
                    queries = last[:, s : s + 1]  # the prediction of a frame is made at the frame before it
                    forced_steps[s] += ErrorSum.over(_picked(error, queries), _picked(copied, queries))
                    generated[s] += ErrorSum.over(step_error[:, s], step_copied[:, s])
            leaking += int((frames.has_target & ~frames.scored).cpu()[real].sum())
            clips += int(real.sum())
            unreadable += int((spare & ~padding).sum())
    finally:
        module.config = config
        module.train(was_training)
    seconds = time.perf_counter() - started
    return Evaluation(clips, forced, slow, tuple(generated), tuple(forced_steps), leaking, seconds, unreadable)


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
        unreadable=sum(e.unreadable for e in everyone),
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
