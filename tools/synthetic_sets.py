"""Endless small clips of which it is known what their next frame depends on.

Both sets are drawn, not decoded: a batch is a pure function of (seed, split, epoch, position), so that a loader can go
on anywhere. What a model must remember is known beforehand:

- `sprites`: squares move at constant speed and come back in on the other side. The last two frames determine the next.
- `memory`: a picture of coloured bars is shown, then hidden by a grey curtain, and at the end the curtain opens bar by
  bar. The colour of the bar that opens next was seen in the first third of the clip and never since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError, StateError
from framestream.pipeline.sampling import Sampling

from .drawn_batch import drawn_batch

SIDE = 16
FRAMES = {"sprites": 12, "memory": 20}  # per clip
FPS = 30.0
BARS = 4  # of `memory`; one opens in each of the last frames
NOTICE, STRIPES = 4, 24  # frames before it opens in which a curtain has stripes, and how strong they become
SHOWN = 8  # first frames of `memory`, in which all bars can be seen
GREY = 127  # the ground of `sprites` and the curtain of `memory`: the mean colour, which is the best blind guess
SPLITS = {"train": 0, "held_out": 1}


def moving_sprites(clips: int, generator: torch.Generator, squares: int = 2) -> Tensor:
    """uint8 `[clips, 12, 3, SIDE, SIDE]`: a few squares each, at constant speed, on a torus.

    Edges are drawn with the share of each pixel that they cover, so that one frame shows a place to a fraction of a
    pixel and two frames show the speed.
    """
    frames = FRAMES["sprites"]
    video = torch.full((clips, frames, 3, SIDE, SIDE), float(GREY))
    time = torch.arange(frames)[:, None]
    for _ in range(squares):
        size = 4 + 3 * torch.rand(clips, 1, 1, 1, generator=generator)
        colour = torch.randint(0, 256, (clips, 1, 3, 1, 1), generator=generator)
        start = torch.rand(clips, 1, 2, generator=generator) * SIDE
        direction = torch.randint(0, 2, (clips, 1, 2), generator=generator) * 2 - 1
        speed = (0.5 + 1.5 * torch.rand(clips, 1, 2, generator=generator)) * direction
        corner = (start + speed * time).remainder(SIDE)[..., None]  # [clips, frames, 2, 1]
        covered = torch.zeros(clips, frames, 2, SIDE)
        pixel = torch.arange(SIDE)
        for turn in (0, SIDE):  # a square over the edge is seen on both sides
            left, right = corner - turn, corner - turn + size
            covered += (torch.minimum(right, pixel + 1.0) - torch.maximum(left, pixel)).clamp(0, 1)
        share = (covered[:, :, 0, :, None] * covered[:, :, 1, None, :])[:, :, None]
        video = video + share * (colour - video)
    return video.round().to(torch.uint8)


def bars_behind_a_curtain(clips: int, generator: torch.Generator) -> Tensor:
    """uint8 `[clips, 20, 3, SIDE, SIDE]`: bars that are shown, hidden, and at the end laid open one by one.

    The curtain before a bar is striped, the more the sooner it opens, and grey on average: when a bar opens can be seen
    in the frame before, and which colour it has cannot.
    """
    colours = torch.randint(0, 256, (clips, 1, 3, 1, BARS), generator=generator)
    time = torch.arange(FRAMES["memory"])[:, None]
    wait = len(time) - BARS + torch.arange(BARS) - time  # [frames, BARS] until it opens
    stripes = (STRIPES * (1 - (wait - 1) / NOTICE)).clamp(min=0)[:, None, None, :]
    stripes = stripes * (torch.arange(SIDE) % 2 * 2 - 1)[:, None]
    open_now = (wait <= 0) | (time < SHOWN)
    video = torch.where(open_now[:, None, None, :], colours, GREY + stripes)
    return video.round().to(torch.uint8).repeat_interleave(SIDE // BARS, dim=-1)


SETS: Mapping[str, Callable[[int, torch.Generator], Tensor]] = {
    "sprites": moving_sprites,
    "memory": bars_behind_a_curtain,
}


@dataclass
class SyntheticLoader:
    """Batches of a set under one sampling and one mask; iterating again gives the next epoch.

    Args:
        name: of `SETS`.
        sampling: which frames of a clip.
        patches: tokens per frame, a number or (slow, fast).
        mask: rule that says which frames see which.
        batch_size: clips per batch.
        batches: batches per epoch.
        seed: of the clips. Loaders that differ in sampling and mask alone give the same clips.
        split: train or held_out, which share no seed. The held-out clips are the same in every epoch.

    Raises:
        ConfigError: an unknown set or split.
    """

    name: str
    sampling: Sampling
    patches: int | tuple[int, int]
    mask: str
    batch_size: int
    batches: int = 64
    seed: int = 0
    split: str = "train"
    epoch: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        if self.name not in SETS:
            raise ConfigError(f"There is no synthetic set {self.name!r}; known are {', '.join(SETS)}.")
        if self.split not in SPLITS:
            raise ConfigError(f"A synthetic set has the splits {', '.join(SPLITS)}, not {self.split!r}.")

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.position < self.batches:
            self.position += 1  # before the batch goes out: a state taken after it points behind it
            yield self.batch(self.epoch, self.position - 1)
        self.epoch, self.position = self.epoch + (self.split == "train"), 0

    def batch(self, epoch: int, position: int) -> dict[str, Any]:
        """One batch, in the form in which every loader gives it."""
        where = [self.seed, SPLITS[self.split], epoch, position]
        number = int(np.random.SeedSequence(where).generate_state(1)[0])
        video = SETS[self.name](self.batch_size, torch.Generator().manual_seed(number))
        batch = drawn_batch(video, self.sampling.plan(FRAMES[self.name]), self.mask, self.patches, FPS)
        rows = self.batch_size
        return {
            **batch,
            "keys": [f"{self.name}-{self.split}-{epoch}-{position}-{row}" for row in range(rows)],
            "meta": [{}] * rows,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands."""
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            StateError: the state is of other clips.
        """
        mine = self._identity()
        if changed := [name for name, value in mine.items() if state.get(name) != value]:
            raise StateError(f"The state is of other clips: {', '.join(changed)} changed. Start a new run for these.")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        names = ("name", "batch_size", "batches", "seed", "split")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Nothing to stop."""
