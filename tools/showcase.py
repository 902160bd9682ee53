"""What the demo shows of a run: clips on their time line, the mask, forecasts as pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framestream.model.evaluate import move_batch
from framestream.model.patch_basis import CosineTower
from framestream.model.rollout import rollout
from framestream.model.towers import PixelTower
from framestream.pipeline.layout import next_frame_targets
from framestream.pipeline.loader import ClipLoader
from framestream.pipeline.masks import leaking_targets, make_mask

from .config import TrainConfig
from .results import ClipView, Forecast, MaskView
from .train import Run

COMPARED_RULES = ("time_causal", "fast_slow_causal", "sliding_window", "frame_causal", "fast_slow")


def pictures_of(frames: Tensor) -> np.ndarray:
    """Float or uint8 `[n, 3, H, W]` to uint8 `[n, H, W, 3]`; float frames are on a scale of 0 to 1."""
    if frames.is_floating_point():
        frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(frames.permute(0, 2, 3, 1).cpu().numpy())


def to_frames(tower: Any, patches: Tensor) -> Tensor:
    """Patches of a pixel tower, normalised or not, `[n, P, D]` to `[n, 3, H, W]` on a scale of 0 to 1."""
    if isinstance(tower, (PixelTower, CosineTower)):
        return tower.unpatchify(patches)
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    return tower.tower.unpatchify(patches) * std + mean


def evenly(count: int, of: int) -> list[int]:
    """`count` indices spread evenly over `range(of)`, both ends included."""
    return sorted({round(k * (of - 1) / max(1, count - 1)) for k in range(min(count, of))})


def clip_views(loader: ClipLoader, pictures: dict[str, np.ndarray], count: int = 3) -> list[ClipView]:
    """Clips of different videos as the model sees them; their frames go to `pictures` as `clip0`, `clip1`, …"""
    rows = [(batch, row) for batch in loader for row in range(len(batch["keys"]))]
    by_source: dict[str, tuple[Any, int]] = {}
    for batch, row in rows:
        by_source.setdefault(str(batch["meta"][row].get("source")), (batch, row))
    chosen = list(by_source.values())
    chosen = [chosen[i] for i in evenly(count, len(chosen))]
    chosen += [rows[i] for i in evenly(count - len(chosen) + 1, len(rows))[1:]] if len(chosen) < count else []
    views = []
    for number, (batch, row) in enumerate(chosen):
        meta = batch["meta"][row]
        fps, frames = float(meta["fps"]), int(meta["num_frames"])
        times = meta.get("timestamps") or [i / fps for i in range(frames)]
        views.append(
            ClipView(
                key=batch["keys"][row],
                seconds=float(meta["duration"]),
                source_times=[float(t) for t in times],
                frame_index=batch["frame_index"][row].tolist(),
                frame_time=[round(t, 6) for t in batch["frame_time"][row].tolist()],
                stream=batch["frame_stream"][row].tolist(),
                valid=batch["frame_valid"][row].tolist(),
            )
        )
        pictures[f"clip{number}"] = pictures_of(batch["video_frames"][row])
    return views


def mask_view(run: Run, config: TrainConfig) -> MaskView:
    """The mask that the model really used on the first held-out clip, and how other rules would do on it."""
    assert run.eval_loader is not None
    batch = next(iter(run.eval_loader))
    clips = run.module.prepare(move_batch(batch, next(run.module.parameters()).device))
    layout, mask, layers = clips.layouts[0], clips.mask[0], config.model.num_layers
    used, window_size = config.mask()
    if config.model.num_hist is not None:
        used += f", at most {config.model.num_hist} frames of each stream"
    leaks = sum(leaking_targets(layout, mask, layers))
    rules: list[dict[str, Any]] = [{"rule": used, "density": mask.density, "leaking": leaks}]
    for rule in COMPARED_RULES:
        options = {"window_size": window_size} if rule == "sliding_window" else {}
        other = make_mask(rule, layout, **options)
        leaking = sum(leaking_targets(layout, other, layers))
        if rule != used:
            rules.append({"rule": rule, "density": other.density, "leaking": leaking})
    return MaskView(
        rule=used,
        rows=["".join("1" if seen else "0" for seen in row) for row in mask.matrix().tolist()],
        frame_index=list(layout.frame_index),
        stream=list(layout.stream),
        valid=list(layout.valid),
        targets=list(next_frame_targets(layout)),
        tokens_per_frame=list(layout.patches),
        tokens=layout.num_tokens,
        density=mask.density,
        layers=layers,
        leaking=leaks,
        rules=rules,
    )


def forecasts(run: Run, config: TrainConfig, pictures: dict[str, np.ndarray], count: int = 4) -> list[Forecast]:
    """Generated frames of held-out clips, from the stillest to the liveliest.

    Pictures go to `pictures` as `forecast0_last` `[H,W,3]`, `forecast0_true` and `forecast0_model` `[S,H,W,3]`.
    """
    assert run.eval_loader is not None
    steps = config.train.rollout_steps
    if not steps:
        return []
    device = next(run.module.parameters()).device
    run.module.eval()
    found: list[tuple[float, Forecast, dict[str, np.ndarray]]] = []
    for batch in run.eval_loader:
        made = rollout(run.module, move_batch(batch, device), steps)
        for row in range(len(batch["keys"])):
            if torch.isfinite(made.frame_error[row]).all():
                found.append(_forecast(run, batch, row, made, steps))
    found.sort(key=lambda item: item[0])
    shown = []
    for number, i in enumerate(evenly(count, len(found))):
        _, forecast, images = found[i]
        shown.append(forecast)
        pictures.update({f"forecast{number}_{name}": image for name, image in images.items()})
    return shown


def _forecast(
    run: Run, batch: Mapping[str, Any], row: int, made: Any, steps: int
) -> tuple[float, Forecast, dict[str, np.ndarray]]:
    usable = batch["frame_valid"][row] & (batch["frame_stream"][row] == 1)
    fast = torch.nonzero(usable).flatten()
    fast = fast[batch["frame_index"][row][fast].argsort(stable=True)]
    last, future = fast[-steps - 1], fast[-steps:]
    frames, times = batch["video_frames"][row], batch["frame_time"][row]
    generated = to_frames(run.module.tower.tower, made.predictions[row].float().cpu())
    truth, repeated = frames[future].float() / 255, frames[last].float() / 255
    copied = (truth - repeated).square().mean((1, 2, 3)).tolist()  # mean squared error of pixels, as the page says
    forecast = Forecast(
        key=batch["keys"][row],
        times=[round(t, 6) for t in (times[future] - times[last]).tolist()],
        model_error=(truth - generated).square().mean((1, 2, 3)).tolist(),
        copy_last_error=copied,
    )
    images = {
        "last": pictures_of(frames[last][None])[0],
        "true": pictures_of(frames[future]),
        "model": pictures_of(generated),
    }
    return sum(copied), forecast, images


def loader_rate(loader: ClipLoader) -> float:
    """Clips per second of one epoch with nothing else to do."""
    started, clips = time.perf_counter(), 0
    for batch in loader:
        clips += len(batch["keys"])
    return clips / (time.perf_counter() - started)
