"""Clips to a batch: the contract between the data side and any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .errors import ConfigError
from .layout import FrameLayout, PositionKind
from .masks import FrameMask, Rule, check_rule, make_mask
from .packing import Packing, check_clip_fits
from .sampling import FAST

Normalize = tuple[Sequence[float], Sequence[float]]

_CLIP_KEYS = frozenset(
    ("frames", "frame_index", "frame_time", "frame_stream", "frame_valid", "key", "text", "meta", "report")
)


class ClipCollator:
    """Collate clips of `ClipTransform` or `ClipDataset` into a batch dict.

    With B clips of F frames and N tokens per clip:

    | key | value |
    |---|---|
    | `video_frames` | uint8 `[B, F, 3, S, S]`; float32 with `normalize` |
    | `frame_index` | int64 `[B, F]`, source frame of each frame |
    | `frame_time` | float32 `[B, F]`, seconds |
    | `frame_stream` | uint8 `[B, F]`, 0 slow, 1 fast |
    | `frame_valid` | bool `[B, F]` |
    | `frame_position_ids` | int64 `[B, N]` |
    | `frame_mask` | `FrameMask` with a batch axis; holds no tensor |
    | `keys`, `text` | list of B strings |
    | `meta` | list of B dicts |
    | `block_mask` | torch's `BlockMask`, with `block_mask=True` only |

    Further entries of the clips (`fields`) keep their name: tensors are stacked where all have one shape,
    everything else becomes a list of B. The batch is a plain dict and survives fork and spawn workers,
    `pin_memory`, and the device moves of HF Trainer and Accelerate.

    With `pack_to`, K clips stand in B sequences, several in one where they fit, without the frames that only pad a
    short clip; clips may then differ in length. F, N and B are those of the sequences, and:

    | key | value |
    |---|---|
    | `frame_clip` | int64 `[B, F]`, which clip a frame belongs to, as an index into `keys`; -1 is padding |
    | `frame_valid` | False where a sequence is filled up: behind its clips; index, time and position ID are 0 there |
    | `frame_mask` | no clip sees another; padding is seen by nobody and sees only itself |
    | `keys`, `text`, `meta`, `fields` | of the K clips, in their order before packing |
    | `fill_rate` | float, share of the B x N tokens that belong to clips |

    Position IDs, targets and times begin anew with each clip. Which clips share a sequence depends on the clips of the
    batch and their order alone, and so does B. Where all frames have one number of tokens, F and N are the same in
    every batch: what fits into `pack_to`. Where streams differ in it, see `framestream.pipeline.packing.Packing`.

    Args:
        patches_per_frame: tokens per frame, or a pair (slow, fast).
        mask: name of a rule in `framestream.pipeline.masks`, or a function of a `FrameLayout`.
        window_size: frames that `mask="sliding_window"` shows, the frame itself included.
        position_ids: "source" (index of the source frame) or "sequence" (0, 0, 1, 1, …).
        normalize: (mean, std), a number or three of them each, on a scale of 0 to 1.
        block_mask: attach torch's `BlockMask` for models that want exactly that.
        pack_to: tokens of a packed sequence; None gives each clip a sequence of its own.

    Raises:
        ConfigError: for impossible settings, at once.
    """

    def __init__(
        self,
        *,
        patches_per_frame: int | tuple[int, int],
        mask: str | Rule = "time_causal",
        window_size: int = 3,
        position_ids: PositionKind = "source",
        normalize: Normalize | None = None,
        block_mask: bool = False,
        pack_to: int | None = None,
    ) -> None:
        check_rule(mask)
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ConfigError(f"window_size is {window_size!r}; it counts the frame itself, so at least 1.")
        if position_ids not in ("source", "sequence"):
            raise ConfigError(f"position_ids is {position_ids!r}; valid values are source, sequence.")
        self.patches_per_frame = _check_patches(patches_per_frame)
        self.mask, self.window_size, self.position_ids = mask, window_size, position_ids
        self.normalize = None if normalize is None else _check_normalize(normalize)
        self.block_mask = block_mask
        self.pack_to = None if pack_to is None else _check_pack_to(pack_to, self.patches_per_frame)

    def __call__(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of at least one clip.

        Raises:
            ConfigError: the clips do not have one shape, or one alone is longer than `pack_to`.
        """
        layouts = [
            FrameLayout.from_arrays(
                clip["frame_index"], clip["frame_stream"], clip["frame_valid"], self.patches_per_frame
            )
            for clip in clips
        ]
        batch = self._apart(clips, layouts) if self.pack_to is None else self._packed(clips, layouts, self.pack_to)
        batch["keys"] = [clip["key"] for clip in clips]
        batch["text"] = [clip["text"] for clip in clips]
        batch["meta"] = [clip["meta"] for clip in clips]
        if self.block_mask:
            batch["block_mask"] = batch["frame_mask"].block_mask("cpu")
        for name in clips[0]:
            if name not in _CLIP_KEYS and not name.startswith("__"):  # webdataset adds names like __key__
                batch[name] = _together([clip[name] for clip in clips])
        return batch

    def _apart(self, clips: Sequence[Mapping[str, Any]], layouts: Sequence[FrameLayout]) -> dict[str, Any]:
        """Every clip is a sequence."""
        masks = [_mask(self.mask, self.window_size, layout) for layout in layouts]
        return {
            "video_frames": self._scaled(_stack(clips, "frames")),
            **{name: _stack(clips, name) for name in ("frame_index", "frame_time", "frame_stream", "frame_valid")},
            "frame_position_ids": torch.stack([layout.position_ids(self.position_ids) for layout in layouts]),
            "frame_mask": FrameMask.stack(masks),
        }

    def _packed(
        self, clips: Sequence[Mapping[str, Any]], layouts: Sequence[FrameLayout], pack_to: int
    ) -> dict[str, Any]:
        """Several clips in one sequence."""
        for clip, layout in zip(clips, layouts, strict=True):
            if not any(layout.valid):
                raise ConfigError(f"clip {clip['key']} has no valid frame, so there is nothing of it to pack.")
        own = [layout.only_valid() for layout in layouts]
        for clip, layout in zip(clips, own, strict=True):
            check_clip_fits(layout.num_tokens, pack_to, f"clip {clip['key']}, {layout.num_frames} frames,")
        _check_shapes(clips, "frames", per_frame=True)
        packing = Packing.of(own, pack_to)

        each = list(zip(clips, layouts, strict=True))

        def laid_out(name: str, fill: int = 0) -> torch.Tensor:
            return packing.lay_out([_only_valid(clip[name], layout.valid) for clip, layout in each], fill)

        index = laid_out("frame_index")
        numbers = [torch.full((layout.num_frames,), i, device=index.device) for i, layout in enumerate(own)]
        frame_clip = packing.lay_out(numbers, -1)
        return {
            "video_frames": self._scaled(laid_out("frames")),
            "frame_index": index,
            "frame_time": laid_out("frame_time"),
            "frame_stream": laid_out("frame_stream", FAST),
            "frame_valid": frame_clip >= 0,
            "frame_clip": frame_clip,
            "frame_position_ids": packing.token_ids([layout.position_ids(self.position_ids) for layout in own]),
            "frame_mask": packing.mask([_mask(self.mask, self.window_size, layout) for layout in own]),
            "fill_rate": packing.fill_rate,
        }

    def _scaled(self, frames: torch.Tensor) -> torch.Tensor:
        if self.normalize is None:
            return frames
        mean, std = (torch.tensor(part, device=frames.device).view(-1, 1, 1) for part in self.normalize)
        # One multiply-add on the way from bytes to floats: (x / 255 - mean) / std.
        return torch.addcmul(-mean / std, frames.float(), 1 / (255 * std))


