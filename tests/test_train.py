"""Training through the command line: exact resume after kills, clean stops, several processes, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from framestream.model import checkpoint as ckpt
from framestream.model.evaluate import ErrorSum, Evaluation, evaluate
from framestream.model.metrics import read_metrics
from framestream.model.trainer import TrainSettings, train
from framestream.pipeline.errors import ConfigError, FramestreamError, StateError
from framestream.tools.config import load_config
from framestream.tools.train import STOPPED, build, describe, run_config
from framestream.tools.train import train as train_command

from loader_setup import write_shards
from synthetic_shards import clip_key, make_shards
from train_setup import losses, start, wait_for_step, write_config

STEPS = 40
COSINE = ("--model.tower.kind=cosine", "--model.tower.patch_size=4", "--model.embedding_dim=48")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("train") / "shards", num_samples=9, samples_per_shard=4)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("val") / "shards", num_samples=3, prefix="val")


@pytest.fixture(scope="module")
def unbroken(shards: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted: it crosses epochs of 4 batches ten times."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder / "c.yaml", shards, folder / "run", held_out, steps=STEPS, eval_every=15)
    assert train_command(load_config(config)) == 0
    return folder / "run"


def test_a_mixture_in_the_file_is_trained_on_and_its_rejects_are_written_down(shards: Path, tmp_path: Path) -> None:
    damaged = write_shards(tmp_path / "damaged", 6, 6, bad={1, 4})
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=12)
    values = yaml.safe_load(config.read_text())
    values["data"] |= {
        "shards": {"clean": {"shards": str(shards), "weight": 3}, "damaged": {"shards": str(damaged)}},
        "max_reject_share": 0.9,
        "epoch_samples": 8,
        "workers": 1,
    }
    config.write_text(yaml.safe_dump(values))
    assert train_command(load_config(config)) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 12
    logged = rows[-1]
    assert logged["rejects"] >= 1
    assert logged["worker_restarts"] == logged["cache_hits"] == logged["cache_misses"] == 0
    assert all(row["decode_ms"] > 0 and 0 <= row["wait_share"] <= 1 and row["samples_per_s"] > 0 for row in rows)
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["key"] for reject in rejects} <= {clip_key(1), clip_key(4)}
    assert all("damaged" in reject["shard"] and reject["reason"] for reject in rejects)

    values["data"]["shards"]["clean"]["weight"] = 2
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(StateError, match=r"weights was .*'clean': 3.* is .*'clean': 2"):
        train_command(load_config(config))
    with pytest.raises(ConfigError, match="set in the file"):
        load_config(config, ["--data.shards.clean.weight", "5"])


def test_a_run_leaves_what_it_says(unbroken: Path, held_out: Path) -> None:
    rows = read_metrics(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "eval" in row] == [15, 30, STEPS]
    folder = unbroken / "checkpoints"
    kept = [path.name for path in ckpt.list_checkpoints(folder)]
    best = ckpt.best_checkpoint(folder)
    assert kept[-2:] == ["step-00000039", "step-00000040"]
    assert best is not None
    assert len(kept) == 2 + (best.name not in kept[-2:])
    ratios = {row["step"]: row["eval"]["teacher_forced"]["ratio"] for row in rows if "eval" in row}
    assert int(best.name.split("-")[1]) == min(ratios, key=lambda step: ratios[step])

    run = build(load_config(unbroken / "config.yaml"))
    assert run.eval_loader is not None
    fresh = evaluate(run.module, run.eval_loader, rollout_steps=2)
    ckpt.load_weights(ckpt.list_checkpoints(folder)[-1], run.module)
    again = evaluate(run.module, run.eval_loader, rollout_steps=2)
    # An untrained model repeats every frame: the baseline itself, to the last bit.
    assert fresh.teacher_forced.ratio == fresh.slow.ratio == fresh.rollout[0].ratio == fresh.rollout[1].ratio == 1.0
    assert again.teacher_forced.ratio == rows[-1]["eval"]["teacher_forced"]["ratio"] != 1.0
    # The first generated frame has true history only.
    assert again.rollout[0].model == pytest.approx(again.forced_steps[0].model, rel=1e-5)
    assert (again.clips, again.teacher_forced.frames, again.slow.frames) == (3, 3 * 4, 3 * 2)


def test_killed_and_resumed_is_bit_equal(shards: Path, held_out: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", shards, output, held_out, steps=STEPS, eval_every=15)
    process = start("train", str(config))
    wait_for_step(process, output, 8)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = ckpt.latest_checkpoint(output / "checkpoints")
    assert reached is not None
    assert 6 <= reached.step < STEPS

    process = start("train", str(config))  # and once more, later, by SIGTERM
    wait_for_step(process, output, reached.step + 5)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == STOPPED, message
    assert "saved" in message
    assert "Traceback" not in message
    stopped = ckpt.latest_checkpoint(output / "checkpoints")
    assert stopped is not None
    assert stopped.step == max(losses(output))
    assert reached.step < stopped.step < STEPS

    assert train_command(load_config(config)) == 0
    assert losses(output) == losses(unbroken)
    weights = [ckpt.list_checkpoints(run / "checkpoints")[-1] / ckpt.MODEL_FILE for run in (output, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_finished_run_is_left_as_it_is(shards: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert train_command(load_config(unbroken / "config.yaml")) == 0
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    assert f"Resumed from step {STEPS}" in capsys.readouterr().err


def test_another_config_is_refused_by_name(unbroken: Path) -> None:
    config = load_config(unbroken / "config.yaml", ["--train.lr", "0.5", "--model.num_layers", "1"])
    with pytest.raises(ConfigError, match=r"model.num_layers was 2, is 1; train.lr was 0.001, is 0.5"):
        run_config(config)
    # What does not change the numbers may change.
    assert train_command(load_config(unbroken / "config.yaml", ["--train.log_every", "7"])) == 0


def test_a_run_whose_checkpoint_says_more_than_it_has_to_is_resumed(unbroken: Path, tmp_path: Path) -> None:
    """As one that was written when a setting still counted as part of the result."""
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    newest = ckpt.latest_checkpoint(output / "checkpoints")
    assert newest is not None
    state = dict(newest.state)
    assert "batch_size" not in state["config"]["data"]
    state["config"] = {**state["config"], "data": {**state["config"]["data"], "batch_size": 2}, "output": "elsewhere"}
    ckpt.write_json(newest.path / ckpt.STATE_FILE, state)
    assert train_command(load_config(output / "config.yaml", ["--output", str(output)])) == 0


def test_compiling_for_many_masks_is_warned_of_once() -> None:
    from framestream.model.compiled_masks import MaskWatch

    from model_setup import batch_of, small_module

    one, short = batch_of(lengths=(24, 24)), batch_of(lengths=(24, 3))
    for backend, warned in (("auto", 1), ("ranges", 1), ("dense", 0)):
        watch = MaskWatch(small_module(attention_backend=backend), torch.device("cpu"))
        for batches, count in (((one, batch_of(seed=1)), 0), ((short, one, short), warned)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for batch in batches:
                    watch(batch)
            assert [str(entry.message)[:14] for entry in said] == ["train.compile:"] * count


def test_other_data_is_refused(unbroken: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", num_samples=5)
    with pytest.raises(StateError, match="data"):
        run_config(load_config(unbroken / "config.yaml", ["--data.shards", str(other)]))


def test_two_processes_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    """Two ranks with 2 clips each take the same steps as one with 4, up to the order of additions."""
    one = write_config(tmp_path / "one.yaml", shards, tmp_path / "one", steps=4)
    assert train_command(load_config(one, ["--data.batch_size", "4"])) == 0
    two = write_config(tmp_path / "two.yaml", shards, tmp_path / "two", shards, steps=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, "-m", "framestream.tools.cli", "train", str(two)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    final = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]["eval"]
    assert final["clips"] == 9  # five on one rank and four on the other, none twice
    assert "4 steps done" in done.stderr
    assert done.stderr.count("steps done") == 1  # by one rank only


def test_accumulated_batches_make_one_step(shards: Path, tmp_path: Path) -> None:
    plain = write_config(tmp_path / "a.yaml", shards, tmp_path / "a", steps=2)
    options = ["--data.augment", "false", "--data.random_end", "false"]
    assert train_command(load_config(plain, ["--data.batch_size", "4", *options])) == 0
    parts = write_config(tmp_path / "b.yaml", shards, tmp_path / "b", steps=2, accumulate=2)
    assert train_command(load_config(parts, options)) == 0
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-4)


def test_packed_clips_learn_what_clips_apart_do(shards: Path, held_out: Path, tmp_path: Path) -> None:
    found = {}
    for pack_to in (None, 256):  # a clip has 8 frames of 16 tokens, so that two fit
        name = str(pack_to)
        config = write_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, held_out, steps=4)
        values = yaml.safe_load(config.read_text())
        values["data"] |= {"pack_to": pack_to, "batch_size": 4}
        config.write_text(yaml.safe_dump(values))
        if pack_to:
            batch = next(iter(build(load_config(config)).loader))
            assert batch["video_frames"].shape[:2] == (2, 16)
            with pytest.raises(ConfigError, match=r"model\.rollout_steps continues one clip, and data\.pack_to"):
                build(load_config(config, ["--model.rollout_steps", "2"]))
        assert train_command(load_config(config)) == 0
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        found[pack_to] = (losses(tmp_path / name), rows[-1]["eval"]["teacher_forced"]["ratio"])
        assert rows[-1]["eval"]["clips"] == 3  # held-out ones stand apart
    assert found[256][0] == pytest.approx(found[None][0], rel=1e-4)
    assert found[256][1] == pytest.approx(found[None][1], rel=1e-4)


def test_progress_and_tensorboard(shards: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(write_config(tmp_path / "c.yaml", shards, tmp_path, shards, steps=3, eval_every=2))
    run, seen = build(config), []
    settings = dataclasses.replace(config.train, tensorboard=True)
    train(run.module, run.loader, settings, output=tmp_path, eval_loader=run.eval_loader, on_progress=seen.append)
    assert [(one.step, one.steps) for one in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(one.samples_per_s > 0 and 0 <= one.wait_share <= 1 for one in seen)
    assert [one.evaluation is not None for one in seen] == [False, True, False]
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    scalars = {event.step: event.value for event in written.Scalars("train/loss")}
    assert scalars == pytest.approx(losses(tmp_path))
    assert {"train/lr", "train/grad_norm", "train/wait_share", "eval/error_ratio"} <= set(written.Tags()["scalars"])


def test_divergence_stops_before_it_is_saved(shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(FramestreamError, match=r"Step \d+: loss .* clips clip-\d+.*lower train.lr"):
        run_config(load_config(config))
    newest = ckpt.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == max(losses(tmp_path / "run"))


def test_half_written_and_damaged_checkpoints(shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=3)
    assert train_command(load_config(config)) == 0
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".step-00000099.tmp").mkdir()
    newest = ckpt.latest_checkpoint(folder)
    assert newest is not None
    assert newest.step == 3
    ckpt.prune(folder, 1)
    assert not (folder / ".step-00000099.tmp").exists()
    (newest.path / ckpt.MODEL_FILE).write_bytes(b"not weights")
    with pytest.raises(StateError, match="step-00000003"):
        run_config(load_config(config))
    for damaged in ("{", "[]", "[" * 100_000):
        (newest.path / ckpt.STATE_FILE).write_text(damaged)
        with pytest.raises(StateError, match="step-00000003"):
            run_config(load_config(config))


def test_ranks_that_write_nothing_keep_nothing(tmp_path: Path) -> None:
    """Of shares, one tensor at a time is put together, and what is written is on the CPU."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        module = torch.nn.Linear(4, 3)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        assert (ckpt.weights_of(module, False), ckpt.optimizer_of(optimizer, False)) == ({}, {})
        kept = ckpt.optimizer_of(optimizer)
        assert kept["param_groups"] == optimizer.state_dict()["param_groups"]
        for tensors in (ckpt.weights_of(module), *kept["state"].values()):
            assert tensors
            assert {(type(value), value.device.type) for value in tensors.values()} == {(torch.Tensor, "cpu")}
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_cannot_run_code(shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", steps=1)
    assert train_command(load_config(config)) == 0
    newest = ckpt.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    torch.save(_Payload(tmp_path / "executed"), newest.path / ckpt.OPTIMIZER_FILE)
    with pytest.raises(StateError, match="refused"):
        run_config(load_config(config))
    assert not (tmp_path / "executed").exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_leaking_targets_are_counted_and_never_measured(shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards)
    found = {}
    for mask, on_leak in (("time_causal", "exclude"), ("fast_slow", "exclude"), ("fast_slow", "allow")):
        run = build(load_config(config, ["--data.mask", mask, "--model.on_leak", on_leak]))
        assert run.eval_loader is not None
        found[mask, on_leak] = evaluate(run.module, run.eval_loader, rollout_steps=0)
        assert run.module.config.on_leak == on_leak
    honest, leaky, allowed = found.values()
    assert honest.leaking_targets == 0 < leaky.leaking_targets == allowed.leaking_targets
    for one in (leaky, allowed):
        measured = one.teacher_forced.frames + one.slow.frames
        assert measured == honest.teacher_forced.frames + honest.slow.frames - one.leaking_targets


def test_bf16_evaluation_measures_against_full_precision(shards: Path, tmp_path: Path) -> None:
    """An untrained model repeats every frame whatever it computes in, and what it is compared with is not rounded."""
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards)
    run = build(load_config(config, [*COSINE]))
    assert run.eval_loader is not None
    seen: list[torch.dtype] = []
    run.module.tower.tower.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    full, half = (
        evaluate(run.module, run.eval_loader, rollout_steps=2, autocast=dtype) for dtype in (None, torch.bfloat16)
    )
    assert set(seen) == {torch.float32}
    assert half.teacher_forced == full.teacher_forced
    assert half.rollout[0] == full.rollout[0]
    assert half.forced_steps == full.forced_steps


