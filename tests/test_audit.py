"""`framestream audit`: honest models pass, models that leak are caught, by name, through every way in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from framestream.pipeline.errors import ConfigError, FramestreamError
from framestream.pipeline.masks import RULES
from framestream.pipeline.sampling import FastSlowSampling
from framestream.tools.audit import audit, audit_module, audit_reconstruction
from framestream.tools.audit_cost import measure_leak_cost
from framestream.tools.audit_picture import labels, picture
from framestream.tools.config import load_config
from framestream.tools.train import train

from leaking_modules import NormOverTime, SmoothingTower, TokenDecoder
from model_setup import PATCH, SIDE, batch_of, small_module
from synthetic_shards import make_shards
from train_setup import write_config

CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
TINY: dict[str, Any] = {
    "data": {"sampling": {"kind": "fast_slow", "num_fast": 4, "num_slow": 4}, "image_size": 16},
    "model": {
        "tower": {"kind": "pixel", "patch_size": 8},
        "embedding_dim": 192,
        "predictor_dim": 16,
        "num_heads": 2,
        "num_layers": 2,
        "hidden_size": 8,
    },
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def frames(count: int = 5) -> torch.Tensor:
    return torch.randn(2, count, 3, 8, generator=torch.Generator().manual_seed(1))


# -- any module ----------------------------------------------------------------------------------------------


def test_a_decoder_without_memory_mask_is_caught_and_its_repair_passes() -> None:
    torch.manual_seed(0)
    leaky = audit_module(TokenDecoder(memory_masked=False).eval(), frames(), CAUSAL, num_layers=2)
    assert len(leaky.leaks) == 10  # all pairs (later, earlier) of 5 frames
    assert (4, 0) in leaky.leaks
    assert not leaky.causal
    honest = audit_module(TokenDecoder(memory_masked=True).eval(), frames(), CAUSAL, num_layers=2)
    assert honest.causal
    assert torch.equal(honest.perturbed, CAUSAL)
    assert honest.gradient is not None
    assert torch.equal(honest.gradient, CAUSAL)


def test_a_mask_of_inverted_meaning_is_caught() -> None:
    torch.manual_seed(0)
    model = TokenDecoder(memory_masked=True, inverted=True).eval()
    found = audit_module(model, frames(), CAUSAL, num_layers=2)
    assert (4, 0) in found.leaks


def test_statistics_over_time_are_caught_and_those_of_a_frame_pass() -> None:
    alone = torch.eye(5, dtype=torch.bool)
    assert len(audit_module(NormOverTime(per_frame=False), frames(), alone).leaks) == 20
    assert audit_module(NormOverTime(per_frame=True), frames(), alone).causal


@pytest.mark.parametrize("gradient", [True, False])
def test_a_module_that_ignores_other_frames_proves_nothing(gradient: bool) -> None:
    found = audit_module(NormOverTime(per_frame=True), frames(), CAUSAL, gradient=gradient)
    assert found.proves_nothing
    assert not found.causal
    assert not found.leaks
    assert len(found.silent) == 10


def test_both_instruments_find_the_same_leak_alone() -> None:
    """A rounded path has no derivative, and a path behind a switch moves no bit of this input."""
    hidden = audit_module(lambda x: x + x.mean(1, keepdim=True).round().detach(), 4 * frames(), CAUSAL)
    assert hidden.gradient is not None
    assert torch.equal(hidden.gradient, torch.eye(5, dtype=torch.bool))
    assert hidden.leaks


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(FramestreamError, match=r"eval mode"):
        audit_module(torch.nn.Dropout(), frames(), CAUSAL)
    with pytest.raises(ConfigError, match=r"float frames"):
        audit_module(torch.nn.Identity(), frames(4), CAUSAL)
    with pytest.raises(ConfigError, match=r"first two axes"):
        audit_module(lambda x: x[:, 1:], frames(), CAUSAL)


# -- the reconstruction module -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["concat", "interleave", "time"])
@pytest.mark.parametrize("rule", RULES)
def test_every_mask_in_every_order_passes_with_equality(rule: str, order: str) -> None:
    sampling = FastSlowSampling(num_fast=3, num_slow=3, order=order)  # type: ignore[arg-type]
    found = audit_reconstruction(small_module(num_layers=2), batch_of(sampling, (6, 2), mask=rule))
    assert found.causal, found.leaks
    for measured, allowed in zip(found.measured, found.allowed, strict=True):
        assert torch.equal(measured, allowed)
    assert sum(check.silent for check in found.checks) == 0


@pytest.mark.parametrize("backend", ["ranges", "dense"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": 3, "num_hist": 2},
        {"use_frame_causal_mask": False},
        {"slow_pool": 2, "target_norm": True, "loss": "cosine"},
        {"gradient_checkpointing": True, "rollout_steps": 1, "loss": "l1"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_backend_and_setting_passes(settings: dict[str, Any], backend: str) -> None:
    patches = (4, 16) if "slow_pool" in settings else 16
    mask = None if "use_frame_causal_mask" in settings else "time_causal"
    batch = batch_of(FastSlowSampling(3, 3), (9, 2), mask=mask, patches=patches)
    found = audit_reconstruction(small_module(attention_backend=backend, **settings), batch)
    assert found.causal, found.leaks
    assert [check.name for check in found.checks] == ["frames", "errors", "states", "gradient", "targets", "rollout"]


def test_a_tower_that_mixes_frames_is_caught_and_named() -> None:
    batch = batch_of(FastSlowSampling(4, 2, order="time"), (6,))
    leaky = audit_reconstruction(small_module(SmoothingTower(SIDE, PATCH, 0.1)), batch)
    assert not leaky.causal
    failed = {check.name for check in leaky.checks if not check.passed}
    assert {"frames", "errors", "targets"} <= failed
    assert any(leak.startswith("frame 4 (fast, 0.13 s) reaches the prediction at frame 3 (") for leak in leaky.leaks)
    assert audit_reconstruction(small_module(SmoothingTower(SIDE, PATCH, 0.0)), batch).causal


def test_slow_duplicates_of_targets_are_caught_where_they_are_scored() -> None:
    batch = batch_of(FastSlowSampling(4, 4), (8,), mask="fast_slow")
    left_out = audit_reconstruction(small_module(), batch)
    assert left_out.causal
    kept = audit_reconstruction(small_module(on_leak="allow"), batch)
    assert [check.name for check in kept.checks if not check.passed] == ["targets"]
    assert any("which is scored on frame" in leak for leak in kept.leaks)
    assert any("X" in line.plain for line in picture(kept))
    assert not any("X" in line.plain[:-60] for line in picture(left_out)[:-1])
    raising = audit_reconstruction(small_module(on_leak="raise"), batch)
    assert any("stops training" in leak for leak in raising.leaks)


def test_a_conditioning_that_reads_later_states_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_module()
    honest = module.predictor.forward
    # As a host does that forgets to pass the times on.
    monkeypatch.setattr(module.predictor, "forward", lambda *a, **k: honest(*a[:4], None, **k))
    found = audit_reconstruction(module, batch_of(FastSlowSampling(3, 2), (6,)))
    assert {check.name for check in found.checks if not check.passed} == {"states", "gradient"}
    assert any("hidden state of 0.17 s reaches the prediction at frame 0" in leak for leak in found.leaks)


def test_an_audit_leaves_the_module_as_it_was() -> None:
    module = small_module(on_leak="raise").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    audit_reconstruction(module, batch_of(FastSlowSampling(3, 2), (6,)))
    assert module.training
    assert module.config.on_leak == "raise"
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_packed_batches_are_refused() -> None:
    batch = batch_of(FastSlowSampling(3, 2), (6,))
    with pytest.raises(ConfigError, match=r"packed"):
        audit_reconstruction(small_module(), {**batch, "frame_clip": torch.zeros_like(batch["frame_index"])})


def test_an_untrained_module_proves_nothing() -> None:
    """Its last layers are zero: it repeats frames, and would pass under any mask."""
    found = audit_reconstruction(small_module(trained=False), batch_of(FastSlowSampling(3, 2), (6,)))
    assert found.proves_nothing
    assert not found.causal
    assert not found.leaks


# -- the command ---------------------------------------------------------------------------------------------


def test_a_config_is_shown_to_be_causal(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(config) == 0
    shown = capsys.readouterr().out
    assert "Causal:" in shown
    assert "was reached" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    "setting",
    ["data.mask=fast_slow", "data.mask=full", "data.mask=frame_causal", "data.mask=sliding_window"],
)
def test_targets_that_are_seen_and_scored_exit_with_1(
    config: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(config, overrides=[setting]) == 0
    assert "left out of the loss" in " ".join(capsys.readouterr().out.split())
    assert audit(config, overrides=[setting, "model.on_leak=allow"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "NOT CAUSAL" in shown
    assert "FAIL targets" in shown
    assert "reaches the prediction at frame" in shown


def test_json_holds_checks_and_matrices(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(config, json=True, overrides=["data.mask=fast_slow", "model.on_leak=allow"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["causal"] is False
    clip = found["clips"][0]
    assert len(clip["measured"]) == len(clip["frame_index"]) == 8
    assert clip["measured"] == clip["allowed"]
    assert [c["name"] for c in found["checks"] if not c["passed"]] == ["targets"]
    assert found["clips"][1]["valid"].count(False) > 0


def test_the_same_seed_says_the_same(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for seed in (3, 3):
        assert audit(config, json=True, seed=seed) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


def test_a_picture_is_written(config: str, tmp_path: Path) -> None:
    assert audit(config, output=str(tmp_path / "audit.png")) == 0
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert audit(config, output=str(tmp_path / "audit.what")) == 2


def test_more_frames_than_fit_are_not_drawn(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(config, overrides=["data.sampling.num_fast=40", "model.num_layers=1"]) == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize("sampling", [{"kind": "dense", "num_frames": 1}, {"kind": "fast_slow", "num_fast": 32}])
def test_odd_numbers_of_frames(sampling: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "sampling": {**sampling}}}))
    assert audit(str(path), overrides=["model.num_layers=1"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_resampled_and_snapped_layouts_are_laid_out(config: str) -> None:
    overrides = ["data.sampling.fps=10", "data.sampling.slow_snap=keyframe", "data.sampling.order=interleave"]
    assert audit(config, overrides=overrides) == 0


def test_a_run_and_its_checkpoints_are_audited(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    path = write_config(tmp_path / "c.yaml", shards, output, steps=3)
    assert train(load_config(path)) == 0
    capsys.readouterr()
    assert audit(str(output)) == 0
    assert "weights of step-00000003" in capsys.readouterr().out
    checkpoint = output / "checkpoints" / "step-00000003"
    assert audit(str(checkpoint), shards=str(shards), json=True) == 0
    assert "clips clip-0" in json.loads(capsys.readouterr().out)["notes"][1]
    alone = tmp_path / "alone"  # without the run folder around it
    shutil.copytree(checkpoint, alone)
    assert audit(str(alone)) == 0
    assert audit(str(alone), overrides=["model.num_layers=3"]) == 2
    assert "do not fit" in capsys.readouterr().err


def test_what_cannot_be_done_exits_with_2(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "There is no config file": {"target": str(tmp_path / "none.yaml")},
        "no run folder": {"target": str(tmp_path)},
        "section.key=value": {"target": config, "overrides": ["model.num_layers"]},
        "unknown key": {"target": config, "overrides": ["model.layers=2"]},
        "no gradient on the CPU": {"target": config, "overrides": ["model.attention_backend=flex"]},
        "must not be negative": {"target": config, "seed": -1},
        "contradict": {"target": config, "overrides": ["model.mask=full", "data.mask=time_causal"]},
        "missing": {"target": config, "shards": str(tmp_path / "missing")},
    }
    if not torch.cuda.is_available():
        cases["no CUDA device"] = {"target": config, "device": "cuda"}
    for message, arguments in cases.items():
        assert audit(**arguments) == 2, message  # type: ignore[arg-type]
        assert message in capsys.readouterr().err


def test_one_clip_is_enough(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_shards(tmp_path / "one", num_samples=1)
    assert audit(config, shards=str(one), json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["clips"]) == 1
    assert found["notes"][-1] == "clips clip-0000"


@pytest.mark.slow
def test_a_leak_wins_on_true_history_and_loses_in_rollout() -> None:
    found = measure_leak_cost(0)
    assert found["leaky"].teacher_forced < found["honest"].teacher_forced
    assert found["leaky"].rollout[-1] > found["honest"].rollout[-1]
    assert found["leaky"].rollout[-1] > 1.3 * found["leaky"].teacher_forced


def test_labels_count_each_stream() -> None:
    layout = audit_reconstruction(small_module(), batch_of(FastSlowSampling(3, 2), (1,))).layouts[0]
    assert labels(layout) == ["p0", "s0", "p1", "p2", "f0"]


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["ranges", "dense"])
def test_masks_hold_on_a_gpu(config: str, rule: str, backend: str) -> None:
    overrides = [f"data.mask={rule}", f"model.attention_backend={backend}"]
    assert audit(config, device="cuda", overrides=overrides) == 0


@pytest.mark.gpu
def test_flex_attention_holds_on_a_gpu(config: str) -> None:
    overrides = ["model.attention_backend=flex", "model.predictor_dim=32"]
    assert audit(config, device="cuda", overrides=overrides) == 0
