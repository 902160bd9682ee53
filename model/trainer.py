"""The training loop, to be read in one sitting.

Everything random in step s is seeded by (seed, s, rank) and the batches come from a loader whose order is a pure
function of its state. A run that was killed and resumed therefore computes the very same numbers as one that was not
(on one process; several processes add up their gradients in an order that the transport decides).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from framestream.pipeline.errors import ConfigError, FramestreamError

from . import checkpoint as ckpt
from .compiled_masks import MaskWatch
from .evaluate import Evaluation, evaluate, gather_evaluation, move_batch
from .metrics import METRICS_FILE, MetricsLog, differences, read_metrics, without
from .parallel import compile_blocks, eager, is_sharded, parallel, sync_gradients, whole, whole_weights
from .ranks import Ranks, any_rank, mean_over_ranks, pick_device
from .train_settings import TrainSettings

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction

CHECKPOINTS = "checkpoints"


class ResumableLoader(Protocol):
    """What the loop needs of a loader: `framestream.pipeline.build_loader` gives one."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """One epoch, or what is left of it; the next call gives the next epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in a few integers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


@dataclass
class Progress:
    """What a progress bar shows after a step."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    wait_share: float
    evaluation: Evaluation | None = None


@dataclass
class TrainResult:
    """How a call of `train` ended."""

    step: int
    finished: bool
    resumed_from: int
    evaluation: Evaluation | None
    samples: int
    seconds: float
    clock: dict[str, float] = field(default_factory=dict)


class Clock:
    """Seconds by name. On CUDA the work runs behind the calls, so forward is short and the waiting is in backward."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """SIGTERM and the first Ctrl-C ask the loop to save and end; a second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        for number in before:
            signal.signal(number, ask)
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed_step(seed: int, step: int, rank: int) -> None:
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _endless(loader: ResumableLoader) -> Iterator[Mapping[str, Any]]:
    """Epoch after epoch. A resumed epoch may be over already; two empty ones in a row mean that there is nothing."""
    empty = 0
    while empty < 2:
        empty += 1
        for batch in loader:
            empty = 0
            yield batch
    raise ConfigError(
        "The training data gives no batch: there are fewer clips than one global batch. "
        "Use a smaller data.batch_size or more clips."
    )


def _optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},  # norms, biases: nothing to decay
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))


def _told_apart(loader: ResumableLoader | None) -> str | None:
    """16 hex digits of which clips a loader gives, however many at a time; None where it does not say."""
    facts = {} if loader is None else loader.state_dict().get("fingerprint", {})
    named = without(facts, ("global_batch",))
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16] if named else None


