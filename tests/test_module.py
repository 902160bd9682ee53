"""The reconstruction module: its loss by hand, its settings, what it refuses, and where it runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from framestream.model.autoregressive_reconstruction import (
    AutoregressiveReconstruction,
    ReconstructionConfig,
    create_autoregressive_reconstruction_module,
)
from framestream.model.checkpoint import MODEL_FILE
from framestream.model.geometry import Grid, PatchPlaces
from framestream.model.patch_basis import CosineTower
from framestream.model.pooling import Pool
from framestream.model.towers import PixelTower, TowerAdapter
from framestream.pipeline.errors import ConfigError, StateError
from framestream.pipeline.layout import next_frame_targets
from framestream.pipeline.masks import FrameMask, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from model_setup import HIDDEN, PATCH, PATCHES, SIDE, SMALL, batch_of, dense_batch, small_module
from square_tensors import SquareTensors


class CountingTower(nn.Module):
    """Remembers the frames it was asked to encode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PixelTower(SIDE, PATCH)
        self.dim, self.grid = self.inner.dim, self.inner.grid
        self.asked: list[int] = []

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(frames))
        return self.inner(frames)


# -- the loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("mse", lambda a, b: (a - b).square().mean()),
        ("l1", lambda a, b: (a - b).abs().mean()),
        ("smooth_l1", nn.functional.smooth_l1_loss),
        ("cosine", lambda a, b: 1 - nn.functional.cosine_similarity(a, b, dim=-1).mean()),
    ],
)
@pytest.mark.parametrize("target_norm", [False, True])
def test_loss_and_errors_by_hand(loss: str, by_hand: Any, target_norm: bool) -> None:
    module = small_module(loss=loss, target_norm=target_norm, loss_weight=0.25)
    batch = batch_of()
    out = module(batch)
    clips = module.prepare(batch)
    frames = module.encode(batch["video_frames"])
    if target_norm:
        frames = (frames - frames.mean(-1, keepdim=True)) / (frames.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    errors = []
    for b, layout in enumerate(clips.layouts):
        for query, target in enumerate(next_frame_targets(layout)):
            got, copied = out.frame_error[b, query], out.copy_last_error[b, query]
            if target < 0:
                assert got.isnan()
                assert copied.isnan()
                continue
            errors.append(by_hand(out.predictions[b, query], frames[b, target]))
            torch.testing.assert_close(got, errors[-1])
            torch.testing.assert_close(copied, by_hand(frames[b, query], frames[b, target]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, 0.25 * torch.stack(errors).mean())
    assert out.targets == len(errors)


def test_the_untrained_module_has_the_error_of_copy_last() -> None:
    out = small_module(trained=False)(batch_of())
    torch.testing.assert_close(out.frame_error, out.copy_last_error, equal_nan=True)


def test_training_beats_copy_last_on_a_moving_picture() -> None:
    """A pattern that moves one patch per frame: the next frame is in the last, one patch aside."""
    torch.manual_seed(0)
    strip = torch.randint(0, 256, (8, 3, SIDE, SIDE + PATCH * 8), dtype=torch.uint8)
    video = torch.stack([strip[..., t * PATCH : t * PATCH + SIDE] for t in range(6)], dim=1)
    batch = {**dense_batch(6, 8), "video_frames": video}
    module = small_module(trained=False, predictor_dim=64, loss_weight=1.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        module(batch).loss.backward()
        optimizer.step()
    out = module(batch)
    assert out.frame_error.nansum() < 0.6 * out.copy_last_error.nansum()


def test_gradients_reach_predictor_and_hidden_states_and_not_the_tower() -> None:
    tower = nn.Conv2d(3, 48, PATCH, PATCH)
    module = small_module(tower)
    hidden = torch.randn(2, 7, HIDDEN, requires_grad=True)
    loss = module.compute_autoregressive_loss(hidden_states=hidden, video_frames=torch.randn(2, 6, 3, SIDE, SIDE))
    assert loss.shape == ()
    loss.backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().sum(-1) > 0).all()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert tower.weight.grad is None
    assert not tower.weight.requires_grad


def test_unused_parameters() -> None:
    """With and without host states, with nothing to predict, with pooling and rollout: all are in the graph."""
    short = batch_of(DenseSampling(4), (1, 1))
    for config, batch, states in [
        ({}, batch_of(), None),
        ({}, batch_of(), torch.zeros(2, 3, HIDDEN)),
        ({}, short, None),
        ({"rollout_steps": 2}, batch_of(), None),
        ({"rollout_steps": 2}, short, None),
        ({"slow_pool": 2}, batch_of(patches=(4, PATCHES)), None),
        ({"gradient_checkpointing": True}, batch_of(), None),
    ]:
        module = small_module(**config)  # type: ignore[arg-type]
        module(batch, states).loss.backward()
        assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_without_slow_targets_slow_frames_are_seen_and_not_scored() -> None:
    module, batch = small_module(slow_targets=False), batch_of()
    both = small_module()(batch)
    only = module(batch)
    fast = batch["frame_stream"] == 1
    assert only.frame_error[~fast].isnan().all()
    torch.testing.assert_close(only.frame_error[fast], both.frame_error[fast], equal_nan=True)
    assert 0 < only.targets < both.targets
    scored = only.frame_error[only.frame_error.isfinite()]
    torch.testing.assert_close(only.loss, scored.mean() * module.config.loss_weight)
    changed = {**batch, "video_frames": batch["video_frames"].clone()}
    changed["video_frames"][:, 0] += 1  # the first slow frame is before every fast one
    assert (module(changed).frame_error != only.frame_error)[fast & only.frame_error.isfinite()].any()


def test_nothing_to_predict_gives_an_attached_zero_and_is_counted() -> None:
    module = small_module()
    out = module(batch_of(DenseSampling(4), (1, 1)))
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert out.targets == 0
    assert out.frame_error.isnan().all()
    assert module.batches_without_target == 1
    module(batch_of())
    assert module.batches_without_target == 1
    with pytest.warns(UserWarning, match=r"targets"):
        assert module(dense_batch(mask="full")).loss.item() == 0
    assert module.batches_without_target == 2
    single = small_module(use_fast_slow_frames=True).compute_autoregressive_loss(None, torch.rand(1, 1, 3, SIDE, SIDE))
    single.backward()
    assert single.item() == 0


# -- plain tensors ---------------------------------------------------------------------------------------


def test_plain_tensors_are_sampled_by_the_settings_and_a_batch_is_not() -> None:
    video = torch.randint(0, 256, (2, 24, 3, SIDE, SIDE), dtype=torch.uint8)
    sampling = {"num_fast": 5, "num_slow": 4, "slow_stride": 5, "fast_stride": 2}
    module = small_module(use_fast_slow_frames=True, **sampling)
    plan = FastSlowSampling(**sampling, slow_coverage="stride").plan(24)
    index = torch.from_numpy(plan.frame_index)
    batch = {
        "video_frames": video[:, index],
        "frame_index": index.expand(2, -1),
        "frame_time": (index / 30).float().expand(2, -1),
        "frame_stream": torch.from_numpy(plan.stream).expand(2, -1),
        "frame_valid": torch.from_numpy(plan.valid).expand(2, -1),
    }
    torch.testing.assert_close(module.compute_autoregressive_loss(None, video), module(batch).loss)
    every = small_module().compute_autoregressive_loss(None, video)
    torch.testing.assert_close(
        every, small_module()({**dense_batch(24, mask="frame_causal"), "video_frames": video}).loss
    )


def test_times_of_plain_tensors() -> None:
    module = small_module()
    video, hidden = torch.rand(2, 6, 3, SIDE, SIDE), torch.randn(2, 2, HIDDEN)
    when = torch.tensor([[0.0, 0.25]] * 2)
    regular = module.compute_autoregressive_loss(hidden, video, hidden_time=when, fps=10)
    given = module.compute_autoregressive_loss(hidden, video, hidden_time=when, frame_time=torch.arange(6) / 10)
    torch.testing.assert_close(regular, given)
    other = module.compute_autoregressive_loss(hidden, video, hidden_time=when, fps=30)
    assert abs(other - regular) > 1e-7
    with pytest.raises(ConfigError, match=r"frame_time must be \[6\] or \[2, 6\]"):
        module.compute_autoregressive_loss(hidden, video, frame_time=torch.zeros(5))
    with pytest.raises(ConfigError, match=r"fps must be positive"):
        module.compute_autoregressive_loss(hidden, video, fps=0)


def test_uint8_is_scaled_to_one_and_floats_are_left_alone() -> None:
    module = small_module()
    frames = torch.randint(0, 256, (1, 2, 3, SIDE, SIDE), dtype=torch.uint8)
    torch.testing.assert_close(module.encode(frames), module.encode(frames.float() / 255))
    torch.testing.assert_close(module.encode(frames.float()) + 2, (module.encode(frames) + 2) * 255)


def test_a_frame_wanted_by_both_streams_is_encoded_once() -> None:
    tower = CountingTower()
    batch = batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16, 3))
    out = small_module(tower)(batch)
    assert tower.asked == [8 + 4 + 3]  # 8..15 and 0 2 4 6 of the first clip, 0 1 2 of the second
    assert torch.equal(out.predictions, small_module()(batch).predictions)
    same = {**batch, "frame_index": torch.arange(32).view(2, 16)}
    del same["frame_mask"]
    small_module(tower)(same)
    assert tower.asked[-1] == 16 + 6  # of the second clip, what is not padding


