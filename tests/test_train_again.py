"""Runs beside and after other runs: one folder twice, other held-out clips, damaged ones, saved settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from framestream.model import checkpoint as ckpt
from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.evaluate import Evaluation, evaluate
from framestream.model.generation import generate_frames
from framestream.model.metrics import read_metrics
from framestream.model.trainer import train
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FastSlowSampling, make_sampling
from framestream.tools.config import NO_PART_OF_THE_RESULT, load_config
from framestream.tools.train import build, build_tower, describe, run_config
from framestream.tools.train import train as train_command

from loader_setup import write_shards
from synthetic_shards import make_shards
from train_setup import write_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("again") / "shards", num_samples=6)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("damaged") / "shards", 5, 5, bad={1, 4})


# -- one folder ------------------------------------------------------------------------------------------


def test_two_runs_do_not_share_a_folder(shards: Path, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=1))
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(ConfigError, match=r"Another run is writing to .*/run: wait for it, or name another output"),
    ):
        run_config(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert train_command(config) == 0  # whose lock is gone with it
    assert train_command(config) == 0


def test_a_run_that_is_refused_leaves_the_config_as_it_was(shards: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=1)
    assert train_command(load_config(path)) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="another configuration"):
        run_config(load_config(path, ["--train.lr=0.5"]))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_finished_run_says_its_evaluation_again_and_trains_on_in_another_folder(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards, steps=2)
    said = []
    for _ in range(2):
        assert train_command(load_config(path)) == 0
        said += [line for line in capsys.readouterr().err.splitlines() if "copy-last" in line]
        (tmp_path / "run" / "evaluation.json").rename(tmp_path / f"{len(said)}.json")  # written each time
    assert said[0] == said[1]
    assert "on 6 held-out clips: " in said[0]
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()

    config = load_config(path, ["--train.steps=4", f"--output={tmp_path / 'longer'}"])
    run, newest = build(config), ckpt.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    ckpt.load_weights(newest.path, run.module)
    identity = {"config": config.identity(), "ignored": NO_PART_OF_THE_RESULT}
    done = train(run.module, run.loader, config.train, output=config.output, eval_loader=run.eval_loader, **identity)
    run.close()
    assert (done.step, done.resumed_from) == (4, 0)
    assert train_command(config) == 0  # and the command goes on with it
    written = {path.name for path in (tmp_path / "longer").iterdir()}
    assert {"config.yaml", "evaluation.json"} <= written


# -- held-out clips --------------------------------------------------------------------------------------


def test_clips_that_cannot_be_read_are_counted_and_not_measured(
    damaged: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", damaged, steps=1)
    config = load_config(path, ["--data.max_reject_share=0.9"])
    assert train_command(config) == 0
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (written["clips"], written["unreadable"]) == (3, 2)
    assert written["teacher_forced"]["frames"] == 3 * 4
    assert written["rollout"][0]["frames"] == written["forced_steps"][0]["frames"] == 3
    found = Evaluation.from_json(written)
    assert found.to_json() == written
    assert describe(found).startswith("error / copy-last error on 3 held-out clips, 2 could not be read: ")
    said = capsys.readouterr().err
    assert "2 clips could not be used; which and why is in" in said
    assert str(tmp_path / "run" / "rejects.jsonl") in said

    run = build(config)
    assert run.eval_loader is not None
    batches = list(run.eval_loader)
    for batch in batches:  # as on a rank that repeats a spare
        batch["meta"] = [{**meta, "padding": True} if "spare_for" in meta else meta for meta in batch["meta"]]
    assert evaluate(run.module, batches, rollout_steps=0).unreadable == 0


def test_other_held_out_clips_are_no_match_for_the_best_so_far(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_shards(tmp_path / "first", num_samples=2, prefix="first")
    second = make_shards(tmp_path / "second", num_samples=3, prefix="second")
    output = tmp_path / "run"
    path = write_config(tmp_path / "c.yaml", shards, output, first, steps=4, eval_every=2, checkpoint_every=2)
    assert train_command(load_config(path)) == 0
    folder = output / "checkpoints"
    newest = ckpt.latest_checkpoint(folder)
    assert newest is not None
    assert newest.state["best"] == ckpt.read_json(folder / ckpt.BEST_FILE)["error_ratio"]
    for state in folder.glob("*/state.json"):  # a best that nothing could beat
        ckpt.write_json(state, {**ckpt.read_json(state), "best": 1e-9})
    ckpt.mark_best(folder, 2, 1e-9)

    capsys.readouterr()
    assert train_command(load_config(path)) == 0  # the same clips
    assert ckpt.read_json(folder / ckpt.BEST_FILE) == {"step": 2, "error_ratio": 1e-9}
    other = load_config(path, [f"--data.held_out={second}", "--data.workers=1"])
    assert "forgotten" not in capsys.readouterr().err
    assert train_command(other) == 0
    said = capsys.readouterr().err
    assert said.count("which checkpoint was the best is forgotten") == 1
    assert "on 3 held-out clips" in said
    ratio = read_metrics(output / "metrics.jsonl")[-1]["eval"]["teacher_forced"]["ratio"]
    assert ckpt.read_json(folder / ckpt.BEST_FILE) == {"step": 4, "error_ratio": ratio}
    assert len(ckpt.list_checkpoints(folder)) == 2  # nothing is lost by evaluating
    assert yaml.safe_load((output / "config.yaml").read_text())["data"]["held_out"] == str(second)

    assert train_command(other) == 0  # and that is remembered
    assert "forgotten" not in capsys.readouterr().err
    assert len([row for row in read_metrics(output / "metrics.jsonl") if "eval" in row and row["step"] == 4]) == 2


def test_a_checkpoint_that_does_not_say_its_held_out_clips_is_resumed(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards, steps=1)
    assert train_command(load_config(path)) == 0
    newest = ckpt.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.state["held_out"]
    ckpt.write_json(
        newest.path / ckpt.STATE_FILE, {name: value for name, value in newest.state.items() if name != "held_out"}
    )
    assert train_command(load_config(path)) == 0
    assert "forgotten" not in capsys.readouterr().err


# -- the module's settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (5, 3, 1, 4, "clip")),
        (["--data.sampling.slow_coverage=stride", "--data.sampling.slow_stride=2"], (5, 3, 1, 2, "stride")),
        (["--data.sampling.fast_stride=2", "--data.sampling.order=time"], (5, 3, 2, 4, "clip")),
        (["--model.num_fast=6"], (6, 3, 1, 4, "clip")),  # what the user says about the model stays
        (["--model.slow_stride=3"], (5, 3, 1, 3, "stride")),
    ],
)
def test_the_module_samples_plain_videos_as_it_was_trained(
    options: list[str], expected: tuple[object, ...], shards: Path, tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run"), options)
    made = config.reconstruction()
    assert (made.num_fast, made.num_slow, made.fast_stride, made.slow_stride, made.slow_coverage) == expected
    assert made.use_fast_slow_frames
    if not any("model" in option for option in options):
        sampling = make_sampling(config.sampling())
        assert isinstance(sampling, FastSlowSampling)
        module, seen = build(config).module, []
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]["frame_index"][0].tolist()))
        module.compute_autoregressive_loss(None, torch.zeros(1, 40, 3, 32, 32))
        assert sorted(seen[0]) == sorted(sampling.plan(40).frame_index)


def test_a_sampling_that_the_module_cannot_express_stays_out(shards: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run")
    for options in (["--data.sampling.fps=10"], ["--data.sampling={kind: dense, num_frames: 6}"]):
        config = load_config(path, options)
        assert config.reconstruction() == config.model.reconstruction()


def test_a_saved_module_generates_under_the_mask_of_its_training(shards: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=1)
    config = load_config(path, ["--data.mask=sliding_window", "--data.window_size=2"])
    run, _ = run_config(config)
    run.module.save_pretrained(tmp_path / "module")
    again = AutoregressiveReconstruction.from_pretrained(tmp_path / "module", build_tower(config))
    assert (again.config.mask, again.config.window_size) == ("sliding_window", 2)
    frame = next(iter(generate_frames(again, next(iter(run.loader)), 1)))
    assert torch.isfinite(frame.embeddings).all()
    run.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.mask=full"], r"data\.mask full shows every frame the one .*use time_causal, or frame_causal"),
        (["--model.mask=full"], r"model\.mask full shows every frame"),
        (["--data.sampling={kind: dense, num_frames: 1}"], "no frame that has to be predicted.*at least 2 fast"),
        (["--data.sampling.num_fast=1", "--model.slow_targets=false"], "no frame that has to be predicted"),
    ],
)
def test_a_run_that_could_learn_nothing_is_refused(
    options: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", rollout_steps=0)
    with pytest.raises(ConfigError, match=message):
        build(load_config(path, options))


def test_a_mask_that_leaves_some_targets_or_is_wanted_is_not_refused(shards: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", rollout_steps=0)
    for options in (
        ["--data.mask=fast_slow"],
        ["--data.mask=full", "--model.on_leak=allow"],
        ["--data.sampling.num_fast=1"],
        ["--data.sampling.fps=0.01", "--data.sampling.slow_snap=keyframe"],
    ):
        build(load_config(path, options)).close()
