"""Fewer patches for a stream, by pooling its frames in space."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from framestream.pipeline.errors import ConfigError

from .geometry import IMAGE_UNITS, Grid, PatchPlaces, even_centres

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
        """Rows and columns that are left of `grid`, the last ones of fewer patches where the factor does not divide."""
        rows, columns = grid
        return -(-rows // self.factor), -(-columns // self.factor)

    def places(self, grid: Grid) -> PatchPlaces:
        """Where what is left of `grid` stands: in the middle of the patches that it was made from."""
        return PatchPlaces(*(self._centres(n) for n in grid))

    def _centres(self, count: int) -> tuple[float, ...]:
        left = -(-count // self.factor)
        if self.kind == "bilinear" or left * self.factor == count:
            return even_centres(left)
        windows = ((start, min(start + self.factor, count)) for start in range(0, count, self.factor))
        return tuple((start + stop) / 2 * (IMAGE_UNITS / count) for start, stop in windows)

    def __call__(self, patches: Tensor, grid: Grid) -> Tensor:
        """`[n, h * w, D]` -> `[n, P, D]`.

        A window over the border holds what is there: the mean or the maximum of fewer patches. Bilinear spreads the
        rows and columns that are left evenly over the image.
        """
        if self.factor == 1:
            return patches
        rows, columns = self.grid(grid)
        x = patches.transpose(1, 2).unflatten(2, grid)  # [n, D, h, w]
        if self.kind == "average":
            x = F.avg_pool2d(x, self.factor, ceil_mode=True, count_include_pad=False)
        elif self.kind == "max":
            x = F.max_pool2d(x, self.factor, ceil_mode=True)
        else:
            x = F.interpolate(x, size=(rows, columns), mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2)