# -- streams with fewer patches --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["concat", "interleave", "time"])
@pytest.mark.parametrize(
    ("config", "patches"),
    [({"slow_pool": 2}, (4, 16)), ({"fast_pool": "max:2"}, (16, 4)), ({"slow_pool": "bilinear:4"}, (1, 16)),
     ({"slow_pool": 2, "fast_pool": 2}, (4, 4)), ({"slow_pool": "average:2", "fast_pool": "max:2"}, (4, 4))],
)  # fmt: skip
def test_pooling_per_stream(order: str, config: dict[str, Any], patches: tuple[int, int]) -> None:
    sampling = FastSlowSampling(num_fast=5, num_slow=4, order=order)  # type: ignore[arg-type]
    batch = batch_of(sampling, (24, 7), patches=patches)
    module = small_module(trained=False, **config)
    out = module(batch)
    frames = module.encode(batch["video_frames"])
    clips = module.prepare(batch)
    for b, layout in enumerate(clips.layouts):
        assert layout.patches == tuple(patches[s] for s in layout.stream)
        for query, target in enumerate(next_frame_targets(layout)):
            if target < 0:
                continue
            pool = Pool.parse(config.get("fast_pool" if layout.stream[query] else "slow_pool"))
            small = pool(frames[b], (4, 4))
            want = (small[target] - small[query]).square().mean()
            torch.testing.assert_close(out.frame_error[b, query], want)
            torch.testing.assert_close(out.predictions[b, query, : small.shape[1]], small[query])
            assert not out.predictions[b, query, small.shape[1] :].any()