def train(
    module: AutoregressiveReconstruction,
    loader: ResumableLoader,
    settings: TrainSettings,
    *,
    output: Path | str,
    config: Mapping[str, Any] | None = None,
    ignored: Collection[str] = (),
    eval_loader: ResumableLoader | None = None,
    ranks: Ranks | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_start: Callable[[bool], None] | None = None,
) -> TrainResult:
    """Train `module`, from the newest checkpoint in `output` where there is one.

    Args:
        module: called with a batch, returns an object with `.loss`; moved to the device.
        loader: gives batches, and its state; see `ResumableLoader`.
        settings: see `TrainSettings`.
        output: run folder: checkpoints/, metrics.jsonl, tensorboard/.
        config: plain values that decide the result. A checkpoint that was written with others is refused.
        ignored: dotted names of settings that do not, and that a checkpoint may hold all the same.
        eval_loader: held-out clips; None evaluates nothing.
        ranks: of `distributed()`.
        on_progress: called after every step on rank 0.
        on_start: called on rank 0 before the first step, when everything fits, with whether it is forgotten which step
            was the best: the held-out clips are others than those that the checkpoint was measured on.

    Raises:
        ConfigError: `output` holds a run with another config, or the loader gives nothing.
        FramestreamError: loss or gradient became infinite or NaN; nothing is saved from that step on.
    """
    ranks, output = ranks or Ranks(), Path(output)
    folder, first_rank = output / CHECKPOINTS, ranks.rank == 0
    output.mkdir(parents=True, exist_ok=True)
    device = pick_device(settings.device, ranks.local)
    module.to(device)
    plain_config = json.loads(json.dumps(dict(config or {})))  # as it comes back from a checkpoint

    newest = ckpt.latest_checkpoint(folder)
    step = 0
    if newest is not None:
        if changed := differences(without(newest.state["config"], ignored), plain_config):
            raise ConfigError(
                f"{output} holds a run with another configuration ({'; '.join(changed)}): "
                "choose another output folder, or restore the setting to resume."
            )
        ckpt.load_weights(newest.path, module)
        loader.load_state_dict(dict(newest.state["loader"]))
        step = newest.step
    resumed_from = step
    best = float(newest.state["best"]) if newest is not None and newest.state["best"] is not None else math.inf
    measured_on, before = _told_apart(eval_loader), None if newest is None else newest.state.get("held_out")
    other_clips = None not in (measured_on, before) and measured_on != before
    measured_on = measured_on or before

    watch = MaskWatch(module, device) if settings.compile else None
    if settings.compile:
        compile_blocks(module)
    model = parallel(module, settings.parallel, ranks, device)
    optimizer = _optimizer(module, settings)
    if newest is not None:
        ckpt.load_optimizer(newest.path, optimizer)
    autocast_dtype = torch.bfloat16 if settings.precision == "bf16" else None
    parameters = [p for p in module.parameters() if p.requires_grad]
    evaluated_at_the_end = not other_clips and any(
        row["step"] == step == settings.steps and "eval" in row for row in read_metrics(output / METRICS_FILE)
    )
    forgotten = other_clips and math.isfinite(best)
    if other_clips:
        best = math.inf
        if first_rank:
            ckpt.forget_best(folder)
    if first_rank and on_start:
        on_start(forgotten)
    metrics = MetricsLog(output, resumed_from, settings.tensorboard, first_rank)
    clock, samples, started = Clock(), 0, time.perf_counter()
    window_start, window_samples, window_wait = started, 0, 0.0
    evaluation: Evaluation | None = None

    def save() -> None:
        with clock("checkpoint"):
            if first_rank or is_sharded(module):
                weights, moments = ckpt.weights_of(module, first_rank), ckpt.optimizer_of(optimizer, first_rank)
            if first_rank:
                state = {
                    "step": step,
                    "loader": loader.state_dict(),
                    "config": plain_config,
                    "best": best if math.isfinite(best) else None,
                    "held_out": measured_on,
                }
                ckpt.write_checkpoint(folder, weights, moments, state)
                if step > resumed_from:  # a finished run that is only evaluated again loses nothing
                    ckpt.prune(folder, settings.keep_last)

    def measure() -> Evaluation:
        nonlocal best
        assert eval_loader is not None
        # Clips are generated frame by frame, in shapes that are not worth compiling.
        with clock("evaluate"), whole_weights(module), eager():
            found = gather_evaluation(
                evaluate(
                    module,
                    eval_loader,
                    rollout_steps=settings.rollout_steps,
                    max_batches=settings.eval_batches,
                    loss=settings.eval_loss,
                    autocast=autocast_dtype,
                )
            )
        metrics.write(step, eval=found.to_json())
        if found.teacher_forced.ratio < best:
            best = found.teacher_forced.ratio
            if first_rank:
                folder.mkdir(exist_ok=True)
                ckpt.mark_best(folder, step, best)
            save()
        return found

    with _stop_requests() as stop_asked:
        try:
            model.train()
            batches = _endless(loader)
            while step < settings.steps:
                _seed_step(settings.seed, step, ranks.rank)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr_at(step)
                optimizer.zero_grad(set_to_none=True)
                loss_sum, keys = torch.zeros((), device=device), []
                for part in range(settings.accumulate):
                    with clock("wait"):
                        wait_started = time.perf_counter()
                        batch = move_batch(next(batches), device)
                        window_wait += time.perf_counter() - wait_started
                    keys += list(batch.get("keys", ()))
                    if watch is not None:
                        watch(batch)
                    last_part = part == settings.accumulate - 1
                    with sync_gradients(model, last_part):
                        with clock("forward"), torch.autocast(device.type, autocast_dtype, autocast_dtype is not None):
                            loss = model(batch).loss / settings.accumulate
                        with clock("backward"):
                            loss.backward()
                    loss_sum += loss.detach()
                    clips = len(batch.get("keys", batch["video_frames"]))  # in packed sequences there are more
                    samples += clips * ranks.world
                    window_samples += clips * ranks.world
                with clock("optimise"):
                    norm = whole(nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf))
                    loss_value, norm_value = mean_over_ranks(loss_sum, ranks).item(), norm.item()
                    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                        raise FramestreamError(
                            f"Step {step + 1}: loss {loss_value}, gradient norm {norm_value}, lr "
                            f"{settings.lr_at(step):g}, clips {', '.join(keys[:8])}. Nothing was saved from this step; "
                            "lower train.lr or look at these clips, and run again to go on from the last checkpoint."
                        )
                    optimizer.step()
                step += 1

                elapsed = max(time.perf_counter() - window_start, 1e-9)
                rate, wait_share = window_samples / elapsed, window_wait / elapsed
                if step % settings.log_every == 0 or step == settings.steps:
                    metrics.write(
                        step,
                        loss=loss_value,
                        lr=settings.lr_at(step - 1),
                        grad_norm=norm_value,
                        samples_per_s=round(rate, 3),
                        wait_share=round(wait_share, 4),
                        **_of_loader(loader),
                    )
                    window_start, window_samples, window_wait = time.perf_counter(), 0, 0.0
                stopping = any_rank(stop_asked(), device, ranks)
                due = settings.eval_every and step % settings.eval_every == 0 and step < settings.steps
                evaluation = measure() if due and eval_loader is not None and not stopping else None
                if evaluation is not None:
                    window_start, window_samples, window_wait = time.perf_counter(), 0, 0.0
                if stopping or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
                    save()
                if first_rank and on_progress:
                    on_progress(Progress(step, settings.steps, loss_value, rate, wait_share, evaluation))
                if stopping:
                    break
            finished = step >= settings.steps
            if finished and resumed_from < settings.steps:
                save()
            if finished and eval_loader is not None and not evaluated_at_the_end:
                evaluation = measure()
        finally:
            metrics.close()
    seconds = time.perf_counter() - started
    return TrainResult(step, finished, resumed_from, evaluation, samples, seconds, clock.seconds)


_LOGGED = ("read_ms", "decode_ms", "rejects", "worker_restarts", "cache_hits", "cache_misses")


def _of_loader(loader: ResumableLoader) -> dict[str, float]:
    """What a loader that keeps statistics says of itself so far; on several ranks that of the first."""
    stats = loader.stats() if hasattr(loader, "stats") else {}
    return {name: round(stats[name], 3) for name in _LOGGED if name in stats}
