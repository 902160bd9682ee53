"""Every shipped configuration loads, builds and takes a step; wrong keys and values are refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

import framestream.configs
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import make_sampling, sampling_for_length
from framestream.tools.config import NO_PART_OF_THE_RESULT, TrainConfig, find_config, leaves, load_config
from framestream.tools.train import build, main

from synthetic_shards import make_shards
from train_setup import SMALL, losses, start, write_config

FOLDER = Path(next(iter(framestream.configs.__path__)))
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TINY_TOWER = "--model.tower.kind=pixel --model.tower.patch_size=16 --model.embedding_dim=768 --data.image_size=96"
TINY_TOWER += " --model.predictor_dim=24 --model.num_heads=2"
TINY = "--data.batch_size=2 --data.eval_batch_size=2 --data.workers=0"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("configs") / "shards", num_samples=2, num_frames=70)


def test_all_that_is_promised_is_shipped() -> None:
    assert {"demo", "autoregressive_reconstruction", "short", "medium", "long"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_trains(name: str, shards: Path, tmp_path: Path) -> None:
    # Everything stays as shipped but the size of the model, the tower that would be downloaded, and the paths.
    options = [*TINY.split(), f"--data.shards={shards}", f"--data.held_out={shards}", f"--output={tmp_path}"]
    options += ["--train.steps=1", "--train.eval_every=0", "--train.rollout_steps=2"]
    if load_config(name).model.tower.kind in ("hf", "torchvision"):
        options += TINY_TOWER.split()
    assert main([name, *options]) == 0
    assert math.isfinite(losses(tmp_path)[1])


def test_the_example_config_has_the_documented_keys() -> None:
    model = load_config("autoregressive_reconstruction").model
    assert (model.embedding_dim, model.loss_weight) == (1152, 0.1)
    assert model.use_frame_causal_mask
    assert model.use_fast_slow_frames
    assert (model.num_fast, model.num_slow, model.fast_stride, model.slow_stride) == (8, 8, 1, 4)


@pytest.mark.parametrize(("name", "length"), [("short", 29), ("medium", 45), ("long", 90)])
def test_presets_are_those_of_the_clip_length(name: str, length: int) -> None:
    assert make_sampling(load_config(name).sampling()) == sampling_for_length(length)


def test_sampling_follows_from_the_model_where_data_has_none(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {use_fast_slow_frames: true, num_fast: 6, num_slow: 2, slow_stride: 3}")
    plan = make_sampling(load_config(path).sampling())
    assert (plan.num_frames, plan.num_fast, plan.num_slow) == (8, 6, 2)  # type: ignore[attr-defined]
    path.write_text("model: {num_fast: 6}")
    assert make_sampling(load_config(path).sampling()).streams().tolist() == [1] * 6


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", Path("shards"), tmp_path / "run")
    made = load_config(config, ["--train.steps", "5", "--data.sampling.num_fast=7", "--model.tower.patch_size", "4"])
    assert (made.train.steps, made.sampling()["num_fast"], made.sampling()["num_slow"]) == (5, 7, 3)
    assert (made.model.tower.patch_size, made.model.tower.kind) == (4, "pixel")
    assert made.model.reconstruction().num_layers == SMALL["model"]["num_layers"]


@pytest.mark.parametrize(
    ("yaml_text", "options", "message"),
    [
        (
            "trian: {}",
            [],
            r"unknown key trian \(did you mean train\?\); valid keys there are data, model, train, output",
        ),
        ("train: {stepz: 3}", [], r"unknown key train.stepz \(did you mean steps\?\)"),
        (
            "model: {tower: {patch: 3}}",
            [],
            r"unknown key model.tower.patch .*valid keys there are kind, name, patch_size",
        ),
        ("data: 3", [], "data must be a section"),
        ("- 1", [], "must hold the sections"),
        ("a: [", [], "cannot be read as YAML"),
        ("", ["--train.stepz", "3"], r"command line: unknown key train.stepz \(did you mean steps\?\)"),
        ("", ["--train.steps.more=3"], "train.steps is a single value"),
        ("", ["--train.steps", "many"], "train.steps"),
        ("train: {steps: many}", [], "train.steps"),
        ("train: {steps: 0}", [], "train.steps must be at least 1"),
        ("model: {slow_pool: sum:3}", [], "slow_pool must be a factor"),
        ("model: {num_heads: 0}", [], "num_heads must be a whole number of at least 1"),
        ("", ["stray"], "stray"),
        ("data: {crop: middle}", [], "data.crop"),
        ("data: {eval_batch_size: 0}", [], "data.eval_batch_size must be at least 1"),
        ("data: {seed: -1}", [], "data.seed must not be negative"),
    ],
)
def test_wrong_configs_are_refused_in_a_sentence(
    yaml_text: str, options: list[str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml_text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.sampling.num_fast=0"], "num_fast must be a whole number >= 1, got 0"),
        (["--data.sampling.nmu_fast=3"], "sampling key 'nmu_fast' is unknown"),
        (["--data.mask=causal"], "causal"),
        (["--model.embedding_dim=100"], "embedding_dim is 100, and the vision tower's patch embeddings have 192"),
        (["--model.tower.patch_size=7"], "not a multiple of patch_size 7"),
        (["--model.tower.kind=torchvision"], "needs model.tower.name"),
        (["--model.tower.kind=torchvision", "--model.tower.name=vit_q_16"], "no Vision Transformer of torchvision"),
        (["--model.tower.kind=hf", "--model.tower.name=/no/such/folder"], "'/no/such/folder' cannot be loaded"),
        (["--train.device=quantum"], "train.device 'quantum' is unknown"),
        (["--data.batch_size=99"], "batch_size=99 .* there are 2"),
        (["--data.shards="], "data.shards is not set"),
        (["--train.device=meta"], "train.device 'meta' is unknown"),
        (["--model.rollout_steps=5"], "model.rollout_steps is 5, and the sampling takes 5 fast frames"),
        (["--train.rollout_steps=5", "--data.held_out=x"], r"train.rollout_steps is 5.*at most 4"),
        (["--output=/dev/null/run"], "output /dev/null/run cannot be made, /dev/null is no folder"),
        (["--model.attention_backend=flex", "--train.device=cpu"], "flex cannot train on the CPU"),
        (["--data.mask=time_causal", "--model.mask=fast_slow"], "data.mask time_causal and model.mask fast_slow"),
        (
            ["--data.mask=time_causal", "--model.use_frame_causal_mask=false"],
            "data.mask time_causal and model.use_frame_causal_mask false are different",
        ),
        (
            ["--data.mask=sliding_window", "--model.mask=sliding_window", "--model.window_size=2"],
            "data.mask sliding_window and model.mask sliding_window",
        ),
    ],
)
def test_impossible_values_are_found_before_training(
    options: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run"), options)
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], ("time_causal", 3)),  # the sampling has both streams
        (["--data.sampling=null"], ("frame_causal", 3)),
        (["--data.sampling=null", "--model.use_fast_slow_frames=true"], ("time_causal", 3)),
        (["--model.use_frame_causal_mask=false"], ("frame_causal", 3)),
        (["--model.mask=sliding_window", "--model.window_size=2"], ("sliding_window", 2)),
        (["--data.mask=fast_slow_causal"], ("fast_slow_causal", 3)),
        (["--data.mask=sliding_window", "--data.window_size=5"], ("sliding_window", 5)),
    ],
)
def test_a_mask_that_is_not_set_follows_from_the_model(
    options: list[str], rule: tuple[str, int], shards: Path, tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run"), options)
    assert config.mask() == rule
    run = build(config)
    run.module(next(iter(run.loader)))  # the module agrees
    run.close()


def test_a_config_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"output: !!python/object/apply:os.mkdir ['{tmp_path / 'executed'}']")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path)
    assert not (tmp_path / "executed").exists()


def test_the_command_line_says_it_in_one_sentence(tmp_path: Path) -> None:
    wrong = tmp_path / "c.yaml"
    wrong.write_text("train: {stepz: 3}")
    processes = [start("train", str(wrong)), start("train", "no-such-config"), start("train", "--train.steps", "3")]
    for process, message in zip(processes, ("train.stepz", "demo", "config file comes first"), strict=True):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2
        assert message in said
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) == 1


def test_a_tower_of_the_transformers_library(shards: Path, tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig

    SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    ).save_pretrained(tmp_path / "siglip")
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=1)
    tower = ["--model.tower.kind=hf", f"--model.tower.name={tmp_path / 'siglip'}", "--model.tower.pretrained=false"]
    assert main([str(config), *tower, "--model.embedding_dim=32"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["tower"]["kind"] == "hf"


def test_defaults_are_a_config_and_plain_values() -> None:
    plain = TrainConfig().to_json()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert find_config("demo") == FOLDER / "demo.yaml"


def test_settings_that_a_run_may_change_are_settings() -> None:
    known = {name for name, _ in leaves(TrainConfig().to_json())}
    assert set(NO_PART_OF_THE_RESULT) <= known
