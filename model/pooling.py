"""Fewer patches for a stream, by pooling its frames in space."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from framestream.pipeline.errors import ConfigError

from .geometry import Grid

KINDS = ("average", "max", "bilinear")


class Pool(NamedTuple):
    """A kind of pooling and the factor by which rows and columns shrink."""

    kind: str = "average"
    factor: int = 1

    @classmethod
    def parse(cls, value: str | int | None, name: str = "pool") -> Pool:
        """From None (no pooling), a factor, or "kind:factor".

        Raises:
            ConfigError: anything else, naming the setting.
        """
        kind, factor = "average", str(1 if value is None else value)
        if isinstance(value, str) and ":" in value:
            kind, factor = value.split(":", 1)
        if isinstance(value, (bool, float)) or kind not in KINDS or not factor.isdecimal() or int(factor) < 1:
            raise ConfigError(
                f"{name} must be a factor of at least 1, or one of {', '.join(KINDS)} with a factor, as in "
                f"'average:2'; got {value!r}"
            )
        return cls(kind, int(factor))

    def grid(self, grid: Grid) -> Grid:
        """Rows and columns that are left of `grid`.

        Raises:
            ConfigError: the factor does not divide them (cropping would lose the border without a word).
        """
        rows, columns = grid
        if rows % self.factor or columns % self.factor:
            raise ConfigError(
                f"pooling by {self.factor} does not divide the tower's grid of {rows} x {columns} patches: "
                "use a factor that does"
            )
        return rows // self.factor, columns // self.factor

    def __call__(self, patches: Tensor, grid: Grid) -> Tensor:
        """`[n, h * w, D]` -> `[n, P, D]`."""
        if self.factor == 1:
            return patches
        rows, columns = self.grid(grid)
        x = patches.transpose(1, 2).unflatten(2, grid)  # [n, D, h, w]
        if self.kind == "average":
            x = F.avg_pool2d(x, self.factor)
        elif self.kind == "max":
            x = F.max_pool2d(x, self.factor)
        else:
            x = F.interpolate(x, size=(rows, columns), mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2)