def test_pools_by_hand_and_refused() -> None:
    frame = torch.arange(16.0).view(1, 16, 1)
    assert Pool.parse(2)(frame, (4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Pool.parse("max:2")(frame, (4, 4)).flatten().tolist() == [5, 7, 13, 15]
    assert Pool.parse("bilinear:4")(frame, (4, 4)).flatten().tolist() == [7.5]
    for bad in (0, -1, 1.5, True, "sum:2", "max", "max:0", "2:max"):
        with pytest.raises(ConfigError, match=r"slow_pool must be"):
            ReconstructionConfig(slow_pool=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["average", "max", "bilinear"])
@pytest.mark.parametrize(("grid", "factor"), [((27, 27), 2), ((5, 7), 2), ((7, 4), 3), ((2, 3), 5), ((4, 6), 2)])
def test_pools_of_grids_that_the_factor_does_not_divide(kind: str, grid: Grid, factor: int) -> None:
    """Patches hold their own row and column, so that what is pooled says where it stands."""
    pool = Pool(kind, factor)
    at = PatchPlaces.even(grid)
    row, column = torch.meshgrid(torch.tensor(at.rows), torch.tensor(at.columns), indexing="ij")
    patches = torch.stack([row, column], -1).reshape(1, -1, 2)
    size = tuple(math.ceil(n / factor) for n in grid)
    assert pool.grid(grid) == size
    got = pool(patches, grid).reshape(*size, 2)
    places = pool.places(grid)
    assert (len(places.rows), len(places.columns)) == size
    pick = torch.amax if kind == "max" else torch.mean
    for i in range(size[0]):
        for j in range(size[1]):
            window = patches.reshape(*grid, 2)[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
            if kind != "bilinear":
                torch.testing.assert_close(got[i, j], pick(window, dim=(0, 1)))
            if kind == "max":
                continue
            # Bilinear cannot look beyond the outermost centres.
            where = [
                min(max(place, centres[0]), centres[-1])
                for place, centres in ((places.rows[i], at.rows), (places.columns[j], at.columns))
            ]
            torch.testing.assert_close(got[i, j], torch.tensor(where))


def test_streams_of_a_frame_that_is_not_square_and_not_divided() -> None:
    torch.manual_seed(0)
    module = small_module(nn.Conv2d(3, 48, PATCH, PATCH), slow_pool=2, fast_pool="bilinear:3")
    batch = batch_of(mask=None)
    batch["video_frames"] = torch.randint(0, 256, (2, 9, 3, 20, 28), dtype=torch.uint8)  # 5 x 7 patches
    clips = module.prepare(batch)
    assert {(s, p) for layout in clips.layouts for s, p in zip(layout.stream, layout.patches, strict=True)} == {
        (0, 12),
        (1, 6),
    }
    geometry = clips.geometry()
    rows = {n: geometry.row[0][geometry.stream[0][geometry.frame[0]] == n].unique().tolist() for n in (0, 1)}
    assert rows[0] == pytest.approx([16 / 5 * centre for centre in (1, 3, 4.5)])
    assert rows[1] == pytest.approx([4, 12])
    columns = geometry.column[0][geometry.frame[0] == 0].reshape(3, 4)[0].tolist()
    assert columns == pytest.approx([16 / 7 * centre for centre in (1, 3, 5, 6.5)])
    out = module(batch)
    out.loss.backward()
    assert out.targets == clips.num_scored > 0
    assert torch.isfinite(out.loss)
    assert module.rollout(batch, 2).frame_error.isfinite().all()


def test_equally_many_patches_at_different_places_are_refused() -> None:
    module = small_module(slow_pool="bilinear:3", fast_pool="average:3")
    with pytest.raises(ConfigError, match=r"leave 4 patches each of a grid of 4 x 4, at different places"):
        module(batch_of(mask=None))


# -- masks and settings ----------------------------------------------------------------------------------


def test_default_masks_show_no_future() -> None:
    for sampling, rule in (
        (FastSlowSampling(num_fast=5, num_slow=4), "time_causal"),
        (DenseSampling(6), "frame_causal"),
    ):
        batch = batch_of(sampling, mask=None)
        clips = small_module().prepare(batch)
        assert clips.mask == FrameMask.stack([make_mask(rule, layout) for layout in clips.layouts])
        assert clips.leaking == 0


def test_the_batchs_mask_wins_and_a_contradiction_is_an_error() -> None:
    batch = dense_batch(6, mask="sliding_window", window_size=2)
    assert small_module().prepare(batch).mask == batch["frame_mask"]
    assert small_module(mask="sliding_window", window_size=2).prepare(batch).mask == batch["frame_mask"]
    for config in ({"mask": "time_causal"}, {"mask": "sliding_window"}, {"use_frame_causal_mask": False}):
        with pytest.raises(ConfigError, match=r"contradict the batch's frame_mask"):
            small_module(**config)(batch)
    with pytest.raises(ConfigError, match=r"for 4 patches per frame, .*give 16"):
        small_module()(dense_batch(6, patches=4))
    with pytest.raises(ConfigError, match=r"2 clips and its frame_mask 3"):
        small_module()({**batch, "frame_mask": FrameMask.stack([batch["frame_mask"][0]] * 3)})
    one = {**batch, "frame_mask": batch["frame_mask"][0]}  # without a batch axis it is everybody's
    assert torch.equal(small_module()(one).predictions, small_module()(batch).predictions)


def test_num_hist_limits_the_history_of_each_stream() -> None:
    clips = small_module(num_hist=2).prepare(batch_of(FastSlowSampling(num_fast=4, num_slow=3), (12,)))
    # slow 0 4 8, fast 8 9 10 11
    want = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 1],
    ]
    assert clips.mask[0].matrix().int().tolist() == want


def test_token_order_baseline_differs_from_the_frame_mask() -> None:
    batch = dense_batch(6, mask="frame_causal")
    tokens = small_module(use_frame_causal_mask=False)
    assert not torch.equal(tokens(batch).predictions, small_module()(batch).predictions)
    assert tokens(batch).targets == 10
    dense = small_module(use_frame_causal_mask=False, attention_backend="dense")
    torch.testing.assert_close(tokens(batch).predictions, dense(batch).predictions, atol=1e-5, rtol=1e-5)


def test_backends_give_the_same_loss_and_gradients() -> None:
    batch, grads = batch_of(lengths=(24, 7)), []
    for backend in ("ranges", "dense", "auto"):
        module = small_module(attention_backend=backend)
        module(batch).loss.backward()
        grads.append([p.grad for p in module.parameters()])
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        assert torch.equal(a, c)


def test_config_from_mapping_yaml_and_object(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("embedding_dim: 48\nloss: l1\nslow_pool: max:2\n")
    want = ReconstructionConfig(embedding_dim=48, loss="l1", slow_pool="max:2")
    assert ReconstructionConfig.make(path) == ReconstructionConfig.make(str(path)) == want
    assert ReconstructionConfig.make({"embedding_dim": 48, "loss": "l1", "slow_pool": "max:2"}) == want
    assert ReconstructionConfig.make(want) is want
    assert ReconstructionConfig.make(None) == ReconstructionConfig()
    with pytest.raises(ConfigError, match=r"unknown keys windows, fast in .*known are embedding_dim, loss_weight"):
        ReconstructionConfig.make({"windows": 3, "fast": 1, "num_fast": 2})
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"got list"):
        ReconstructionConfig.make(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"model.yaml is no YAML"):
        ReconstructionConfig.make(path)
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.yaml"):
        ReconstructionConfig.make(tmp_path / "nowhere.yaml")


def test_defaults_are_the_known_keys_values() -> None:
    config = ReconstructionConfig()
    assert (config.embedding_dim, config.loss_weight, config.num_heads, config.num_layers) == (1152, 0.1, 8, 3)
    assert (config.use_frame_causal_mask, config.use_fast_slow_frames) == (True, False)
    assert (config.fast_stride, config.slow_stride, config.num_fast, config.num_slow) == (1, 4, 8, 8)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_layers": 0}, {"num_heads": 2.0}, {"num_fast": True}, {"loss_weight": -1}, {"loss_weight": math.nan},
        {"loss_weight": "a"}, {"loss": "l2"}, {"on_leak": "ignore"}, {"mask": "causal"}, {"window_size": 3},
        {"mask": "time_causal", "window_size": 3}, {"mask": "sliding_window", "window_size": 0}, {"num_hist": 0},
        {"rollout_steps": -1}, {"attention_backend": "fast"}, {"slow_coverage": "all"}, {"target_norm": 1},
        {"slow_targets": 1},
        {"use_frame_causal_mask": False, "mask": "full"}, {"use_frame_causal_mask": False, "num_hist": 2},
        {"use_frame_causal_mask": False, "attention_backend": "flex"}, {"predictor_dim": 0},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join(bad)):
        ReconstructionConfig(**bad)


