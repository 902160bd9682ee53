"""Frozen vision towers behind one protocol: frames in, patch embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from framestream.pipeline.errors import ConfigError

from .geometry import Grid, squarest_grid


@runtime_checkable
class Tower(Protocol):
    """What the module asks of a tower: a call from `[n, 3, H, W]` float frames to `[n, P, D]`."""

    dim: int | None  # D, where it is known before the first frame
    grid: Grid | None  # rows and columns of the patches, where known

    def __call__(self, frames: Tensor) -> Tensor: ...


class PixelTower(nn.Module):
    """Patches of pixels as embeddings: no weights, and predictions can be looked at as pictures.

    Embeddings are `(pixel - 0.5) * 4`, about zero with a spread of about one, which a predictor learns
    from faster than from raw pixels, all positive. `unpatchify` undoes it.

    Args:
        image_size: height and width of the frames.
        patch_size: height and width of a patch; divides `image_size`. D is `3 * patch_size ** 2`.
    """

    def __init__(self, image_size: int = 224, patch_size: int = 16) -> None:
        super().__init__()
        if image_size < 1 or patch_size < 1 or image_size % patch_size:
            raise ConfigError(f"PixelTower: image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.dim: int | None = 3 * patch_size**2
        self.grid: Grid | None = (image_size // patch_size, image_size // patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        """`[n, 3, S, S]` -> `[n, P, 3 * p * p]`, patches row by row.

        Raises:
            ConfigError: frames of another size.
        """
        n, p = frames.shape[0], self.patch_size
        if frames.shape[1:] != (3, self.image_size, self.image_size):
            raise ConfigError(
                f"PixelTower takes frames of [3, {self.image_size}, {self.image_size}], got {list(frames.shape[1:])}: "
                "give the loader and the tower one image_size"
            )
        side = self.image_size // p
        patches = frames.reshape(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        return (patches.reshape(n, side * side, 3 * p * p) - 0.5) * 4

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`[..., P, 3 * p * p]` -> pixels `[..., 3, h * p, w * p]`; also of a pooled frame, whose grid is smaller."""
        lead, p = patches.shape[:-2], self.patch_size
        rows, columns = squarest_grid(patches.shape[-2])
        x = (patches / 4 + 0.5).reshape(-1, rows, columns, 3, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(*lead, 3, rows * p, columns * p)


class TowerAdapter(nn.Module):
    """Any vision model as a tower.

    Understands `[n, P, D]`, a grid `[n, D, h, w]`, a tuple or list (its first element), and the outputs of
    HF models (`last_hidden_state`); takes the encoder of torchvision's `VisionTransformer`, whose own output is
    class scores, and the vision half of HF's two-tower models.

    Tokens in front of the patches (CLS, registers) are stripped by rule: `strip_cls` as a number or bool says
    how many; None derives it from the model's patch size, and refuses to guess where that is unknown and the
    count of tokens is one more than a square.

    Args:
        tower: the model.
        strip_cls: tokens to strip from the front; True = 1, False = 0, None = derive.
        mean, std: per channel, applied to frames scaled to 0..1, for models that want it.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        strip_cls: int | bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ConfigError("a tower's mean and std come together: one was given without the other")
        if any(values is not None and len(values) != 3 for values in (mean, std)):
            raise ConfigError(f"a tower's mean and std have one entry for each of 3 channels, got {mean} and {std}")
        if std is not None and min(std) <= 0:
            raise ConfigError(f"a tower's std must be positive, got {tuple(std)}")
        self.tower = _vision_half(tower)
        self.strip_cls = strip_cls
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.grid: Grid | None = None
        self.dim: int | None = _declared_dim(self.tower)

    def forward(self, frames: Tensor) -> Tensor:
        """`[n, 3, H, W]` float -> `[n, P, D]`.

        Raises:
            ConfigError: an output that is none of the above, or ambiguous about CLS.
        """
        if self.mean is not None and self.std is not None:
            mean, std = (frames.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
            frames = (frames - mean) / std
        frames = frames.to(_float_dtype(self.tower) or frames.dtype)
        out = _tensor_of(self._torchvision_patches(frames) if _is_torchvision_vit(self.tower) else self.tower(frames))
        if out.dim() == 4:  # [n, D, h, w]
            self.grid = (out.shape[2], out.shape[3])
            return out.flatten(2).transpose(1, 2)
        if out.dim() != 3:
            raise ConfigError(
                f"{type(self.tower).__name__} gives {list(out.shape)}: a tower must give [n, P, D] patch embeddings or "
                "a grid [n, D, h, w]; pass the part of the model before pooling and classification"
            )
        expected = self._expected_grid(frames)
        prefix = self._prefix(out.shape[1], expected)
        self.grid = expected if expected and expected[0] * expected[1] == out.shape[1] - prefix else None
        return out[:, prefix:]

    def _torchvision_patches(self, frames: Tensor) -> Tensor:
        vit: Any = self.tower
        patches = vit._process_input(frames)  # [n, P, D]
        cls = vit.class_token.expand(len(frames), -1, -1)
        return vit.encoder(torch.cat([cls, patches], dim=1))

    def _expected_grid(self, frames: Tensor) -> Grid | None:
        size = getattr(getattr(self.tower, "config", self.tower), "patch_size", None)
        if isinstance(size, (tuple, list)):
            size = size[0]
        if not isinstance(size, int):
            return None
        return frames.shape[-2] // size, frames.shape[-1] // size

    def _prefix(self, tokens: int, expected: Grid | None) -> int:
        if self.strip_cls is not None:
            prefix = int(self.strip_cls)
            if not 0 <= prefix < tokens:
                raise ConfigError(f"strip_cls={prefix} leaves no patch of the {tokens} tokens of the tower")
            return prefix
        if expected is not None and tokens >= expected[0] * expected[1]:
            return tokens - expected[0] * expected[1]
        side = round((tokens - 1) ** 0.5)
        if tokens > 1 and side * side == tokens - 1:
            raise ConfigError(
                f"{type(self.tower).__name__} gives {tokens} tokens, one more than {side} x {side}: say "
                "strip_cls=1 if the first is a CLS token, strip_cls=0 if all are patches"
            )
        return 0


def as_tower(tower: nn.Module) -> nn.Module:
    """The tower itself where it follows the protocol, else a `TowerAdapter` around it.

    Raises:
        ConfigError: not a module.
    """
    if not isinstance(tower, nn.Module):
        raise ConfigError(f"vision_tower must be a torch module, got {type(tower).__name__}")
    if isinstance(tower, (PixelTower, TowerAdapter, Tower)):
        return tower
    return TowerAdapter(tower)


class FrozenTower(nn.Module):
    """Holds a tower that is used and never trained.

    It moves with the module that owns it (`to`, `half`, `cuda`), always runs in eval mode, and is invisible to
    `parameters()` and `state_dict()`: no optimiser, no DDP and no checkpoint sees it. A tower that a host model
    also owns is shared, not copied, and put back to eval mode when that host was put in train mode.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        tower = as_tower(tower)
        tower.requires_grad_(False)
        tower.eval()
        # In a tuple, because torch registers what it finds as a plain attribute.
        self._held = (tower,)

    @property
    def tower(self) -> Any:
        """The tower that follows the protocol."""
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTower:
        super()._apply(fn, recurse)
        self.tower._apply(fn)
        return self

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """`[n, 3, H, W]` uint8 (scaled to 0..1) or float -> `[n, P, D]` float32, detached."""
        if any(part.training for part in self.tower.modules()):  # a host's train() reaches parts, not the whole
            self.tower.eval()
        if not frames.is_floating_point():
            frames = frames.float() / 255
        if not isinstance(self.tower, TowerAdapter):  # which casts after normalising
            frames = frames.to(_float_dtype(self.tower) or frames.dtype)
        return self.tower(frames).detach().float()


def _float_dtype(tower: nn.Module) -> torch.dtype | None:
    """What the tower computes in: the dtype of its first floating parameter or buffer."""
    held = (t.dtype for tensors in (tower.parameters(), tower.buffers()) for t in tensors)
    return next((dtype for dtype in held if dtype.is_floating_point), None)


def _is_torchvision_vit(tower: nn.Module) -> bool:
    return any(c.__module__.startswith("torchvision.models.vision_transformer") for c in type(tower).__mro__)


def _vision_half(tower: nn.Module) -> nn.Module:
    half = getattr(tower, "vision_model", None)
    return half if isinstance(half, nn.Module) and hasattr(tower, "text_model") else tower


def _declared_dim(tower: nn.Module) -> int | None:
    for owner, name in ((getattr(tower, "config", None), "hidden_size"), (tower, "hidden_dim"), (tower, "embed_dim")):
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return None


def _tensor_of(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    state = getattr(out, "last_hidden_state", None)
    if isinstance(state, Tensor):
        return state
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    raise ConfigError(
        f"the tower returned {type(out).__name__}: it must return a tensor, a tuple that begins with one, or an output "
        "with last_hidden_state"
    )
