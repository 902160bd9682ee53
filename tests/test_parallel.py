"""Ranks that hold shares of the model do what whole copies do, and what one process does; compiled blocks, too."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framestream.model import checkpoint as ckpt
from framestream.model.evaluate import evaluate
from framestream.model.metrics import read_metrics
from framestream.tools.config import load_config
from framestream.tools.train import build
from framestream.tools.train import train as train_command

import torchrun
from fsdp_worker import PARTS, STEPS, batches
from model_setup import small_module
from synthetic_shards import make_shards
from train_setup import losses, write_config

pytestmark = pytest.mark.slow
ALIKE = ("--data.augment", "false", "--data.random_end", "false")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("train") / "shards", num_samples=9, samples_per_shard=4)


def two_ranks(config: Path, *options: str) -> None:
    """`framestream train` on two ranks; AssertionError when it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, "-m", "framestream.tools.cli", "train", str(config), *ALIKE, *options],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training on one process and on two ranks of either kind, with batches of 4 in two parts."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name in ("one", "ddp", "fsdp2"):
        options = {"steps": 6, "accumulate": 2, "checkpoint_every": 2, "keep_last": 3, "parallel": name}
        if name == "one":
            options["parallel"] = "ddp"
        config = write_config(folder / f"{name}.yaml", shards, folder / name, shards, **options)
        if name == "one":
            assert train_command(load_config(config, [*ALIKE, "--data.batch_size", "4"])) == 0
        else:
            two_ranks(config)
        made[name] = folder / name
    return made


def test_shares_copies_and_one_process_take_the_same_steps(runs: dict[str, Path]) -> None:
    one = losses(runs["one"])
    assert len(one) == 6
    finals = {name: read_metrics(run / "metrics.jsonl")[-1]["eval"] for name, run in runs.items()}
    for name in ("ddp", "fsdp2"):
        assert losses(runs[name]) == pytest.approx(one, rel=1e-4)
        assert finals[name]["clips"] == finals["one"]["clips"] == 9
        assert finals[name]["teacher_forced"]["ratio"] == pytest.approx(finals["one"]["teacher_forced"]["ratio"], 1e-4)
        for step in range(2):
            assert finals[name]["rollout"][step]["ratio"] == pytest.approx(
                finals["one"]["rollout"][step]["ratio"], 1e-4
            )


def test_checkpoints_of_shares_are_those_of_one_process(runs: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    found = [ckpt.list_checkpoints(runs[name] / "checkpoints")[-1] for name in ("one", "fsdp2")]
    weights = [load_file(path / ckpt.MODEL_FILE) for path in found]
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=1e-3)
    states = [torch.load(path / ckpt.OPTIMIZER_FILE, weights_only=True) for path in found]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for one, other in zip(*(state["state"].values() for state in states), strict=True):
        assert {name: value.shape for name, value in one.items()} == {
            name: value.shape for name, value in other.items()
        }


@pytest.mark.parametrize(("saved", "resumed"), [("fsdp2", "one"), ("one", "fsdp2"), ("fsdp2", "ddp")])
def test_a_run_goes_on_in_another_way(runs: dict[str, Path], tmp_path: Path, saved: str, resumed: str) -> None:
    output = tmp_path / "run"
    shutil.copytree(runs[saved], output)
    for path in ckpt.list_checkpoints(output / "checkpoints")[1:]:
        shutil.rmtree(path)
    first = ckpt.latest_checkpoint(output / "checkpoints")
    assert first is not None
    assert first.step == 2
    config = output / "config.yaml"
    options = ["--output", str(output), "--train.parallel", "fsdp2" if resumed == "fsdp2" else "ddp"]
    if resumed == "one":
        assert train_command(load_config(config, [*options, "--data.batch_size", "4"])) == 0
    else:
        two_ranks(config, *options, "--data.batch_size", "2")
    assert losses(output) == pytest.approx(losses(runs["one"]), rel=1e-4)


def test_ranks_that_call_the_predictor_unequally_often(tmp_path: Path) -> None:
    torchrun.finish(torchrun.start("fsdp_worker.py", 2, tmp_path), tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for steps in map(str, STEPS):
        module = small_module(rollout_steps=int(steps)).train()
        sizes = sum(p.numel() for p in module.parameters())
        assert all(sizes * 0.4 < rank[steps]["held"] < sizes * 0.6 for rank in ranks)
        for rank in range(2):
            for batch in batches(rank):
                (module(batch).loss / PARTS / 2).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(ranks[0][steps]["gradients"][name], parameter.grad, atol=1e-6, rtol=1e-4)
            assert torch.equal(ranks[0][steps]["gradients"][name], ranks[1][steps]["gradients"][name])
            assert torch.equal(ranks[1][steps]["weights"][name], parameter)
        want = evaluate(module, [*batches(0), batches(1)[0]], rollout_steps=3).to_json()
        for rank in ranks:
            got = rank[steps]["evaluation"]
            assert (got["clips"], got["rollout"][2]["frames"]) == (want["clips"], want["rollout"][2]["frames"])
            assert got["teacher_forced"]["ratio"] == pytest.approx(want["teacher_forced"]["ratio"], rel=1e-4)
            assert got["rollout"][2]["ratio"] == pytest.approx(want["rollout"][2]["ratio"], rel=1e-4)


def test_compiled_blocks_learn_the_same(shards: Path, tmp_path: Path) -> None:
    made = {}
    for compiled in (False, True):
        output = tmp_path / str(compiled)
        config = write_config(tmp_path / f"{compiled}.yaml", shards, output, shards, steps=3, compile=compiled)
        assert train_command(load_config(config, [*ALIKE, "--model.num_layers", "1"])) == 0
        made[compiled] = losses(output)
        newest = ckpt.latest_checkpoint(output / "checkpoints")
        assert newest is not None
        ckpt.load_weights(newest.path, build(load_config(output / "config.yaml")).module)  # names are the same
    assert made[True] == pytest.approx(made[False], rel=1e-3)
    assert json.loads((tmp_path / "True" / "evaluation.json").read_text())["clips"] == 9