def test_embedding_dim_must_be_the_towers() -> None:
    with pytest.raises(ConfigError, match=r"embedding_dim is 1152, .*have 48 channels: set embedding_dim: 48"):
        create_autoregressive_reconstruction_module(PixelTower(SIDE, PATCH), HIDDEN, {})
    late = small_module(nn.Conv2d(3, 24, PATCH, PATCH))  # a tower that tells only with its first output
    with pytest.raises(ConfigError, match=r"have 24 channels"):
        late(batch_of())


def test_a_batch_with_missing_or_misshapen_keys_is_refused_by_name() -> None:
    batch = batch_of()
    for key in ("frame_index", "frame_time", "frame_stream", "frame_valid"):
        with pytest.raises(ConfigError, match=rf"{key} must be a tensor of \[2, 9\].*NoneType"):
            small_module()({k: v for k, v in batch.items() if k != key})
        with pytest.raises(ConfigError, match=rf"{key} must be .*\[2, 8\]"):
            small_module()({**batch, key: batch[key][:, 1:]})


# -- saved and opened again ------------------------------------------------------------------------------


def test_a_saved_module_is_the_same_one_around_its_tower(tmp_path: Path) -> None:
    tower = nn.Conv2d(3, 48, PATCH, PATCH)
    module = small_module(tower, slow_pool="max:2", rollout_steps=2, mask="time_causal")
    module.save_pretrained(tmp_path / "a" / "b")
    files = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert files == {"config.json", MODEL_FILE}
    again = AutoregressiveReconstruction.from_pretrained(tmp_path / "a" / "b", tower)
    assert (again.config, again.hidden_size, again.training) == (module.config, HIDDEN, False)
    batch = batch_of(patches=(4, 16))
    assert torch.equal(again(batch).loss, module.eval()(batch).loss)
    assert (
        len((tmp_path / "a" / "b" / MODEL_FILE).read_bytes())
        < 1.1 * 4 * sum(p.numel() for p in module.parameters()) + 1e4
    )  # no tower


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"window": 3}, ConfigError, r"config\.json: unknown key window .*known are"),
        ({"num_layers": 0}, ConfigError, r"config\.json: num_layers must be"),
        ({"num_layers": 1}, StateError, "do not fit"),
        ({"hidden_size": "12"}, ConfigError, "hidden_size .* must be a whole number"),
        ({"version": 2}, StateError, "not of format version 1"),
        ({"weights_sha256": None}, StateError, r"model\.safetensors .* does not fit the weights_sha256 of its config"),
    ],
    ids=str,
)
def test_a_saved_module_that_was_changed_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    small_module().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(error, match=said):
        AutoregressiveReconstruction.from_pretrained(tmp_path, PixelTower(SIDE, PATCH))


