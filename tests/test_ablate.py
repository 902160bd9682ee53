"""`framestream ablate`: rows that can be compared, sets whose answer is known, runs that go on where they stopped."""

from __future__ import annotations

import json
import re
import signal
import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.patch_basis import CosineTower
from framestream.pipeline.errors import ConfigError, FramestreamError, StateError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import leaking_targets, make_mask
from framestream.pipeline.sampling import FAST, DenseSampling, make_sampling
from framestream.tools.ablate import _claim, _experiment, _scores, ablate
from framestream.tools.ablate_check import check_equal, tokens_of_batch
from framestream.tools.ablate_cost import step_costs
from framestream.tools.ablate_report import compared, findings, gather, how_to_read, markdown, page, summary
from framestream.tools.ablate_rows import ROWS, fast_slow_of, row_config
from framestream.tools.ablate_score import last_fast, score, valid_tokens
from framestream.tools.cli import main
from framestream.tools.config import load_config
from framestream.tools.synthetic_sets import BARS, FRAMES, GREY, SETS, SHOWN, SIDE, SyntheticLoader, moving_sprites
from framestream.tools.train import build_tower

from page_checks import Page
from synthetic_shards import make_shards
from train_setup import SMALL, start, wait_for_step

TINY = [
    "data.batch_size=2",
    "data.sampling={kind: fast_slow, num_fast: 4, num_slow: 4}",
    "model.tower.patch_size=8",
    "model.embedding_dim=192",
    "model.predictor_dim=16",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.start_with_differences=false",
    "train.steps=3",
    "train.warmup_steps=1",
    "train.checkpoint_every=1",
    "train.log_every=1",
    "train.rollout_steps=2",
    "train.eval_batches=1",
]


def loaders(name: str, **options: Any) -> dict[str, SyntheticLoader]:
    """A loader for each row of the shipped configuration."""
    config = load_config("ablate")
    tower = build_tower(config)
    found = {}
    for row in ROWS:
        changed = row_config(config, ROWS[row], tower)
        sampling, (mask, _) = make_sampling(changed.sampling()), changed.mask()
        found[row] = SyntheticLoader(name, sampling, 16, mask, batch_size=2, **options)
    return found


def scores(output: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("runs/*/score.json"))}


# -- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ablate", "demo"])
def test_rows_have_equal_tokens_and_each_is_what_its_name_says(name: str) -> None:
    config = load_config(name)
    tower = build_tower(config)
    patches = {"ablate": (16, 16), "demo": (16, 64)}[name]
    counted = set()
    for row in ROWS.values():
        changed = row_config(config, row, tower)
        plan = make_sampling(changed.sampling()).plan(100)
        counted.add(sum(patches[stream] for stream in plan.stream))
        assert (set(plan.stream.tolist()) == {0, 1}) == row.fast_slow
        assert changed.model.use_frame_causal_mask == row.frame_mask
    assert len(counted) == 1
    masks = {row: row_config(config, ROWS[row], tower).mask()[0] for row in ROWS}
    assert masks["full"] == "time_causal"
    assert masks["leaky"] == "fast_slow"


def test_streams_that_cannot_be_compared_are_refused() -> None:
    config = load_config("demo", ["--data.sampling.num_slow", "3"])
    with pytest.raises(ConfigError, match=r"no whole number of frames of 64"):
        row_config(config, ROWS["full"], build_tower(config))
    with pytest.raises(ConfigError, match=r"samples one stream"):
        fast_slow_of(load_config("short"))


