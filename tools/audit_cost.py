"""What a leak costs: a leaky and an honest model trained alike, scored on true history and in their own rollout.

    python -m framestream.tools.audit_cost

Squares move over a grey ground and bounce. Both models see 8 slow and 8 fast frames of 16; one under `fast_slow` with
its visible targets in the loss, the other under `time_causal`. Errors are ratios to repeating the last frame.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.patch_basis import CosineTower, start_with_differences
from framestream.pipeline.sampling import FAST, FastSlowSampling

from .drawn_batch import drawn_batch

FRAMES, SIDE, PATCH = 16, 16, 4
FPS = 30.0
HELD_OUT = 10**9  # seed of the clips that are measured, apart from all training steps
MODELS = {"leaky": ("fast_slow", "allow"), "honest": ("time_causal", "exclude")}


@dataclass(frozen=True)
class LeakCost:
    """Errors of one model, as ratios to repeating the last frame, on held-out clips.

    Attributes:
        teacher_forced: of every fast frame, predicted from true frames.
        rollout: `[step]`, of frames generated one after the other.
    """

    teacher_forced: float
    rollout: tuple[float, ...]


def measure_leak_cost(seed: int, *, steps: int = 300, clips: int = 64, rollout_steps: int = 3) -> dict[str, LeakCost]:
    """Train a leaky and an honest model from the same start on the same clips, and score both; one to two minutes.

    Args:
        seed: of weights and clips.
        steps: training steps of 8 clips.
        clips: held-out clips.
        rollout_steps: frames to generate.
    """
    return {name: _train(*how, seed, steps, clips, rollout_steps) for name, how in MODELS.items()}


def moving_squares(clips: int, generator: torch.Generator) -> Tensor:
    """uint8 `[clips, FRAMES, 3, SIDE, SIDE]`: two squares each, at constant speed, bouncing off the border."""
    video = torch.full((clips, FRAMES, 3, SIDE, SIDE), 127, dtype=torch.uint8)
    pixels = torch.arange(SIDE)
    for _ in range(2):
        size = torch.randint(4, 7, (clips, 1), generator=generator)
        colour = torch.randint(0, 256, (clips, 3, 1, 1), generator=generator, dtype=torch.uint8)
        place = torch.rand(clips, 2, generator=generator) * (SIDE - size)
        direction = torch.randint(0, 2, (clips, 2), generator=generator) * 2 - 1
        speed = (torch.rand(clips, 2, generator=generator) * 1.5 + 0.5) * direction
        for frame in range(FRAMES):
            corner = place.round()[:, :, None]
            inside = (pixels >= corner) & (pixels < corner + size[:, :, None])  # [clips, 2, SIDE]
            shape = inside[:, 0, :, None] & inside[:, 1, None, :]
            video[:, frame] = torch.where(shape[:, None], colour, video[:, frame])
            place = place + speed
            speed = torch.where((place < 0) | (place > SIDE - size), -speed, speed)
            place = place.clamp(min=0).minimum(SIDE - size.float())
    return video


def batch_of(video: Tensor, rule: str) -> dict[str, Any]:
    """A loader's batch of clips `[B, FRAMES, 3, SIDE, SIDE]`."""
    return drawn_batch(video, FastSlowSampling(8, 8).plan(FRAMES), rule, (SIDE // PATCH) ** 2, FPS)


def _train(rule: str, on_leak: str, seed: int, steps: int, clips: int, rollout_steps: int) -> LeakCost:
    torch.manual_seed(seed)
    settings = {
        "embedding_dim": 3 * PATCH**2,
        "predictor_dim": 9 * PATCH**2,
        "num_heads": 3,
        "num_layers": 2,
        "loss_weight": 1.0,
        "on_leak": on_leak,
    }
    module = AutoregressiveReconstruction(CosineTower(SIDE, PATCH), 8, settings)
    start_with_differences(module.predictor)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = module(batch_of(moving_squares(8, generator), rule)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    module.eval()
    held_out = batch_of(moving_squares(clips, torch.Generator().manual_seed(HELD_OUT + seed)), rule)
    with torch.no_grad():
        forced = module(held_out)
        free = module.rollout(held_out, rollout_steps)
    fast = (held_out["frame_stream"] == FAST) & ~forced.frame_error.isnan()
    return LeakCost(
        float(forced.frame_error[fast].mean() / forced.copy_last_error[fast].mean()),
        tuple((free.frame_error.mean(0) / free.copy_last_error.mean(0)).tolist()),
    )


def main(seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Print a table of means over seeds, and the range."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "[0-9]+ targets of this batch")  # that is what is measured
    found = [measure_leak_cost(seed) for seed in seeds]
    print(f"error / copy-last error, mean over seeds {list(seeds)} (lowest to highest)")
    for name in MODELS:
        columns = [[one[name].teacher_forced, *one[name].rollout] for one in found]
        cells = [f"{statistics.mean(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in zip(*columns, strict=True)]
        print(f"{name:<7} true history {cells[0]}; generated frames {', '.join(cells[1:])}")


if __name__ == "__main__":
    main()