def test_what_is_no_saved_module_is_refused(tmp_path: Path) -> None:
    tower = PixelTower(SIDE, PATCH)
    with pytest.raises(StateError, match=r"give a folder that save_pretrained wrote"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, tower)
    small_module().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="embedding_dim is 48"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, PixelTower(SIDE, 2))
    torch.save({"predictor": os.getcwd}, tmp_path / MODEL_FILE)  # a pickle under that name is no safetensors file
    config = json.loads((tmp_path / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((tmp_path / MODEL_FILE).read_bytes()).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StateError, match="do not fit"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, tower)
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(StateError, match="cannot be read"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, tower)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(StateError, match="nested too deeply"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, tower)
    with pytest.raises(ConfigError, match="mask is a function"):
        small_module(mask=lambda layout: make_mask("full", layout)).save_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        small_module().save_pretrained(tmp_path / "file")


def test_a_saved_module_is_opened_around_its_own_tower_only(tmp_path: Path) -> None:
    small_module(CosineTower(SIDE, PATCH)).save_pretrained(tmp_path)
    AutoregressiveReconstruction.from_pretrained(tmp_path, CosineTower(SIDE, PATCH))
    with pytest.raises(StateError, match=r"config\.json: the module was trained on another tower than this PixelTower"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, PixelTower(SIDE, PATCH))  # 48 channels as well
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text())
    del settings["tower"]  # as it was written before
    config.write_text(json.dumps(settings))
    AutoregressiveReconstruction.from_pretrained(tmp_path, PixelTower(SIDE, PATCH))

    tower, other = (TowerAdapter(nn.Conv2d(3, 48, PATCH, PATCH)) for _ in range(2))
    small_module(tower).save_pretrained(tmp_path)
    with pytest.raises(StateError, match="another tower"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, other)
    other.load_state_dict(tower.state_dict())
    AutoregressiveReconstruction.from_pretrained(tmp_path, other)
    with pytest.raises(StateError, match="another tower"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, TowerAdapter(other.tower, mean=[0.5] * 3, std=[0.5] * 3))


