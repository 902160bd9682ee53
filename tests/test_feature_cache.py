"""What a frozen tower made of a frame is read from disk the next time: equal numbers, bounded space, no surprises."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from framestream.model.feature_cache import FeatureCache, fingerprint
from framestream.model.towers import FrozenTower, PixelTower, TowerAdapter
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FastSlowSampling
from framestream.tools.config import load_config
from framestream.tools.train import build
from framestream.tools.train import train as train_command

from model_setup import PATCH, PATCHES, SIDE, batch_of, small_module
from synthetic_shards import make_shards
from train_setup import losses, write_config

GB = 10**9
FILE = 24 + PATCHES * 48 * 4 + 16  # bytes of a frame


def convolution(seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(3, 48, PATCH, PATCH)


def cached(folder: Path, tower: nn.Module | None = None, max_bytes: int = GB, **config: Any) -> Any:
    module = small_module(tower or convolution(), **config)
    module.feature_cache = FeatureCache(folder, max_bytes)
    return module


def test_equal_losses_with_and_without_and_each_frame_encoded_once(tmp_path: Path) -> None:
    batch = batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16, 3))
    plain = small_module(convolution())(batch)
    for hits, misses in ((0, 15), (15, 0)):  # 8..15 and 0 2 4 6 of the first clip, 0 1 2 of the second
        module = cached(tmp_path)
        module.tower.tower.grid = (4, 4)
        out = module(batch)
        torch.testing.assert_close(out.loss, plain.loss, atol=0, rtol=1e-6)
        assert (module.feature_cache.hits, module.feature_cache.misses) == (hits, misses)
        out.loss.backward()
    other = {**batch, "video_frames": batch["video_frames"].clone()}
    other["video_frames"][0, 0] += 1
    module(other)
    assert module.feature_cache.misses == 1
    torch.testing.assert_close(module(other).loss, small_module(convolution())(other).loss)
    packed = batch["video_frames"][:, :4]
    torch.testing.assert_close(module.encode(packed), small_module(convolution()).encode(packed))


def test_a_hit_tells_the_tower_its_grid(tmp_path: Path) -> None:
    batch = batch_of(mask=None, patches=35)
    batch["video_frames"] = torch.randint(0, 256, (2, 9, 3, 20, 28), dtype=torch.uint8)  # 5 x 7 patches
    turned = {**batch, "video_frames": batch["video_frames"].transpose(-1, -2).contiguous()}
    first, again = cached(tmp_path), cached(tmp_path)
    want = [first(batch).loss, first(turned).loss]
    assert again.tower.tower.grid is None
    for one, grid, loss in ((batch, (5, 7), want[0]), (turned, (7, 5), want[1]), (batch, (5, 7), want[0])):
        assert torch.equal(again(one).loss, loss)
        assert again.tower.tower.grid == grid
    assert again.feature_cache.misses == 0


class Scaled(nn.Module):
    """A tower with a number that is neither weight nor buffer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.dim, self.grid = (scale,), 48, (4, 4)
        self.layer = convolution()

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return (self.layer(frames) * self.scale[0]).flatten(2).transpose(1, 2)


def test_a_tower_that_was_changed_or_exchanged_is_another(tmp_path: Path) -> None:
    frames = batch_of()["video_frames"][0]
    cache, tower = FeatureCache(tmp_path, GB), Scaled(1.0)

    def agrees(tower: nn.Module) -> None:
        frozen = FrozenTower(tower)
        want = frozen(frames)
        for _ in range(2):
            torch.testing.assert_close(cache.encode(frozen, frames), want)

    agrees(tower)
    with torch.no_grad():
        tower.layer.weight.mul_(3)
    agrees(tower)
    tower.layer.weight.data.mul_(2)
    agrees(tower)
    tower.scale = (5.0,)
    agrees(tower)
    agrees(Scaled(2.0))
    agrees(PixelTower(SIDE, PATCH))
    agrees(tower)
    assert cache.misses == 6 * len(frames)
    prints = {fingerprint(Scaled(scale)) for scale in (1.0, 2.0)}
    tower = Scaled(1.0).eval()
    tower.grid = (2, 8)  # learnt by a call
    assert len(prints | {fingerprint(tower)}) == 2


