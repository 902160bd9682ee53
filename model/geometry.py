"""Where the tokens of a batch stand: in which frame, at which row and column, at what time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError

Grid = tuple[int, int]  # rows, columns

IMAGE_UNITS = 16.0  # an image is this many units high and wide, whatever its patches: streams pooled differently align


def even_centres(count: int) -> tuple[float, ...]:
    """Centres of `count` equal parts of the image's side."""
    return tuple((i + 0.5) * (IMAGE_UNITS / count) for i in range(count))


class PatchPlaces(NamedTuple):
    """Centres of a frame's rows and columns of patches, the image being `IMAGE_UNITS` on each side."""

    rows: tuple[float, ...]
    columns: tuple[float, ...]

    @classmethod
    def even(cls, grid: Grid) -> PatchPlaces:
        """Patches of one size that fill the image."""
        return cls(*(even_centres(n) for n in grid))


@dataclass(frozen=True)
class Geometry:
    """What a predictor has to know about its tokens beside their content. All tensors are on one device.

    Attributes:
        frame: int64 `[B, N]`, the frame of each token.
        row, column: float32 `[B, N]`, centre of the patch, the image being `IMAGE_UNITS` on each side.
        time: float32 or float64 `[B, F]` seconds.
        stream: int64 `[B, F]`, 0 slow, 1 fast.
        step: float32 `[B, F]` seconds from each frame to what it has to predict; 0 where it has no target.
        patches: tokens of each frame, one tuple for each clip, or a single one for all.
    """

    frame: Tensor
    row: Tensor
    column: Tensor
    time: Tensor
    stream: Tensor
    step: Tensor
    patches: tuple[tuple[int, ...], ...]

    @classmethod
    def build(
        cls,
        patches: Sequence[tuple[int, ...]],
        time: Tensor,
        stream: Tensor,
        step: Tensor,
        grids: Mapping[int, Grid | PatchPlaces] | None = None,
    ) -> Geometry:
        """From the tokens per frame of each clip (`B` tuples of `F` counts).

        Args:
            patches: tokens of each frame, clip by clip.
            time: `[B, F]` seconds.
            stream: `[B, F]`, 0 slow, 1 fast.
            step: `[B, F]` seconds.
            grids: for a number of patches their rows and columns, or where these stand; the squarest grid where it
                says nothing.

        Raises:
            ConfigError: `time` is no float32 or float64 tensor (half precision cannot tell frames apart).
        """
        if time.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"frame_time has dtype {time.dtype}, which cannot tell neighbouring frames apart: keep it "
                "float32 (with FSDP2 set cast_forward_inputs=False)"
            )
        known = tuple(sorted((grids or {}).items()))
        tables = [_token_table(counts, known) for counts in patches]
        same = all(counts == patches[0] for counts in patches)
        frame, row, column = (
            (tables[0][i][None].expand(len(tables), -1) if same else torch.stack([t[i] for t in tables])).to(
                time.device, non_blocking=True
            )
            for i in range(3)
        )
        shapes = tuple(patches[:1]) if same else tuple(patches)
        return cls(frame, row, column, time, stream.long(), step.float(), shapes)

    def spread(self, values: Tensor) -> Tensor:
        """Gives every token what its frame has: `[B, F, W]` -> `[B, N, W]`."""
        if len(self.patches) == 1 and len(set(self.patches[0])) == 1:
            # A plain copy, whose backward pass is a sum: fast, and the same in every run.
            return values[:, :, None].expand(-1, -1, self.patches[0][0], -1).flatten(1, 2)
        return values.gather(1, self.frame[..., None].expand(-1, -1, values.shape[-1]))


def squarest_grid(patches: int) -> Grid:
    """Rows and columns of a frame of `patches` tokens: the factors nearest to a square, rows <= columns."""
    rows = next(r for r in range(math.isqrt(patches), 0, -1) if patches % r == 0)
    return rows, patches // rows


@lru_cache(maxsize=256)
def _token_table(
    patches: tuple[int, ...], grids: tuple[tuple[int, Grid | PatchPlaces], ...]
) -> tuple[Tensor, Tensor, Tensor]:
    known = dict(grids)
    frames, rows, columns = [], [], []
    for index, count in enumerate(patches):
        places = known.get(count) or squarest_grid(count)
        if not isinstance(places, PatchPlaces):
            places = PatchPlaces.even(places)
        row, column = torch.meshgrid(torch.tensor(places.rows), torch.tensor(places.columns), indexing="ij")
        frames.append(torch.full((count,), index))
        rows.append(row.reshape(-1))
        columns.append(column.reshape(-1))
    return torch.cat(frames), torch.cat(rows), torch.cat(columns)