def test_a_tower_from_another_folder_is_the_same_one(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH))
    small_module(made).save_pretrained(tmp_path / "module")
    for name in ("here", "there"):
        made.save_pretrained(tmp_path / name)
        tower = SiglipVisionModel.from_pretrained(tmp_path / name)
        AutoregressiveReconstruction.from_pretrained(tmp_path / "module", tower)
    next(tower.parameters()).data += 1
    with pytest.raises(StateError, match="another tower than this SiglipVisionModel"):
        AutoregressiveReconstruction.from_pretrained(tmp_path / "module", tower)


def test_weights_of_a_save_that_was_killed_are_not_opened_under_the_old_settings(tmp_path: Path) -> None:
    small_module(mask="sliding_window", window_size=2).save_pretrained(tmp_path)
    old = (tmp_path / "config.json").read_bytes()
    small_module(mask="frame_causal", trained=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(old)  # the second of its two files was not written
    with pytest.raises(StateError, match="a save was killed between the two"):
        AutoregressiveReconstruction.from_pretrained(tmp_path, PixelTower(SIDE, PATCH))


# -- where it runs ---------------------------------------------------------------------------------------


def test_frozen_tower_is_out_of_state_dict_and_parameters_and_in_eval_mode() -> None:
    tower = nn.Sequential(nn.Conv2d(3, 48, PATCH, PATCH), nn.Dropout(0.5))
    module = small_module(tower).train()
    assert all(name.startswith("predictor.") for name in module.state_dict())
    assert all(name.startswith("predictor.") for name, _ in module.named_parameters())
    frames = torch.rand(1, 2, 3, SIDE, SIDE)
    assert torch.equal(module.encode(frames), module.encode(frames))  # no dropout
    other = small_module(tower, trained=False)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(batch_of()).loss, module(batch_of()).loss)
    module.to(torch.float64)
    assert tower[0].weight.dtype == torch.float64