def test_towers_and_what_they_compute_in_are_kept_apart(tmp_path: Path) -> None:
    towers = [
        PixelTower(SIDE, PATCH),
        PixelTower(SIDE, 2),
        TowerAdapter(PixelTower(SIDE, PATCH), mean=(0.5,) * 3, std=(0.5,) * 3),
        TowerAdapter(PixelTower(SIDE, PATCH), mean=(0.4,) * 3, std=(0.5,) * 3),
        convolution(),
        convolution(1),
        convolution().half(),
    ]
    assert len({fingerprint(tower) for tower in towers}) == len(towers)
    assert fingerprint(convolution()) == fingerprint(convolution())
    module, frames = cached(tmp_path), batch_of()["video_frames"]
    exact = module.encode(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = module.encode(frames)
        assert torch.equal(module.encode(frames), coarse)
    assert not torch.equal(coarse, exact)
    assert torch.equal(module.encode(frames), exact)
    assert {path.name.split("-")[1] for path in tmp_path.iterdir()} == {"float32", "bfloat16"}


def test_the_limit_holds_and_what_does_not_fit_is_encoded(tmp_path: Path) -> None:
    frames = batch_of()["video_frames"][:1]  # 9 frames
    module = cached(tmp_path, max_bytes=5 * FILE + 10)
    module.tower.tower.grid = (4, 4)
    want = module.encode(frames)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) == 5 * FILE
    torch.testing.assert_close(module.encode(frames), want, atol=1e-6, rtol=1e-6)
    assert (module.feature_cache.hits, module.feature_cache.misses) == (5, 9 + 4)
    later = cached(tmp_path, max_bytes=6 * FILE + 10)  # what is there counts
    later.encode(frames)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 6
    shared = FeatureCache(tmp_path, 10 * FILE, processes=2)
    assert shared._space == 2 * FILE
    with pytest.raises(ConfigError, match=r"feature cache .* cannot be made"):
        FeatureCache(files[0], GB)


def test_several_runs_share_one_limit(tmp_path: Path) -> None:
    frames, limit = torch.randint(0, 256, (45, 3, SIDE, SIDE), dtype=torch.uint8), 20 * FILE + 10
    tower = FrozenTower(PixelTower(SIDE, PATCH))
    for part, cache in enumerate([FeatureCache(tmp_path, limit) for _ in range(3)]):
        cache.encode(tower, frames[part::3])
    assert 20 <= sum(path.is_file() for path in tmp_path.rglob("*")) <= 22  # a twentieth too much for each other run


def test_what_killed_processes_left_is_swept_up(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (f".{'0a' * 20}.emb.9-x.tmp", f".{'0b' * 20}.emb.9-x.tmp", "a.tmp"))
    for path in (old, new, other):
        path.write_bytes(bytes(100))
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    assert FeatureCache(tmp_path, 1000)._space == 800
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)  # another's stay


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "pickle", "npz", "npy", "zeros", "bit", "dims"])
def test_damaged_files_are_encoded_anew(tmp_path: Path, damage: str) -> None:
    frames = batch_of()["video_frames"][:1, :1]
    module = cached(tmp_path, PixelTower(SIDE, PATCH))
    want = module.encode(frames)
    (file,) = (path for path in tmp_path.rglob("*.emb"))
    whole = file.read_bytes()
    if damage in ("pickle", "npz", "npy"):
        with open(file, "wb") as out:
            if damage == "npz":
                np.savez(out, a=np.zeros(3))
            else:
                np.save(out, np.array([{}], dtype=object) if damage == "pickle" else want[0, 0].numpy())
    elif damage == "bit":
        place = random.Random(0).randrange(24, len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        turned = whole[:8] + whole[12:16] + whole[8:12] + whole[16:]  # [D, P], of the same size
        file.write_bytes(
            {"cut": whole[:200], "empty": b"", "longer": whole + b"\0", "dims": turned}.get(
                damage, whole[:24] + bytes(len(whole) - 24)
            )
        )
    again = cached(tmp_path, PixelTower(SIDE, PATCH))
    assert torch.equal(again.encode(frames), want)
    assert again.feature_cache.misses == 1
    assert torch.equal(again.encode(frames), want)
    assert again.feature_cache.misses == 1


def test_training_with_the_cache_gives_the_same_losses(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", num_samples=5)
    still = ["--data.augment", "false"]
    made = {}
    for name, options in {
        "plain": [],
        "cold": ["--train.feature_cache", str(tmp_path / "cache")],
        "warm": ["--train.feature_cache", str(tmp_path / "cache")],
    }.items():
        config = write_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, shards, steps=4)
        assert train_command(load_config(config, [*still, *options])) == 0
        made[name] = (losses(tmp_path / name), (tmp_path / name / "evaluation.json").read_text().split('"seconds"')[0])
    assert made["plain"] == made["cold"] == made["warm"]
    run = build(load_config(tmp_path / "warm" / "config.yaml"))
    assert run.eval_loader is not None
    assert run.module.feature_cache is not None
    run.module(next(iter(run.eval_loader)))
    assert run.module.feature_cache.hits > 0 == run.module.feature_cache.misses


@pytest.mark.parametrize("option", ["--data.augment=true", "--data.crop=random"])
def test_clips_that_never_come_back_unchanged_are_refused(tmp_path: Path, option: str) -> None:
    shards = make_shards(tmp_path / "shards", num_samples=2)
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run", feature_cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="feature_cache keeps frames that come back"):
        build(load_config(config, ["--data.augment=false", option]))
    with pytest.raises(ConfigError, match=r"train\.feature_cache_gb must be"):
        load_config(config, ["--train.feature_cache_gb=0"])
    with pytest.raises(ConfigError, match=r"train\.feature_cache must be a folder, or null"):
        load_config(config, ["--train.feature_cache", ""])