def test_normalised_targets_are_not_measured_as_pixels(shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards)
    run = build(load_config(config, [*COSINE, "--model.target_norm=true"]))
    assert run.eval_loader is not None
    found = evaluate(run.module, run.eval_loader, rollout_steps=0)
    errors = [run.module.eval()(batch).copy_last_error for batch in run.eval_loader]
    want = sum(float(error[error.isfinite()].double().sum()) for error in errors)
    assert found.teacher_forced.copy_last + found.slow.copy_last == pytest.approx(want)


def test_batches_without_meta_have_no_padding_rows(shards: Path, tmp_path: Path) -> None:
    run = build(load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards)))
    assert run.eval_loader is not None
    batches = list(run.eval_loader)
    bare = [{name: value for name, value in batch.items() if name != "meta"} for batch in batches]
    with_meta, without = (evaluate(run.module, b, rollout_steps=2) for b in (batches, bare))
    assert (without.clips, without.teacher_forced, without.rollout) == (
        with_meta.clips,
        with_meta.teacher_forced,
        with_meta.rollout,
    )


def test_the_summary_says_what_was_not_measured() -> None:
    nothing = Evaluation(3, ErrorSum(1.0, 2.0, 4), ErrorSum(), (ErrorSum(),), (ErrorSum(),), 0, 1.0)
    assert describe(nothing).endswith("3 held-out clips: 0.500, generating 1 frames: not measured")


