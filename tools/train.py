"""`framestream train`: a run from a config file, on one process or under torchrun."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from framestream.model.evaluate import ErrorSum, Evaluation
from framestream.model.metrics import METRICS_FILE, read_metrics
from framestream.model.ranks import Ranks, any_rank, distributed, pick_device
from framestream.model.trainer import Progress, TrainResult
from framestream.model.trainer import train as train_module
from framestream.pipeline.atomic import atomic_write
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.loader import ClipLoader, build_loader

from .config import NO_PART_OF_THE_RESULT, TrainConfig, load_config, make_parser
from .console import console, progress_bar
from .train_checks import check_config

if TYPE_CHECKING:
    from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction

STOPPED = 143  # 128 + SIGTERM: the run is whole on disk, and not finished
LOCK_FILE = ".lock"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class Run:
    """What a config builds."""

    module: AutoregressiveReconstruction
    loader: ClipLoader
    eval_loader: ClipLoader | None
    patches: int | tuple[int, int]

    def close(self) -> None:
        """Stop worker processes."""
        self.loader.close()
        if self.eval_loader is not None:
            self.eval_loader.close()


class Augment:
    """What leaves motion motion, the same for all frames of a clip: mirroring, turning, swapping colours, the negative.

    Few videos become many: each clip has 96 versions, and all of them obey the same laws.
    """

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 `[U, 3, S, S]` -> the same shape."""
        mirror, flip, turn, negative = (torch.rand(4, generator=generator) < 0.5).tolist()
        frames = frames[:, torch.randperm(3, generator=generator)]
        frames = frames.flip([axis for axis, chosen in ((-1, mirror), (-2, flip)) if chosen])
        frames = frames.transpose(-1, -2) if turn else frames
        return (255 - frames if negative else frames).contiguous()


def build_tower(config: TrainConfig) -> nn.Module:
    """The frozen tower that a config names.

    Raises:
        ConfigError: an unknown model, or a library that is not installed.
    """
    from framestream.model.patch_basis import CosineTower
    from framestream.model.towers import PixelTower, TowerAdapter

    tower, size = config.model.tower, config.data.image_size
    if tower.kind == "pixel":
        pixels = PixelTower(size, tower.patch_size)
        return pixels if tower.mean is None else TowerAdapter(pixels, mean=tower.mean, std=tower.std)
    if tower.kind == "cosine":
        return CosineTower(size, tower.patch_size)
    if tower.name is None:
        raise ConfigError(f"model.tower.kind {tower.kind} needs model.tower.name, the model to load.")
    if tower.kind == "torchvision":
        from torchvision.models import get_model

        options: dict[str, Any] = {"weights": "DEFAULT"} if tower.pretrained else {"image_size": size}
        try:
            model = get_model(tower.name, **options)
        except (ValueError, KeyError, TypeError) as err:
            raise ConfigError(
                f"model.tower.name {tower.name!r} is no Vision Transformer of torchvision: {err}"
            ) from err
        mean, std = IMAGENET
    else:
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as err:
            raise ConfigError(
                "model.tower.kind hf needs the transformers library: pip install 'framestream[hf]'."
            ) from err
        try:
            model = (
                AutoModel.from_pretrained(tower.name)
                if tower.pretrained
                else AutoModel.from_config(AutoConfig.from_pretrained(tower.name))
            )
        except (OSError, ValueError) as err:
            raise ConfigError(f"model.tower.name {tower.name!r} cannot be loaded: {str(err).splitlines()[0]}") from err
        mean = std = (0.5, 0.5, 0.5)
    return TowerAdapter(model, mean=tower.mean or mean, std=tower.std or std)


def patches_of(config: TrainConfig, tower: nn.Module) -> int | tuple[int, int]:
    """Tokens per frame that tower and pooling leave: a number, or (slow, fast) where the streams differ."""
    from framestream.model.geometry import squarest_grid
    from framestream.model.pooling import Pool

    size = config.data.image_size
    with torch.no_grad():
        count = tower.eval()(torch.zeros(1, 3, size, size)).shape[1]
    grid = getattr(tower, "grid", None) or squarest_grid(count)
    slow, fast = (
        rows * columns
        for rows, columns in (
            Pool.parse(config.model.slow_pool).grid(grid),
            Pool.parse(config.model.fast_pool).grid(grid),
        )
    )
    return fast if slow == fast else (slow, fast)


REJECTS_FILE = "rejects.jsonl"


