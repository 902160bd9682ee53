"""A batch as the predictor takes it: embedded, pooled, with its mask and its targets decided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask

from .geometry import Geometry, PatchPlaces
from .losses import patch_error


@dataclass
class PreparedClips:
    """A batch as the predictor takes it. P is the larger of the streams' patch counts; shorter frames are padded."""

    embeddings: Tensor  # [B, F, P, D], input and target
    layouts: tuple[FrameLayout, ...]
    mask: FrameMask  # with a batch axis
    time: Tensor  # [B, F] seconds
    stream: Tensor  # int64 [B, F]
    targets: Tensor  # int64 [B, F], position of each frame's target; 0 where it has none
    has_target: Tensor  # bool [B, F]
    scored: Tensor  # bool [B, F], frames whose target counts
    leaking: int
    num_scored: int
    grids: dict[int, PatchPlaces]  # for a number of patches, where they stand
    clip: Tensor | None = None  # int64 [B, F], which clip a frame of a packed sequence belongs to, -1 padding

    def select(self, clips: list[int]) -> PreparedClips:
        """Some of the clips, in that order."""
        if clips == list(range(len(self.layouts))):
            return self
        at = torch.tensor(clips, device=self.embeddings.device)
        return replace(
            self,
            embeddings=self.embeddings[at],
            layouts=tuple(self.layouts[i] for i in clips),
            mask=FrameMask.stack([self.mask[i] for i in clips]),
            time=self.time[at],
            stream=self.stream[at],
            targets=self.targets[at],
            has_target=self.has_target[at],
            scored=self.scored[at],
            clip=None if self.clip is None else self.clip[at],
        )

    def geometry(self) -> Geometry:
        """Where the tokens stand."""
        step = torch.where(self.has_target, self.time.gather(1, self.targets) - self.time, 0)
        return Geometry.build([layout.patches for layout in self.layouts], self.time, self.stream, step, self.grids)

    def time_origin(self) -> Tensor | None:
        """`[B, F]` seconds, the earliest frame of each frame's own clip; None where a sequence is one clip."""
        if self.clip is None:
            return None
        own = self.clip[:, :, None] == self.clip[:, None, :]
        return torch.where(own, self.time[:, None, :], torch.inf).amin(-1)

    def spread_states(self, states: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Host states of K clips, `[K, S, C]` and `[K, S]`, beside the sequences that hold these clips.

        Returns:
            `[B, M * S, C]`, `[B, M * S]`, and bool `[B, F, M * S]`, which states are of a frame's own clip. M is the
            number of clips in the sequence that holds most.

        Raises:
            ConfigError: the number of rows is not that of the clips.
        """
        assert self.clip is not None
        clips = [[k for k in dict.fromkeys(layout.clip) if k >= 0] for layout in self.layouts]
        count = sum(map(len, clips))
        for name, given in (("hidden_states", states), ("hidden_time", time)):
            if given is not None and (given.dim() < 2 or len(given) != count):
                raise ConfigError(
                    f"{name} must have a row for each of the {count} clips in these packed sequences, "
                    f"got {list(given.shape)}"
                )
        most = max(map(len, clips))
        owner = torch.tensor([own + [-2] * (most - len(own)) for own in clips], device=states.device)
        rows = owner.clamp(min=0)
        beside = states[rows].masked_fill((owner < 0)[:, :, None, None], 0).flatten(1, 2)
        when = None if time is None else time[rows.to(time.device)].flatten(1, 2)
        each = owner.repeat_interleave(states.shape[1], dim=1).to(self.clip.device)
        return beside, when, self.clip[:, :, None] == each[:, None, :]

    def pack(self) -> Tensor:
        """The frames' own patches as tokens: `[B, N, D]`."""
        index = self._token_index()
        flat = self.embeddings.flatten(1, 2)
        return flat if index is None else flat.gather(1, index[..., None].expand(-1, -1, flat.shape[-1]))

    def unpack(self, tokens: Tensor) -> Tensor:
        """The reverse: `[B, N, D]` to `[B, F, P, D]`, zeros where a frame has fewer patches."""
        index = self._token_index()
        shape = self.embeddings.shape
        if index is None:
            return tokens.unflatten(1, shape[1:3])
        blank = tokens.new_zeros(shape[0], shape[1] * shape[2], shape[3])
        return blank.scatter(1, index[..., None].expand(-1, -1, shape[3]), tokens).unflatten(1, shape[1:3])

    def frame_error(self, predicted: Tensor, target: Tensor, loss: str) -> Tensor:
        """Mean error of each frame's own patches: `[B, F, P, D]` twice to `[B, F]`."""
        error = patch_error(predicted, target, loss)
        if self._token_index() is None:
            return error.mean(-1)
        counts = torch.tensor([layout.patches for layout in self.layouts], device=error.device)
        own = torch.arange(error.shape[-1], device=error.device) < counts[..., None]
        return torch.where(own, error, 0).sum(-1) / counts

    def _token_index(self) -> Tensor | None:
        """int64 `[B, N]` into the flattened frames; None where every frame is full."""
        width = self.embeddings.shape[2]
        if all(set(layout.patches) == {width} for layout in self.layouts):
            return None
        rows = [_flat_positions(layout.patches, width) for layout in self.layouts]
        return torch.stack(rows).to(self.embeddings.device)


def frames_at(frames: Tensor, positions: Tensor) -> Tensor:
    """`[B, F, P, D]` at `[B, n]` -> `[B, n, P, D]`."""
    return frames.gather(1, positions[:, :, None, None].expand(-1, -1, *frames.shape[2:]))


@lru_cache(maxsize=256)
def _flat_positions(patches: tuple[int, ...], width: int) -> Tensor:
    return torch.cat([torch.arange(count) + frame * width for frame, count in enumerate(patches)])


def layouts_of(facts: Tensor, patches: tuple[int, int], mask: FrameMask | None) -> tuple[FrameLayout, ...]:
    """The layout of each sequence from its frames' index, stream, validity and, where packed, clip: `[3 or 4, B, F]`.

    Frames that fill a packed sequence up have as many tokens as its mask says.
    """
    layouts = []
    for row, (index, stream, valid, *clip) in enumerate(facts.unbind(1)):
        layout = FrameLayout.from_arrays(index, stream, valid, patches, clip=clip[0] if clip else None)
        if clip and mask is not None and mask.batch_size == facts.shape[1]:
            lengths = mask[row].patterns[0].lengths
            if len(lengths) == layout.num_frames:
                both = zip(layout.clip, layout.patches, lengths, strict=True)
                layout = replace(layout, patches=tuple(given if k < 0 else own for k, own, given in both))
        layouts.append(layout)
    return tuple(layouts)


def unique_frames(
    frame_index: Tensor, frame_valid: Tensor | None = None, frame_clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Flat positions of the frames to encode, and for each frame of `[B, F]` which of them it is; invalid ones any."""
    index = frame_index.cpu()
    valid = torch.ones_like(index) if frame_valid is None else frame_valid.cpu()
    clips = torch.zeros_like(index) if frame_clip is None else frame_clip.cpu()
    first: list[int] = []
    source: list[int] = []
    for start, row, usable, clip in zip(
        range(0, index.numel(), index.shape[1]), index.tolist(), valid.tolist(), clips.tolist(), strict=True
    ):
        seen: dict[tuple[int, int], int] = {}
        for position, frame in enumerate(zip(clip, row, strict=True)):
            if not usable[position]:
                source.append(0)
                continue
            if frame not in seen:
                seen[frame] = len(first)
                first.append(start + position)
            source.append(seen[frame])
    return torch.tensor(first or [0]), torch.tensor(source)
