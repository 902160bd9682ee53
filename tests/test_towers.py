"""Towers: many kinds of vision model, one output; frozen means frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from framestream.model.towers import FrozenTower, PixelTower, TowerAdapter, as_tower
from framestream.pipeline.errors import ConfigError

from model_setup import batch_of, small_module


class Fake(nn.Module):
    """A vision model with one weight whose output is what the test wants."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.scale = nn.Linear(3, 8)
        self.dropout = nn.Dropout(0.5)
        self.make = make

    def forward(self, frames: torch.Tensor) -> Any:
        return self.make(self.dropout(self.scale(frames.flatten(2).transpose(1, 2))))  # [n, pixels, 8]


FRAMES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_pixel_tower_patches_row_by_row_and_back() -> None:
    tower = PixelTower(8, 4)
    frames = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    patches = tower(frames)
    assert patches.shape == (2, 4, 48)
    assert torch.equal(
        patches[1, 1].view(3, 4, 4), (frames[1, :, :4, 4:] - 0.5) * 4
    )  # second patch: first row, second column
    assert torch.equal(tower.unpatchify(patches), frames)
    assert tower.unpatchify(torch.zeros(2, 3, 1, 48)).shape == (2, 3, 3, 4, 4)  # pooled to one patch
    assert list(tower.parameters()) == []
    with pytest.raises(ConfigError, match=r"\[3, 8, 8\], got \[3, 16, 16\]"):
        tower(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"not a multiple"):
        PixelTower(30, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: x.transpose(1, 2).unflatten(2, (4, 4)),
        lambda x: type("Output", (), {"last_hidden_state": x})(),
    ],
    ids=["tokens", "tuple", "list", "grid", "model_output"],
)
def test_adapter_understands_the_usual_outputs(make: Any) -> None:
    model = Fake(make).eval()
    want = Fake(lambda x: x).eval()
    want.load_state_dict(model.state_dict())
    tower = TowerAdapter(model)
    assert torch.equal(tower(FRAMES), want(FRAMES))
    assert (tower.grid == (4, 4)) == (make(torch.zeros(1, 16, 8)).__class__ is torch.Tensor and tower.grid is not None)


def test_cls_is_stripped_by_rule_never_by_guess() -> None:
    with_cls = Fake(lambda x: torch.cat([x.mean(1, keepdim=True), x], 1)).eval()
    with pytest.raises(ConfigError, match=r"17 tokens.*strip_cls=1"):
        TowerAdapter(with_cls)(FRAMES)
    assert torch.equal(TowerAdapter(with_cls, strip_cls=True)(FRAMES), with_cls(FRAMES)[:, 1:])
    assert torch.equal(TowerAdapter(with_cls, strip_cls=False)(FRAMES), with_cls(FRAMES))
    with_cls.patch_size = 1  # type: ignore[assignment]
    assert torch.equal(TowerAdapter(with_cls)(FRAMES), with_cls(FRAMES)[:, 1:])
    with pytest.raises(ConfigError, match=r"leaves no patch"):
        TowerAdapter(with_cls, strip_cls=17)(FRAMES)


def test_outputs_that_are_no_patches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Fake gives \[5, 8\].*before pooling"):
        TowerAdapter(Fake(lambda x: x.mean(1)))(FRAMES)
    with pytest.raises(ConfigError, match=r"returned dict"):
        TowerAdapter(Fake(lambda x: {"x": x}))(FRAMES)
    with pytest.raises(ConfigError, match=r"torch module, got function"):
        as_tower(lambda x: x)  # type: ignore[arg-type]


def test_mean_and_std_are_applied_to_frames_of_0_to_1() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            seen.append(frames)
            return frames.flatten(2).transpose(1, 2)

    frozen = FrozenTower(TowerAdapter(Spy(), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5)))
    frozen(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.allclose(seen[0][0, :, 0, 0], torch.tensor([5.0, 3.0, 1.4]))
    for bad in ({"mean": (0.5,) * 3}, {"mean": (0.5,), "std": (1.0,)}, {"mean": (0.5,) * 3, "std": (0.0, 1.0, 1.0)}):
        with pytest.raises(ConfigError, match=r"mean|std"):
            TowerAdapter(Spy(), **bad)


def test_torchvision_vit_gives_its_encoders_patches() -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, 2, 2, 24, 48).eval()
    tower = TowerAdapter(vit)
    frames = torch.rand(3, 3, 32, 32)
    patches = tower(frames)
    assert patches.shape == (3, 16, 24)
    assert (tower.grid, tower.dim) == ((4, 4), 24)
    # The encoder's CLS token times the classification head is torchvision's own output.
    cls = vit.encoder(torch.cat([vit.class_token.expand(3, -1, -1), vit._process_input(frames)], 1))[:, 0]
    torch.testing.assert_close(vit.heads(cls), vit(frames))


def test_hf_siglip_and_vit_from_random_configs() -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=16, patch_size=4, **size)).eval()
    frames = torch.rand(2, 3, 16, 16)
    tower = as_tower(siglip)
    assert torch.equal(tower(frames), siglip(frames).last_hidden_state)
    assert (tower.grid, tower.dim) == ((4, 4), 24)
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **size)).eval()
    assert torch.equal(as_tower(vit)(frames), vit(frames).last_hidden_state[:, 1:])  # CLS, known by the patch size
    module = small_module(siglip, embedding_dim=24)
    assert torch.isfinite(module(batch_of()).loss)


def test_frozen_tower_invisible_to_to_or_put_back_in_train_mode() -> None:
    model = Fake(lambda x: x).train()
    frozen = nn.Sequential(FrozenTower(model))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    frozen.train()
    assert not model.training
    model.train()  # a host that owns the tower too
    frozen(FRAMES)
    assert not model.training
    frozen.to(torch.float64)
    assert model.scale.weight.dtype == torch.float64
    frozen.to("meta")
    assert model.scale.weight.device.type == "meta"


def test_no_gradient_optimiser_or_checkpoint_sees_the_tower() -> None:
    model = Fake(lambda x: x)
    frozen = nn.Sequential(FrozenTower(model))
    assert list(frozen.parameters()) == []
    assert frozen.state_dict() == {}
    assert not frozen(FRAMES).requires_grad
    assert frozen(FRAMES.bfloat16()).dtype == torch.float32
    frozen.load_state_dict({})
    twin = copy.deepcopy(frozen)
    assert twin[0].tower.tower is not model
    assert torch.equal(twin(FRAMES), frozen(FRAMES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_frames_follow_a_tower_whose_only_floats_are_buffers(dtype: torch.dtype) -> None:
    from framestream.model.patch_basis import CosineTower

    frames = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    tower = FrozenTower(CosineTower(16, 4))
    want = tower(frames)
    got = tower.to(dtype)(frames)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)