def test_the_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    model = torch.tensor([[1.0, float("nan")], [30.0, 2.0]])
    copied = torch.tensor([[2.0, 5.0], [20.0, float("nan")]])
    both = ErrorSum.over(model, copied)
    assert (both.frames, both.ratio) == (2, 31.0 / 22.0)
    assert (both + ErrorSum(9.0, 38.0, 1)).ratio == 40.0 / 60.0
    assert ErrorSum().ratio != ErrorSum().ratio  # NaN: nothing was measured


def test_learning_rate_warms_up_and_decays() -> None:
    settings = TrainSettings(steps=100, lr=1.0, warmup_steps=10, min_lr_share=0.1)
    rates = [settings.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert settings.lr_at(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"lr": 0.0}, {"precision": "fp16"}, {"accumulate": 0}, {"grad_clip": -1}, {"seed": -1}),
        *({"beta1": 1.0}, {"beta2": -0.1}, {"beta2": math.nan}, {"eval_loss": "mae"}, {"eval_batches": 0}),
        *({"min_lr_share": -0.1}, {"min_lr_share": 1.5}, {"weight_decay": math.nan}),
        *({"parallel": "fsdp"}, {"feature_cache_gb": 0}, {"feature_cache_gb": math.inf}),
    ],
)
def test_impossible_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{next(iter(wrong))}"):
        TrainSettings(**wrong)  # type: ignore[arg-type]