def test_drawn_clips_too_short_for_a_row_are_refused_before_training(tmp_path: Path) -> None:
    """Padding is no token: each of these would compare rows that do not see as much, or no longer ask the question."""
    for name, override, said in (
        ("memory", "model.fast_pool=2", r"10 of the 30 frames of the row Baseline would be padding"),
        ("memory", "data.sampling.fast_stride=2", r"2 of the 12 frames of the row Baseline would be padding"),
        ("sprites", "data.sampling.num_slow=8", r"2 of the 14 frames .* have 12 frames"),
        ("memory", "data.sampling.num_slow=10", r"Baseline would begin at frame 4 of the set memory"),
        ("memory", "data.sampling={kind: fast_slow, num_fast: 6, num_slow: 4, fast_stride: 2}", r"begin at frame 1 of"),
        (
            "memory",
            "data.sampling={kind: fast_slow, num_fast: 6, num_slow: 6, slow_stride: 1, slow_coverage: stride}",
            r"No slow frame of the row \+Fast-slow",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            ablate(set=name, output=str(tmp_path / "new"), overrides=[override])  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_tokens_of_a_batch_and_of_a_layout_leave_padding_out() -> None:
    """Two frames of three are there; the dense row of so short a clip has fewer tokens, and that is refused."""
    sampling = make_sampling({"kind": "fast_slow", "num_fast": 2, "num_slow": 1})
    for length, expected in ((3, 4 + 2 * 16), (1, 4 + 16)):
        plan = sampling.plan(length)
        batch = {
            "frame_stream": torch.from_numpy(plan.stream).expand(2, -1),
            "frame_valid": torch.from_numpy(plan.valid).expand(2, -1),
            "meta": [{}, {"padding": True}],  # a clip that only fills the batch is none
        }
        assert tokens_of_batch(batch, (4, 16)) == [expected]
        assert valid_tokens(FrameLayout.from_plan(plan, (4, 16))) == expected
    check_equal({"full": [36, 36], "baseline": [36, 36]})
    with pytest.raises(ConfigError, match=r"full 36 \(36\), baseline 28 \(20\)\. Clips are too short for baseline"):
        check_equal({"full": [36, 36], "baseline": [36, 20]})
    with pytest.raises(ConfigError, match=r"Clips are too short for baseline, frame_mask:"):
        check_equal({"baseline": [36, 20], "frame_mask": [36, 20], "full": [36, 36]})


@pytest.mark.parametrize("name", SETS)
def test_rows_are_scored_on_the_same_frames_of_the_same_clips(name: str) -> None:
    batches = {row: loader.batch(0, 0) for row, loader in loaders(name, split="held_out").items()}
    seen = []
    for batch in batches.values():
        at = last_fast(batch, 6)
        index = batch["frame_index"].gather(1, at)
        picked = batch["video_frames"][torch.arange(2)[:, None], at]
        seen.append((batch["keys"], index.tolist(), picked))
    assert seen[0][1] == [list(range(FRAMES[name] - 6, FRAMES[name]))] * 2
    for keys, index, picked in seen[1:]:
        assert (keys, index) == seen[0][:2]
        assert torch.equal(picked, seen[0][2])


@pytest.mark.parametrize("name", SETS)
def test_only_the_leaky_row_can_see_what_it_is_scored_on(name: str) -> None:
    for row, loader in loaders(name).items():
        batch = loader.batch(0, 0)
        layout = FrameLayout.from_plan(loader.sampling.plan(FRAMES[name]), 16)
        seen = leaking_targets(layout, make_mask(loader.mask, layout), 2)
        shown = sum(seen[place] for place in last_fast(batch, 6)[0, :-1].tolist())
        assert bool(shown) == ROWS[row].leaks


def test_token_order_is_honest_only_where_frames_stand_in_order_of_time() -> None:
    sampling = fast_slow_of(load_config("ablate"))
    for order, honest in (("time", True), ("concat", False)):
        layout = FrameLayout.from_plan(replace(sampling, order=order).plan(FRAMES["sprites"]), 16)
        assert (not any(leaking_targets(layout, make_mask("frame_causal", layout), 2))) == honest


# -- sets ----------------------------------------------------------------------------------------------------


def test_two_frames_of_sprites_determine_the_next() -> None:
    """The phase of the longest wave tells the place of a single square: it turns by the same angle in every frame."""
    video = moving_sprites(64, torch.Generator().manual_seed(0), squares=1).double() - GREY
    loudest = video.abs().sum(dim=(1, 3, 4)).argmax(dim=1)
    wave = torch.fft.fft2(video[torch.arange(64), :, loudest])
    for place in (wave[:, :, 0, 1], wave[:, :, 1, 0]):
        turn = (place[:, 1:] / place[:, :-1]).angle()
        assert (turn - turn[:, :1]).abs().max() < 0.1
        pixels = turn.abs().mean(dim=1) * SIDE / (2 * torch.pi)
        assert pixels.min() > 0.45
        assert pixels.max() < 2.05


def test_what_opens_is_seen_early_and_nowhere_in_the_dense_window() -> None:
    """Clips that differ in the colour of one bar alone differ in slow frames, and in no newest frame until it opens."""
    frames = FRAMES["memory"]
    every = loaders("memory")
    dense = every["frame_mask"].batch(0, 0)["frame_index"][0].tolist()
    merged = every["full"].batch(0, 0)
    slow = merged["frame_index"][0][merged["frame_stream"][0] != FAST].tolist()
    assert min(dense) >= SHOWN  # the newest frames begin after the bars were hidden
    assert sum(index < SHOWN for index in slow) >= 2
    video = SETS["memory"](32, torch.Generator().manual_seed(0))
    wide = SIDE // BARS
    for bar in range(BARS):
        where = video[..., bar * wide : (bar + 1) * wide]
        opens = frames - BARS + bar
        assert (where[:, :SHOWN] == where[:, :1]).all()
        assert (where[:, opens:] == where[:, :1]).all()
        hidden = where[:, SHOWN:opens]
        assert (hidden == hidden[:1]).all()  # the same in all clips, so that nothing tells colours
        assert (hidden.double().mean(dim=(3, 4)) == GREY).all()
        assert len(where[:, 0, :, 0, 0].unique(dim=0)) == 32


def test_a_loader_goes_on_where_another_stopped_and_refuses_other_clips() -> None:
    def loader(**changed: Any) -> SyntheticLoader:
        return SyntheticLoader(
            **{"name": "sprites", "sampling": make_sampling({"kind": "dense", "num_frames": 4}), "patches": 4}
            | {"mask": "frame_causal", "batch_size": 2, "batches": 3}
            | changed
        )

    whole = loader()
    all_of_them = [batch["video_frames"] for _ in range(2) for batch in whole]
    assert len({tuple(video.flatten().tolist()) for video in all_of_them}) == 6  # no clip twice, over epochs too
    first = loader()
    begun = iter(first)
    for _ in range(2):
        next(begun)
    state = json.loads(json.dumps(first.state_dict()))
    second = loader()
    second.load_state_dict(state)
    rest = [batch["video_frames"] for _ in range(2) for batch in second]
    assert all(torch.equal(a, b) for a, b in zip(rest, all_of_them[2:], strict=True))
    with pytest.raises(StateError, match=r"seed changed"):
        loader(seed=1).load_state_dict(state)
    held_out = loader(split="held_out")
    assert [b["keys"] for b in held_out] == [b["keys"] for b in held_out]
    with pytest.raises(ConfigError, match=r"no synthetic set"):
        loader(name="circles")


# -- scores --------------------------------------------------------------------------------------------------


def test_an_untrained_model_scores_one_everywhere_and_a_leak_is_counted() -> None:
    """Before its first step the model repeats the last frame, which is what errors are divided by."""
    every = loaders("sprites", split="held_out", batches=1)
    module = AutoregressiveReconstruction(CosineTower(16, 4), 8, {"embedding_dim": 48, "num_heads": 3})
    for row in ("full", "leaky"):
        found = score(module, every[row], frames=6, rollout_steps=4)
        assert found.teacher_forced.ratio == pytest.approx(1)
        assert found.teacher_forced.frames == 2 * 5
        assert [step.ratio for step in found.rollout] == pytest.approx([1] * 4)
        assert bool(found.leaking) == ROWS[row].leaks
        assert (found.tokens, found.fewest_tokens) == (192, 192)
    assert module.config.on_leak == "exclude"
    assert module.training
    short = SyntheticLoader("sprites", DenseSampling(14), 16, "frame_causal", 2, batches=1)  # 2 frames of padding
    found = score(module, short, frames=6, rollout_steps=4)
    assert (found.tokens, found.fewest_tokens) == (192, 192) != (14 * 16, 14 * 16)
    with pytest.raises(ConfigError, match=r"13 fast frames"):
        score(module, every["full"], frames=13, rollout_steps=4)


def test_scores_agree_with_the_errors_that_the_module_reports() -> None:
    torch.manual_seed(0)
    every = loaders("memory", split="held_out", batches=1)
    config = {"embedding_dim": 48, "num_heads": 3, "target_norm": True, "on_leak": "allow"}
    module = AutoregressiveReconstruction(CosineTower(16, 4), 8, config)
    with torch.no_grad():
        for weight in module.predictor.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        batch = every["leaky"].batch(0, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = module.eval()(batch)
        free = module.rollout(batch, 3)
    at = last_fast(batch, 6)[:, :-1]
    found = score(module, every["leaky"], frames=6, rollout_steps=3)
    assert found.teacher_forced.model == pytest.approx(float(own.frame_error.gather(1, at).sum()), rel=1e-4)
    assert found.teacher_forced.copy_last == pytest.approx(float(own.copy_last_error.gather(1, at).sum()), rel=1e-4)
    assert [s.model for s in found.rollout] == pytest.approx(free.frame_error.sum(0).tolist(), rel=1e-4)
    assert [s.copy_last for s in found.rollout] == pytest.approx(free.copy_last_error.sum(0).tolist(), rel=1e-4)


def test_costs_grow_with_the_batch() -> None:
    every = loaders("sprites")
    module = AutoregressiveReconstruction(CosineTower(16, 4), 8, {"embedding_dim": 48, "num_heads": 3, "num_layers": 1})
    small = every["full"].batch(0, 0)
    large = SyntheticLoader("sprites", every["full"].sampling, 16, "time_causal", batch_size=8).batch(0, 0)
    costs = step_costs({"small": (module, small), "large": (module, large)}, 1, torch.device("cpu"))
    assert costs["small"]["ms"] > 0
    assert 2 * costs["small"]["mb"] < costs["large"]["mb"] < 6 * costs["small"]["mb"]


def test_a_difference_counts_where_ranges_do_not_overlap() -> None:
    low, wide, high = (summary(values) for values in ([0.1, 0.2], [0.15, 0.9], [0.8, 0.9]))
    assert compared(low, high) == "less error (0.150 against 0.850)"
    assert compared(high, low) == "more error (0.850 against 0.150)"
    assert compared(low, wide).startswith("no difference")
    assert compared(low, summary([0.1, None])) == "not measured"
    assert summary([0.5])["std"] is None


def test_one_seed_states_numbers_and_no_difference() -> None:
    """One run has no range: 0.971 and 0.975 of different weights are the same to whoever has one of each."""
    assert compared(summary([0.971]), summary([0.975])) == "0.971 against 0.975 (one seed: no statement)"
    assert compared(summary([0.1]), summary([0.975, 0.976])) == "0.100 against 0.976 (one seed: no statement)"
    assert "says nothing" in how_to_read(1)
    for seeds in (2, 3):  # every order of the runs of two equal rows, counted
        runs = list(combinations(range(2 * seeds), seeds))
        apart = sum(max(run) - min(run) == seeds - 1 and (0 in run or 2 * seeds - 1 in run) for run in runs)
        assert f"{seeds} seeds do not overlap" in how_to_read(seeds)
        assert f"1 of {len(runs) // apart} comparisons" in how_to_read(seeds)


# -- the command ---------------------------------------------------------------------------------------------


def command(output: Path, *more: str, name: str = "memory") -> list[str]:
    return ["ablate", "--set", name, "--output", str(output), "--seeds", "2", *more, "--overrides", *TINY]


def test_killed_and_run_again_it_gives_the_same_numbers_and_a_page(tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    rows = ("--rows", "frame_mask", "leaky")
    process = start(*command(broken, *rows, name="sprites"))
    wait_for_step(process, broken / "runs" / "leaky-0", 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "ablation.json").exists()
    finished = (broken / "runs" / "frame_mask-0" / "metrics.jsonl").stat().st_mtime_ns
    assert main(command(broken, *rows, name="sprites")) == 0
    assert main(command(whole, *rows, name="sprites")) == 0
    assert len(scores(whole)) == 4
    assert scores(broken) == scores(whole)
    assert (broken / "runs" / "frame_mask-0" / "metrics.jsonl").stat().st_mtime_ns == finished

    results = json.loads((whole / "ablation.json").read_text())
    runs = results["rows"]["leaky"]["runs"]
    assert [run["teacher_forced"]["ratio"] for run in runs] == [
        scores(whole)[f"leaky-{seed}"]["teacher_forced"]["ratio"] for seed in range(2)
    ]
    assert results["rows"]["leaky"]["leaking"] > 0 == results["rows"]["frame_mask"]["leaking"]
    table = (whole / "ablation.md").read_text()
    assert table.count("\n| ") == 2
    assert f"{results['rows']['leaky']['forced']['mean']:.2f}" in table
    assert (whole / "ablation.png").read_bytes().startswith(b"\x89PNG")
    check_page(whole / "ablation.html", results)
    assert "2 seeds do not overlap" in (whole / "ablation.html").read_text(encoding="utf-8")

    runs = {row: [scores(whole)[f"{row}-0"]] for row in rows[1:]}
    costs = {row: results["rows"][row]["cost"] for row in runs}
    single = gather(results["settings"], runs, costs, {row: ROWS[row] for row in runs})
    for text in (page(single), markdown(single)):
        assert "One seed says nothing about differences" in text
        assert "overlap" not in text
        assert not re.search(r"over seeds|the range|less error|more error", text)


def check_page(path: Path, results: Any) -> None:
    """Whole, self-contained, accessible, and its numbers are those of ablation.json."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.unbalanced
    assert not page.open
    for tag, values in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href"):
            assert values.get(name, "#").startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)|@import", text)
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("table") == kinds.count("caption")
    assert all(v.get("aria-label") or v.get("aria-hidden") for tag, v in page.tags if tag == "svg")
    assert "prefers-color-scheme: dark" in text
    assert len(page.data) > 15
    for key, value, _ in page.data:
        found = results
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert float(value) == found, key


def test_changed_options_and_impossible_ones_are_refused_by_name(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "run"
    rows = ("--rows", "full")
    _claim(_experiment(None, "memory", output, None, None, TINY))
    for changed, said in (
        ("train.steps=4", "train.steps was 3, is 4"),
        ("train.rollout_steps=1", "rollout_steps was 2, is 1"),
        ("data.batch_size=3", "batch_size was 2, is 3"),
    ):
        assert main([*command(output, *rows), changed]) == 2
        assert said in capsys.readouterr().err
    assert main(command(output, *rows, name="sprites")) == 2
    assert "set was 'memory', is 'sprites'" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    for arguments, said in (
        ({"output": str(tmp_path / "other")}, "holds files that no ablation made"),
        ({"output": str(tmp_path / "other" / "letter.txt")}, "is no folder"),
        ({"rows": ["half"]}, "known are baseline"),
        ({"seeds": 0}, "at least 1"),
        ({"set": "clips"}, "needs --shards"),
        ({"shards": "somewhere"}, "go with --set clips"),
        ({"overrides": ["data.image_size=32"]}, "set it to 16"),
        ({"overrides": ["train.rollout_steps=6"]}, "can be 1 to 5"),
        ({"overrides": ["train.steps"]}, "section.key=value"),
    ):
        with pytest.raises(ConfigError, match=said):
            ablate(**{"output": str(tmp_path / "new"), **arguments})  # type: ignore[arg-type]


def test_scores_of_other_clips_are_not_put_into_one_table(tmp_path: Path) -> None:
    experiment = _experiment(None, "memory", tmp_path / "run", None, None, TINY)
    for row, targets, fewest in (("full", "a", 192), ("leaky", "a", 192), ("baseline", "b", 192), ("short", "a", 160)):
        folder = experiment.run_folder(row, 0)
        folder.mkdir(parents=True)
        values = {"tokens": 192, "fewest_tokens": fewest, "targets": targets}
        (folder / "score.json").write_text(json.dumps(values))
    assert list(_scores(experiment, ["full", "leaky"], 1)) == ["full", "leaky"]
    with pytest.raises(FramestreamError, match=r"their targets differ \(a, b\)"):
        _scores(experiment, ["full", "baseline"], 1)
    with pytest.raises(FramestreamError, match=r"their fewest_tokens differ \(160, 192\)"):
        _scores(experiment, ["full", "short"], 1)


@pytest.mark.slow
def test_clips_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "shards", num_samples=6, samples_per_shard=3, num_frames=16)
    config = tmp_path / "small.yaml"
    values = json.loads(json.dumps(SMALL))
    values["train"].update(steps=2)
    config.write_text(json.dumps(values))
    shards = str(tmp_path / "shards")
    more = ["--set", "clips", "--shards", shards, "--held-out", shards, "--output", str(tmp_path / "run")]
    assert main(["ablate", str(config), *more, "--seeds", "1", "--rows", "full"]) == 0
    assert list(json.loads((tmp_path / "run" / "ablation.json").read_text())["rows"]) == ["full"]
    assert main(["ablate", str(config), *more, "--seeds", "1"]) == 0  # rows can be added
    results = json.loads((tmp_path / "run" / "ablation.json").read_text())
    assert list(results["rows"]) == list(ROWS)
    assert results["clips"] == 6
    assert results["rows"]["full"]["runs"][0]["teacher_forced"]["frames"] == 6 * 4
    assert len(findings(results)) == 4
    assert all("one seed: no statement" in sentence for sentence in findings(results))
    for name in ("ablation.html", "ablation.md"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert results["reading"] in text
        assert "overlap" not in text
        assert "range" not in text
    assert results["tokens"] == results["fewest_tokens"] > 0
    too_many = ["--overrides", "data.sampling={kind: fast_slow, num_fast: 5, num_slow: 12}"]  # 17 newest frames of 16
    more[-1] = str(tmp_path / "short")
    capsys.readouterr()
    assert main(["ablate", str(config), *more, *too_many]) == 2
    assert "Clips are too short for baseline, frame_mask:" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()