def test_bf16_autocast_trains_and_agrees() -> None:
    module, batch = small_module(), batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(batch)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    torch.testing.assert_close(out.loss, module(batch).loss, atol=0, rtol=0.03)


@pytest.mark.parametrize("states", [False, True])
def test_no_square_over_tokens_on_the_training_path(states: bool) -> None:
    sampling = FastSlowSampling(num_fast=5, num_slow=4, order="interleave")
    batch = batch_of(sampling, (24,), mask=None)
    tokens = 9 * PATCHES
    assert tokens > 4 * SMALL["predictor_dim"]  # so that no weight counts as a square
    module = small_module()
    args = (torch.zeros(1, tokens, HIDDEN), torch.zeros(1, tokens)) if states else ()
    with SquareTensors(tokens) as squares:
        if states:  # hidden states hidden frame by frame need no [N, S] mask either
            module(batch, *args).loss.backward()
        else:
            module(batch).loss.backward()
            module.rollout(batch, 2)
    assert squares.seen == []


def test_two_processes_of_ddp_without_find_unused_parameters(tmp_path: Path) -> None:
    """Real torchrun, gloo: one rank has nothing to predict, and both end with the gradients of the mean."""
    script = Path(__file__).parent / "ddp_worker.py"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, f"--master-port={port}", str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    module = small_module()
    module(batch_of()).loss.backward()
    for name, p in module.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], p.grad / 2, atol=1e-7, rtol=1e-4)


def test_module_is_deep_copied_and_pickled(tmp_path: Path) -> None:
    import copy

    module = small_module()
    twin = copy.deepcopy(module)
    assert isinstance(twin, AutoregressiveReconstruction)
    assert torch.equal(twin(batch_of()).loss, module(batch_of()).loss)


@pytest.mark.slow
def test_fsdp2_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain, batch = small_module(), batch_of()
    plain(batch, torch.ones(2, 3, HIDDEN)).loss.backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = small_module()
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*sharded.predictor.blocks, sharded.predictor):  # the predictor is the unit: rollout calls it too
            fully_shard(part, mesh=mesh)
        for _ in range(2):
            sharded.zero_grad()
            sharded(batch, torch.ones(2, 3, HIDDEN)).loss.backward()
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad)
        sharded.eval().rollout(batch, 2)
    finally:
        dist.destroy_process_group()


def test_what_stands_in_padding_reaches_nothing() -> None:
    batch = batch_of(FastSlowSampling(num_fast=5, num_slow=4), (24, 3))
    frames = batch["video_frames"].float() / 255
    wild = frames.masked_fill(~batch["frame_valid"][:, :, None, None, None], torch.nan)
    calm, odd = small_module(), small_module()
    first, second = calm({**batch, "video_frames": frames}), odd({**batch, "video_frames": wild})
    assert torch.equal(first.predictions, second.predictions)
    first.loss.backward()
    second.loss.backward()
    for one, other in zip(calm.parameters(), odd.parameters(), strict=True):
        assert one.grad is not None
        assert torch.isfinite(one.grad).all()
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    alone = batch_of(FastSlowSampling(num_fast=5, num_slow=4), (3,))
    alone["frame_valid"] = torch.zeros_like(alone["frame_valid"])
    del alone["frame_mask"]
    assert small_module()(alone).loss == 0


def test_a_rollout_loss_of_clips_too_short_for_it_is_nothing() -> None:
    video = torch.rand(2, 3, 3, 16, 16)
    with_rollout, plain = small_module(rollout_steps=4), small_module()
    loss = with_rollout.compute_autoregressive_loss(None, video)
    torch.testing.assert_close(loss, plain.compute_autoregressive_loss(None, video))
    loss.backward()
    assert all(p.grad is not None for p in with_rollout.parameters())
