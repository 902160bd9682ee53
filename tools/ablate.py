"""`framestream ablate`: frame masks and fast-slow frames, each alone and together, and what a leak pretends to be."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.checkpoint import read_json, write_json
from framestream.model.metrics import differences
from framestream.model.ranks import pick_device
from framestream.model.trainer import Progress
from framestream.model.trainer import train as train_module
from framestream.pipeline.errors import ConfigError, FramestreamError
from framestream.pipeline.loader import ClipLoader
from framestream.pipeline.sampling import make_sampling

from .ablate_check import check_drawn, check_equal, tokens_of_batch
from .ablate_cost import step_costs
from .ablate_report import MARKDOWN_FILE, PAGE_FILE, RESULTS_FILE, gather, write_results
from .ablate_rows import ROWS, Row, fast_slow_of, row_config
from .ablate_score import score
from .audit_batch import find_subject
from .config import TrainConfig
from .console import console, progress_bar
from .synthetic_sets import SIDE, SyntheticLoader
from .train import STOPPED, build_loaders, build_module, build_tower

SETTINGS_FILE, SCORE_FILE, COST_FILE, RUNS = "settings.json", "score.json", "cost.json", "runs"
HELD_OUT_BATCHES, HELD_OUT_CLIPS = 4, 32  # of a synthetic set
_COST_ROUNDS = 10
_DEFAULTS = {"sprites": "ablate", "memory": "ablate", "clips": "demo"}

Loader = ClipLoader | SyntheticLoader


@dataclass(frozen=True)
class Experiment:
    """What all rows share."""

    data: str  # sprites, memory or clips
    config: TrainConfig
    output: Path

    def settings(self) -> dict[str, Any]:
        """What decides the numbers; rows and seeds can be added to."""
        train = self.config.train
        return {
            "set": self.data,
            **self.config.identity(),
            "batch_size": self.config.data.batch_size,
            "shards": self.config.data.shards,
            "held_out": self.config.data.held_out,
            "rollout_steps": train.rollout_steps,
        }

    def run_folder(self, row: str, seed: int) -> Path:
        return self.output / RUNS / f"{row}-{seed}"


def ablate(
    config: str | None = None,
    *,
    set: Literal["sprites", "memory", "clips"] = "sprites",
    output: str = "runs/ablate",
    shards: str | None = None,
    held_out: str | None = None,
    seeds: int = 3,
    rows: list[str] = list(ROWS),  # noqa: B006 - never changed
    overrides: list[str] = [],  # noqa: B006 - never changed
) -> int:
    """Compare frame masks and fast-slow frames at an equal number of tokens, over several seeds.

    Each row of the table is one change of the same configuration:

    baseline    token order in place of a frame mask, the newest frames
    frame_mask  frames see frames: frame_causal, the newest frames
    fast_slow   token order, slow frames over the whole clip and the newest ones
    full        both: time_causal, slow and fast frames
    leaky       fast_slow as a mask, with the targets that it shows in the loss: how a leak looks from outside

    Every row sees as many tokens of each clip in as many steps from the same clips, and is scored on the same newest
    frames of the same held-out clips: from true history, and generating from its own output. OUTPUT gets
    ablation.html, ablation.md, ablation.png, ablation.json, and a run folder for each row and seed. The same command
    goes on where it was stopped, and takes finished runs as they are.

    Examples:
        framestream ablate --set memory --output runs/memory
        framestream ablate --set clips --shards runs/demo/shards/train --held-out runs/demo/shards/val

    Args:
        config: the training configuration, a YAML file or a shipped one by name; default ablate, and demo for clips.
        set: what to train on: sprites (two frames determine the next), memory (what comes was shown long ago), both
            drawn here, or clips of your own shards.
        output: where everything goes.
        shards: of clips, to train on.
        held_out: of clips, to score on.
        seeds: how many; of weights and training clips. More can be added later.
        rows: which rows; more can be added later.
        overrides: settings to change, as section.key=value.

    Returns:
        Exit code: 0 when the table is complete; 143 when stopped, with everything saved; 2 for an impossible request.
    """
    experiment = _experiment(config, set, Path(output), shards, held_out, overrides)
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}.")
    if unknown := [row for row in rows if row not in ROWS]:
        raise ConfigError(f"--rows {' '.join(unknown)}: known are {', '.join(ROWS)}.")
    rows = [row for row in ROWS if row in rows]
    if experiment.config.train.threads:
        torch.set_num_threads(experiment.config.train.threads)
    jobs = [(row, seed) for seed in range(seeds) for row in rows]
    if not all((experiment.run_folder(*job) / SCORE_FILE).is_file() for job in jobs):
        _check(experiment, rows)
    _claim(experiment)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ targets of this batch")  # the leaky row's, which is its purpose
        for number, (row, seed) in enumerate(jobs, 1):
            label = f"{ROWS[row].title}, seed {seed} ({number}/{len(jobs)})"
            if not _one_run(experiment, row, seed, label):
                console.print("Stopped and saved. The same command goes on from there.")
                return STOPPED
        costs = _costs(experiment, rows)
    results = gather(experiment.settings(), _scores(experiment, rows, seeds), costs, {row: ROWS[row] for row in rows})
    write_results(results, experiment.output)
    sys.stdout.write((experiment.output / MARKDOWN_FILE).read_text(encoding="utf-8"))
    console.print(f"The page: [bold]{experiment.output / PAGE_FILE}[/]; all numbers: {RESULTS_FILE} beside it.")
    return 0


def _experiment(
    name: str | None, data: str, output: Path, shards: str | None, held_out: str | None, overrides: list[str]
) -> Experiment:
    config = find_subject(name or _DEFAULTS[data], overrides).config
    if data == "clips":
        config = replace(
            config,
            data=replace(config.data, shards=shards or config.data.shards, held_out=held_out or config.data.held_out),
        )
        if not config.data.shards or not config.data.held_out:
            raise ConfigError(
                "--set clips needs --shards, to train on, and --held-out, to score on: folders that `framestream "
                "shard` or `framestream demo` wrote."
            )
    elif shards or held_out:
        raise ConfigError(f"--shards and --held-out go with --set clips; the set {data} is drawn.")
    elif config.data.image_size != SIDE:
        raise ConfigError(
            f"The set {data} has frames of {SIDE} pixels, and data.image_size is {config.data.image_size}: set it to "
            f"{SIDE}."
        )
    fast, steps = fast_slow_of(config).num_fast, config.train.rollout_steps
    if not 1 <= steps < fast:
        raise ConfigError(f"train.rollout_steps is {steps}: with {fast} fast frames it can be 1 to {fast - 1}.")
    # A run is scored here, after its last step, on the frames that all rows share.
    train = replace(config.train, eval_every=0)
    return Experiment(data, replace(config, train=train), output)


def _check(experiment: Experiment, rows: Iterable[str]) -> None:
    """Refuse rows that could not be compared before anything is written or trained."""
    counted: dict[str, list[int]] = {}
    for row in rows:
        config, _, patches = _seeded(experiment, ROWS[row], 0)
        if experiment.data != "clips":
            check_drawn(experiment.data, ROWS[row], make_sampling(config.sampling()))
        both = _loaders(experiment, config, patches)
        try:
            counted[row] = [count for loader in both for count in tokens_of_batch(next(iter(loader)), patches)]
        finally:
            for loader in both:
                loader.close()
    check_equal(counted)


def _claim(experiment: Experiment) -> None:
    """Write down what this folder holds, or refuse to mix two experiments."""
    path = experiment.output / SETTINGS_FILE
    mine = json.loads(json.dumps(experiment.settings()))
    if path.is_file():
        if changed := differences(_read(path), mine):
            raise ConfigError(
                f"{experiment.output} holds an ablation with other settings ({'; '.join(changed)}): choose another "
                "--output, or restore the setting to go on."
            )
        return
    try:
        experiment.output.mkdir(parents=True, exist_ok=True)
        if any(experiment.output.iterdir()):
            raise ConfigError(f"--output {experiment.output} holds files that no ablation made; give a new folder.")
        write_json(path, mine)
    except (FileExistsError, NotADirectoryError) as err:
        raise ConfigError(f"--output {experiment.output} is no folder and cannot become one; give another.") from err


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as err:
        raise FramestreamError(f"{path} cannot be read ({err}): remove it to make it again.") from err


def _seeded(
    experiment: Experiment, row: Row, seed: int
) -> tuple[TrainConfig, AutoregressiveReconstruction, int | tuple[int, int]]:
    """Config, fresh module and patches per frame of one run; equal seeds give equal weights in every row."""
    base = experiment.config
    base = replace(
        base,
        data=replace(base.data, seed=base.data.seed + seed),
        train=replace(base.train, seed=base.train.seed + seed),
    )
    torch.manual_seed(base.train.seed)
    tower = build_tower(base)
    config = row_config(base, row, tower)
    return config, *build_module(config, tower)


def _loaders(experiment: Experiment, config: TrainConfig, patches: int | tuple[int, int]) -> tuple[Loader, Loader]:
    """To train on, and to score on; the held-out clips are the same for every row and seed."""
    if experiment.data == "clips":
        loader, held_out = build_loaders(config, patches, pick_device(config.train.device), log_rejects=False)
        assert held_out is not None
        return loader, held_out
    sampling, (mask, _) = make_sampling(config.sampling()), config.mask()
    common: dict[str, Any] = {"name": experiment.data, "sampling": sampling, "patches": patches, "mask": mask}
    held_seed = experiment.config.data.seed
    return (
        SyntheticLoader(**common, batch_size=config.data.batch_size, seed=config.data.seed),
        SyntheticLoader(
            **common, batch_size=HELD_OUT_CLIPS, batches=HELD_OUT_BATCHES, seed=held_seed, split="held_out"
        ),
    )


def _one_run(experiment: Experiment, row: str, seed: int, label: str) -> bool:
    """Train and score one run, or go on with it; False when it was stopped."""
    folder = experiment.run_folder(row, seed)
    if (folder / SCORE_FILE).is_file():
        return True
    config, module, patches = _seeded(experiment, ROWS[row], seed)
    loader, held_out = _loaders(experiment, config, patches)
    try:
        with progress_bar(label, config.train.steps) as advance:

            def show(now: Progress) -> None:
                advance(now.step, f"loss {now.loss:.4g} · {now.samples_per_s:.1f} clips/s")

            result = train_module(
                module, loader, config.train, output=folder, config=config.identity(), on_progress=show
            )
        if not result.finished:
            return False
        found = score(
            module,
            held_out,
            frames=fast_slow_of(experiment.config).num_fast,
            rollout_steps=config.train.rollout_steps,
            loss=config.train.eval_loss,
            max_batches=config.train.eval_batches,
        )
    finally:
        loader.close()
        held_out.close()
    write_json(folder / SCORE_FILE, found.to_json())
    return True


def _scores(experiment: Experiment, rows: Iterable[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
    """`[row][seed]`, after making sure that they can be compared.

    Raises:
        FramestreamError: rows were scored on different frames, or had different numbers of tokens.
    """
    found = {row: [_read(experiment.run_folder(row, seed) / SCORE_FILE) for seed in range(seeds)] for row in rows}
    for what in ("tokens", "fewest_tokens", "targets"):
        values = {score[what] for scores in found.values() for score in scores}
        if len(values) > 1:
            raise FramestreamError(
                f"The runs in {experiment.output / RUNS} cannot be compared, their {what} differ "
                f"({', '.join(map(str, sorted(values)))}): held-out clips changed, or some are too short for the rows "
                "without slow frames. Use other clips and another --output."
            )
    return found


def _costs(experiment: Experiment, rows: list[str]) -> dict[str, dict[str, float]]:
    """Time and memory of a step of each row; measured once, in turn, when all runs are done."""
    path = experiment.output / COST_FILE
    known = _read(path) if path.is_file() else {}
    if all(row in known for row in rows):
        return known
    modules: dict[str, tuple[AutoregressiveReconstruction, Mapping[str, Any]]] = {}
    device = pick_device(experiment.config.train.device)
    for row in rows:
        config, module, patches = _seeded(experiment, ROWS[row], 0)
        loader, held_out = _loaders(experiment, config, patches)
        try:
            modules[row] = (module, next(iter(loader)))
        finally:
            loader.close()
            held_out.close()
    found = step_costs(modules, _COST_ROUNDS, device)
    write_json(path, found)
    return found
