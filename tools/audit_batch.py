"""What an audit is made on: the model that a config or checkpoint describes, and a batch in the layout of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from framestream.model import checkpoint as ckpt
from framestream.model.trainer import CHECKPOINTS
from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import leaking_targets, make_mask
from framestream.pipeline.sampling import FastSlowSampling, Sampling, SamplingPlan, make_sampling

from .config import TrainConfig, load_config, parse
from .train import build_loaders, build_module

if TYPE_CHECKING:
    from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction

FPS = 30.0  # of random clips
GOP = 8
_LONGEST = 1 << 18  # frames of a random clip
_LENGTHS = 64  # that are tried


@dataclass(frozen=True)
class Subject:
    """What is audited: a config, and the checkpoint whose weights it gets; None leaves them as training starts."""

    name: str
    config: TrainConfig
    checkpoint: Path | None = None


def find_subject(target: str, overrides: Sequence[str] = ()) -> Subject:
    """A config file (or the name of a shipped one), a run folder, or a checkpoint in one.

    Args:
        target: where it is. Of a run folder the newest checkpoint is taken.
        overrides: settings to change, as `section.key=value`.

    Raises:
        ConfigError: none of these, or an impossible setting.
        StateError: a checkpoint that cannot be read.
    """
    options = []
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"--overrides takes section.key=value, as in model.num_layers=2, got {override!r}.")
        options.append(f"--{override.removeprefix('--')}")
    folder = Path(target)
    if not folder.is_dir():
        return Subject(folder.stem, load_config(target, options))
    if (folder / ckpt.STATE_FILE).is_file():
        found: ckpt.Checkpoint | None = ckpt.read_checkpoint(folder)
        written = folder.parent.parent / "config.yaml"
    else:
        found = ckpt.latest_checkpoint(folder / CHECKPOINTS)
        written = folder / "config.yaml"
    if found is None and not written.is_file():
        raise ConfigError(
            f"{target} is no checkpoint ({ckpt.STATE_FILE}) and no run folder (config.yaml, {CHECKPOINTS}/): give "
            "what `framestream train` wrote, or its config."
        )
    if written.is_file():  # which also says what a checkpoint leaves out, such as the attention backend
        config = load_config(written, options)
    else:
        assert found is not None
        config = parse(found.state["config"], options, str(folder))
    return Subject(folder.name, config, None if found is None else found.path)


def build_subject(
    subject: Subject, device: torch.device, seed: int
) -> tuple[AutoregressiveReconstruction, int | tuple[int, int], list[str]]:
    """The module as training builds it, in eval mode; its patches per frame; and what should be known about it.

    Weights that are all zero, as the last layers are before the first step, would hide every path through them, and
    get small random values; for the same reason `start_with_differences`, which concentrates attention on few frames
    until training spreads it, is left out.

    Raises:
        ConfigError: settings that do not fit each other, or FlexAttention on a CPU.
        StateError: the weights do not fit the config.
    """
    config = subject.config
    if config.model.attention_backend == "flex" and device.type == "cpu":
        raise ConfigError(
            "model.attention_backend flex has no gradient on the CPU: audit with --device cuda, or with "
            "--overrides model.attention_backend=auto."
        )
    module, patches = build_module(config, as_configured=False)
    notes = []
    if subject.checkpoint is not None:
        ckpt.load_weights(subject.checkpoint, module)
        notes.append(f"weights of {subject.checkpoint.name}")
    else:
        notes.append("untrained weights")
    if woken := wake(module, seed):
        notes.append(f"{woken} weights that were all zero got random values, to hide nothing")
    return module.to(device).eval(), patches, notes


@torch.no_grad()
def wake(module: nn.Module, seed: int = 0) -> int:
    """Give matrices that are all zero small random values; returns how many there were."""
    generator = torch.Generator().manual_seed(seed)
    asleep = [weight for weight in module.parameters() if weight.ndim >= 2 and not weight.any()]
    for weight in asleep:
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return len(asleep)


def random_batch(config: TrainConfig, patches: int | tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """A batch of random pictures as the loader of this config lays it out.

    Two clips: one that fills the sampling, of the length at which the mask shows most targets, since slow frames lie
    in the future of fast ones at some lengths and not at others; and one that is too short, whose front is padding
    (where the sampling has more than one frame).
    """
    sampling = make_sampling(config.sampling())
    full, short = _telling_lengths(config, sampling)
    lengths = [full] if _plan(sampling, short).valid.all() else [full, short]
    generator = torch.Generator().manual_seed(seed)
    rule, window_size = config.mask()
    size = config.data.image_size
    clips = []
    for number, length in enumerate(lengths):
        plan = _plan(sampling, length)
        pictures = torch.randint(0, 256, (len(plan.unique), 3, size, size), generator=generator, dtype=torch.uint8)
        clips.append(
            {
                "frames": pictures[torch.from_numpy(plan.gather)],
                "frame_index": torch.from_numpy(plan.frame_index),
                "frame_time": torch.from_numpy(plan.frame_index).float() / FPS,
                "frame_stream": torch.from_numpy(plan.stream),
                "frame_valid": torch.from_numpy(plan.valid),
                "key": f"random-{number}",
                "text": "",
                "meta": {},
            }
        )
    return ClipCollator(patches_per_frame=patches, mask=rule, window_size=window_size)(clips)


def real_batch(config: TrainConfig, patches: int | tuple[int, int], shards: str) -> Mapping[str, Any]:
    """The first two clips of some shards, as evaluation reads them.

    Raises:
        ConfigError, ShardError: no clip in the shards, or none that can be read.
    """
    data = dataclasses.replace(
        config.data, shards=shards, held_out=shards, workers=0, batch_size=1, eval_batch_size=2, epoch_samples=None
    )
    loader, in_order = build_loaders(
        dataclasses.replace(config, data=data), patches, torch.device("cpu"), log_rejects=False
    )
    assert in_order is not None
    try:
        return next(iter(in_order))
    finally:
        loader.close()
        in_order.close()


def _plan(sampling: Sampling, length: int) -> SamplingPlan:
    facts: dict[str, Any] = {"timestamps": np.arange(length) / FPS}
    if isinstance(sampling, FastSlowSampling):
        facts["key_frames"] = range(0, length, GOP)
    return sampling.plan(length, **facts)


def _telling_lengths(config: TrainConfig, sampling: Sampling) -> tuple[int, int]:
    """Frames of a clip that fills the sampling and shows most targets (the longest of equals), and of a short one."""
    rule, window_size = config.mask()
    options = {"window_size": window_size} if rule == "sliding_window" else {}
    longest = 1
    while longest < _LONGEST and not _plan(sampling, longest).valid.all():
        longest *= 2
    best, most = 4 * longest, -1
    lengths = sorted({int(t) for t in np.geomspace(1, 4 * longest, _LENGTHS).round()})
    for length in lengths:
        plan = _plan(sampling, length)
        if not plan.valid.all():
            continue
        layout = FrameLayout.from_plan(plan, 1)
        seen = sum(leaking_targets(layout, make_mask(rule, layout, **options), config.model.num_layers))
        if seen >= most:
            best, most = length, seen
    padded = [t for t in lengths if not _plan(sampling, t).valid.all()]
    return best, padded[len(padded) // 2] if padded else best