def build_loaders(
    config: TrainConfig, patches: int | tuple[int, int], device: torch.device, *, log_rejects: bool = True
) -> tuple[ClipLoader, ClipLoader | None]:
    """The loader of the training clips, and that of the held-out ones where there are any.

    Rejected clips are written to the run folder's rejects.jsonl, with `log_rejects`.

    Raises:
        ConfigError, ShardError: as `build_loader`.
    """
    data = config.data
    if not data.shards:
        raise ConfigError("data.shards is not set: give the folder that `framestream shard` wrote.")
    mask, window_size = config.mask()
    common: dict[str, Any] = {
        "sampling": config.sampling(),
        "patches_per_frame": patches,
        "image_size": data.image_size,
        "mask": mask,
        "window_size": window_size,
        "num_workers": data.workers,
        "seed": data.seed,
        "decoder": data.decoder,
        "storage_options": data.storage_options,
        "cache_dir": data.cache_dir,
        "cache_bytes": int(data.cache_gb * 1e9) or 1,
        "checksums": data.checksums,
        "max_reject_share": data.max_reject_share,
        "rejects_path": Path(config.output) / REJECTS_FILE if log_rejects else None,
        "device": device,
        "attention_backend": config.model.attention_backend,
        "pin_memory": device.type == "cuda",
    }
    loader = build_loader(
        data.shards,
        batch_size=data.batch_size,
        crop=data.crop,
        random_end=data.random_end,
        transform=Augment() if data.augment else None,
        window_shards=data.window_shards,
        epoch_samples=data.epoch_samples,
        pack_to=data.pack_to,
        **common,
    )
    if not data.held_out:
        return loader, None
    held_out = build_loader(
        data.held_out, batch_size=data.eval_batch_size or data.batch_size, shuffle=False, drop_last=False, **common
    )
    return loader, held_out


def build_module(
    config: TrainConfig, tower: nn.Module | None = None, *, as_configured: bool = True
) -> tuple[AutoregressiveReconstruction, int | tuple[int, int]]:
    """The module of a config with the weights that it starts from, and its patches per frame.

    Args:
        config: `train.seed` decides the weights, unless a tower is given, which has drawn from the seed already.
        tower: of `build_tower`; None builds it.
        as_configured: False leaves `start_with_differences` out.

    Raises:
        ConfigError: settings that do not fit each other.
    """
    from framestream.model.autoregressive_reconstruction import create_autoregressive_reconstruction_module
    from framestream.model.patch_basis import start_with_differences

    if tower is None:
        torch.manual_seed(config.train.seed)
        tower = build_tower(config)
    patches = patches_of(config, tower)
    module = create_autoregressive_reconstruction_module(tower, config.model.hidden_size, config.reconstruction())
    if as_configured and config.model.start_with_differences and not start_with_differences(module.predictor):
        raise ConfigError(
            "model.start_with_differences needs at least 3 heads of at least embedding_dim channels each: "
            f"set model.predictor_dim to {3 * config.model.embedding_dim} and model.num_heads to 3."
        )
    return module, patches


def build(config: TrainConfig, *, device: torch.device | None = None, world: int = 1) -> Run:
    """Build model and loaders, on one of `world` ranks; everything that a config can get wrong is found here.

    Raises:
        ConfigError: an impossible setting, an empty data set.
        ShardError: shards that cannot be read.
    """
    from framestream.model.feature_cache import FeatureCache

    if not config.data.shards:
        raise ConfigError("data.shards is not set: give the folder that `framestream shard` wrote.")
    device = device or pick_device(config.train.device)
    check_config(config, device)
    module, patches = build_module(config)
    if config.train.feature_cache is not None:
        space = int(config.train.feature_cache_gb * 1e9)
        module.feature_cache = FeatureCache(config.train.feature_cache, space, world)
    loader, eval_loader = build_loaders(config, patches, device)
    return Run(module, loader, eval_loader, patches)


