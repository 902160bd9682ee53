"""Fewer patches for a stream, by pooling its frames in space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import SLOW

from .geometry import IMAGE_UNITS, Grid, PatchPlaces, even_centres

KINDS = ("average", "max", "bilinear")


class Pool(NamedTuple):
    """A kind of pooling and the factor by which rows and columns shrink."""

    kind: str = "average"
    factor: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor}"

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


@dataclass(frozen=True)
class StreamPools:
    """How the frames of each stream are pooled."""

    slow: Pool
    fast: Pool

    def __call__(
        self, patches: Tensor, stream: Tensor, grid: Grid
    ) -> tuple[Tensor, tuple[int, int], dict[int, PatchPlaces]]:
        """Pool each frame as its stream wants it.

        Args:
            patches: `[B, F, h * w, D]`.
            stream: `[B, F]`, 0 slow, 1 fast.
        Returns:
            `[B, F, P, D]`, with zeros behind a stream of fewer patches than P; patches of (slow, fast); where patches
            stand, by how many there are.
        Raises:
            ConfigError: both leave as many patches at different places, so that their number does not tell them apart.
        """
        places = self.slow.places(grid), self.fast.places(grid)
        slow_count, fast_count = (len(each.rows) * len(each.columns) for each in places)
        if slow_count == fast_count and places[0] != places[1]:
            raise ConfigError(
                f"slow_pool {self.slow} and fast_pool {self.fast} leave {fast_count} patches each of a grid of "
                f"{grid[0]} x {grid[1]}, at different places: pool both streams alike, or to different sizes"
            )
        counts, known = (slow_count, fast_count), {slow_count: places[0], fast_count: places[1]}
        flat = patches.flatten(0, 1)
        if self.slow == self.fast:
            return self.fast(flat, grid).unflatten(0, stream.shape), counts, known
        slow, fast = (
            F.pad(pool(flat, grid), (0, 0, 0, max(counts) - count))
            for pool, count in zip((self.slow, self.fast), counts, strict=True)
        )
        chosen = torch.where((stream == SLOW).reshape(-1, 1, 1), slow, fast)
        return chosen.unflatten(0, stream.shape), counts, known
