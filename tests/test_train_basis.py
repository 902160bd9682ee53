"""The pixel basis and the first block's start that let a small model learn motion in minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from framestream.model.evaluate import evaluate
from framestream.model.patch_basis import CosineTower
from framestream.model.towers import PixelTower
from framestream.pipeline.errors import ConfigError
from framestream.tools.config import load_config
from framestream.tools.train import build

from synthetic_shards import make_shards
from train_setup import write_config

COSINE = ["--model.tower.kind=cosine", "--model.tower.patch_size=4", "--model.embedding_dim=48"]
START = ["--model.start_with_differences=true", "--model.predictor_dim=144", "--model.num_heads=3"]


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_nothing_is_lost(patch: int) -> None:
    frames = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(patch))
    tower = CosineTower(16, patch)
    assert torch.allclose(tower.unpatchify(tower(frames)), frames, atol=1e-5)
    assert torch.allclose(tower.to_pixels(tower(frames)), PixelTower(16, patch)(frames), atol=1e-5)
    assert not tower.state_dict()  # fixed: no checkpoint carries it


def test_the_untrained_model_still_repeats_frames_and_is_measured_in_pixels(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", num_samples=3)
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", shards)
    plain = build(load_config(config, ["--model.tower.patch_size=4", "--model.embedding_dim=48"]))
    cosine = build(load_config(config, [*COSINE, *START]))
    assert plain.eval_loader is not None
    assert cosine.eval_loader is not None
    one, other = (evaluate(run.module, run.eval_loader, loss="mse") for run in (plain, cosine))  # type: ignore[arg-type]
    assert one.teacher_forced.ratio == other.teacher_forced.ratio == other.rollout[0].ratio == 1.0
    assert other.teacher_forced.copy_last == pytest.approx(one.teacher_forced.copy_last, rel=1e-4)
    assert other.rollout[1].copy_last == pytest.approx(one.rollout[1].copy_last, rel=1e-4)


def test_the_first_block_sees_differences(tmp_path: Path) -> None:
    """Where nothing moves, the channels of the difference are still; where something does, they are not."""
    shards = make_shards(tmp_path / "shards", num_samples=2)
    run = build(load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run"), [*COSINE, *START]))
    batch = dict(next(iter(run.loader)))
    heard: list[torch.Tensor] = []
    run.module.predictor.blocks[0].out_self.register_forward_hook(lambda module, given, out: heard.append(out))
    with torch.no_grad():
        run.module(batch)
        batch["video_frames"] = batch["video_frames"][:, :1].expand_as(batch["video_frames"]).contiguous()
        run.module(batch)
    moving, still = (out[..., 48:96].abs().mean() for out in heard)
    assert still < moving / 2


def test_a_model_too_narrow_for_it_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", num_samples=2)
    config = load_config(write_config(tmp_path / "c.yaml", shards, tmp_path / "run"), [*COSINE, START[0]])
    with pytest.raises(ConfigError, match=r"set model\.predictor_dim to 144"):
        build(config)