def run_config(config: TrainConfig, *, quiet: bool = False, label: str = "Training") -> tuple[Run, TrainResult]:
    """Build, train (from the newest checkpoint of the run folder where there is one) and show a progress bar."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with distributed(config.train.device) as ranks:
        return _run_on(config, ranks, quiet or ranks.rank > 0, label)


def _run_on(config: TrainConfig, ranks: Ranks, quiet: bool, label: str) -> tuple[Run, TrainResult]:
    output, device = Path(config.output), pick_device(config.train.device, ranks.local)
    run = build(config, device=device, world=ranks.world)

    def begin(forgotten: bool) -> None:
        """Write down what is used from here on, which may be other than where the run began."""
        text = yaml.safe_dump(config.to_json(), sort_keys=False)
        atomic_write(output / "config.yaml", text.encode())
        if forgotten and not quiet:
            console.print(
                "The held-out clips are not those of the steps before: which checkpoint was the best is forgotten."
            )

    try:
        with _alone(output, ranks, device), progress_bar(label, config.train.steps, quiet=quiet) as advance:

            def show(progress: Progress) -> None:
                rate, waiting = f"{progress.samples_per_s:.1f} clips/s", f"{progress.wait_share:.0%} waiting"
                note = f"loss {progress.loss:.4g} · {rate} · {waiting}"
                if progress.evaluation is not None:
                    note += f" · held-out error {progress.evaluation.teacher_forced.ratio:.3f}"
                advance(progress.step, note)

            result = train_module(
                run.module,
                run.loader,
                config.train,
                output=output,
                config=config.identity(),
                ignored=NO_PART_OF_THE_RESULT,
                eval_loader=run.eval_loader,
                ranks=ranks,
                on_progress=show,
                on_start=begin,
            )
            if result.finished and result.evaluation is None:
                result.evaluation = _measured_before(output, result.step)
            if ranks.rank == 0 and result.evaluation is not None and result.finished:
                text = json.dumps(result.evaluation.to_json(), indent=1)
                (output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    except BaseException:
        run.close()
        raise
    return run, result


@contextmanager
def _alone(output: Path, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Hold the run folder; the first rank does it for all, and all hear of it where it cannot.

    Raises:
        ConfigError: another run has it.
    """
    from filelock import FileLock, Timeout

    held, taken = FileLock(str(output / LOCK_FILE), timeout=0), False
    if ranks.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout:
            taken = True
    try:
        if any_rank(taken, device, ranks):
            raise ConfigError(f"Another run is writing to {output}: wait for it, or name another output folder.")
        yield
    finally:
        held.release()


def describe(evaluation: Evaluation) -> str:
    """The evaluation in one line."""
    steps = ", ".join(map(_said, evaluation.rollout))
    lost = f", {evaluation.unreadable} could not be read" if evaluation.unreadable else ""
    text = f"error / copy-last error on {evaluation.clips} held-out clips{lost}: {_said(evaluation.teacher_forced)}"
    if steps:
        text += f", generating {len(evaluation.rollout)} frames: {steps}"
    if evaluation.leaking_targets:
        text += f"; {evaluation.leaking_targets} leaking targets were left out"
    return text


def _said(errors: ErrorSum) -> str:
    return "not measured" if math.isnan(errors.ratio) else f"{errors.ratio:.3f}"


def _measured_before(output: Path, step: int) -> Evaluation | None:
    """The evaluation after a run's last step, as its metrics hold it."""
    found = [row["eval"] for row in read_metrics(output / METRICS_FILE) if row["step"] == step and "eval" in row]
    return Evaluation.from_json(found[-1]) if found else None


def train(config: TrainConfig) -> int:
    """Train as a config says, and go on where an earlier run with the same config stopped.

    Returns:
        0 when all steps are done; 143 when SIGTERM or Ctrl-C ended the run early, with everything saved.
    """
    run, result = run_config(config)
    run.close()
    if int(os.environ.get("RANK", 0)):  # under torchrun one process speaks for all
        return 0 if result.finished else STOPPED
    output = Path(config.output)
    if lost := {(row.get("shard"), row.get("key")) for row in read_metrics(output / REJECTS_FILE)}:
        clips = "1 clip" if len(lost) == 1 else f"{len(lost)} clips"
        console.print(f"{clips} could not be used; which and why is in {output / REJECTS_FILE}.")
    if result.resumed_from:
        console.print(f"Resumed from step {result.resumed_from}.")
    if not result.finished:
        console.print(f"Stopped at step {result.step} and saved. The same command goes on from there.")
        return STOPPED
    if result.evaluation is not None:
        console.print(describe(result.evaluation).capitalize() + ".")
    console.print(f"{result.step} steps done; checkpoints and metrics are in {config.output}.")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`framestream train CONFIG [--section.key value …]`, where CONFIG is a YAML file or the name of a shipped one."""
    argv = list(arguments)
    if not argv or argv[0] in ("-h", "--help"):
        make_parser().print_help()
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise ConfigError(
            f"The config file comes first, before {argv[0]}: framestream train CONFIG [--section.key value]."
        )
    return train(load_config(argv[0], argv[1:]))


if __name__ == "__main__":
    from .cli import main as cli

    sys.exit(cli(["train", *sys.argv[1:]]))