@lru_cache(maxsize=1024)
def _mask(rule: str | Rule, window_size: int, layout: FrameLayout) -> FrameMask:
    options = {"window_size": window_size} if rule == "sliding_window" else {}
    return make_mask(rule, layout, **options)


def _stack(clips: Sequence[Mapping[str, Any]], name: str) -> torch.Tensor:
    _check_shapes(clips, name)
    return torch.stack([clip[name] for clip in clips])


def _check_shapes(clips: Sequence[Mapping[str, Any]], name: str, *, per_frame: bool = False) -> None:
    shapes = {tuple(clip[name].shape[per_frame:]): clip["key"] for clip in clips}
    if len(shapes) > 1:
        (one, other), (key, other_key) = list(shapes)[:2], list(shapes.values())[:2]
        raise ConfigError(
            f"{name} has shape {list(one)} in clip {key} and {list(other)} in {other_key}; "
            f"the clips of a batch need one {'' if per_frame else 'sampling and one '}image_size."
        )


def _only_valid(values: torch.Tensor, valid: Sequence[bool]) -> torch.Tensor:
    return values if all(valid) else values[torch.tensor(valid, device=values.device)]


def _together(values: list[Any]) -> Any:
    if all(isinstance(value, torch.Tensor) for value in values) and len({v.shape for v in values}) == 1:
        return torch.stack(values)
    return values


def _check_patches(patches: int | tuple[int, int]) -> int | tuple[int, int]:
    counts = tuple(patches) if isinstance(patches, Iterable) else (patches,)
    if (
        len(counts) > 2
        or not counts
        or any(isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1 for count in counts)
    ):
        raise ConfigError(
            f"patches_per_frame is {patches!r}; it must be a number of at least 1, or a pair (slow, fast) of such."
        )
    return int(counts[0]) if len(counts) == 1 else (int(counts[0]), int(counts[1]))


def _check_pack_to(pack_to: int, patches: int | tuple[int, int]) -> int:
    least = patches if isinstance(patches, int) else min(patches)
    if isinstance(pack_to, bool) or not isinstance(pack_to, int) or pack_to < least:
        raise ConfigError(f"pack_to is {pack_to!r}; it must be a number of tokens, at least the {least} of one frame.")
    return pack_to


def _check_normalize(normalize: Normalize) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = (tuple(float(x) for x in np.atleast_1d(part)) for part in normalize)
    except (TypeError, ValueError) as err:
        raise ConfigError(f"normalize is {normalize!r}; it must be a pair (mean, std).") from err
    if len(mean) not in (1, 3) or len(std) not in (1, 3) or not all(x > 0 for x in std):
        raise ConfigError(
            f"normalize is {normalize!r}; mean and std need 1 or 3 numbers each, and std must be positive."
        )
    return mean, std
