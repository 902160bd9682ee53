"""Which mask a batch is trained under: its own, or that of the settings, never both in silence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, FramePattern

from .reconstruction_config import ReconstructionConfig


def choose_mask(config: ReconstructionConfig, given: FrameMask | None, layouts: Sequence[FrameLayout]) -> FrameMask:
    """The batch's own mask, else that of the settings, limited by `num_hist`; with a batch axis.

    Raises:
        ConfigError: the batch's mask has other clips or patches, or explicit settings contradict it.
    """
    if given is None:
        masks = [own_mask(config, layout) for layout in layouts]
    else:
        if given.batch_size not in (None, len(layouts)):
            raise ConfigError(f"the batch has {len(layouts)} clips and its frame_mask {given.batch_size}")
        masks = [given if given.batch_size is None else given[i] for i in range(len(layouts))]
        explicit = config.mask is not None or not config.use_frame_causal_mask
        for mask, layout in zip(masks, layouts, strict=True):
            check_batch_mask(mask, own_mask(config, layout) if explicit else None, layout)
    return FrameMask.stack([limited(config, mask, layout) for mask, layout in zip(masks, layouts, strict=True)])


def limited(config: ReconstructionConfig, mask: FrameMask, layout: FrameLayout) -> FrameMask:
    """A clip's mask within `num_hist`."""
    return mask if config.num_hist is None else mask & history_mask(layout, config.num_hist)


@lru_cache(maxsize=1024)
def own_mask(config: ReconstructionConfig, layout: FrameLayout) -> FrameMask:
    return config.make_mask(layout)


def check_batch_mask(mask: FrameMask, mine: FrameMask | None, layout: FrameLayout) -> None:
    pattern = mask.patterns[0]
    if pattern.lengths != layout.patches:
        raise ConfigError(
            f"the batch's frame_mask is for {_counts(pattern.lengths)} patches per frame, and the tower and pooling "
            f"give {_counts(layout.patches)}: set the loader's patches_per_frame to that"
        )
    if mine is not None and mine.patterns[0].rows != pattern.rows:
        raise ConfigError(
            "the module's mask settings contradict the batch's frame_mask: leave mask unset (and "
            "use_frame_causal_mask true) to use the batch's, or give the loader the same mask"
        )


def _counts(patches: tuple[int, ...]) -> str:
    return str(patches[0]) if len(set(patches)) == 1 else str(list(patches))


@lru_cache(maxsize=1024)
def history_mask(layout: FrameLayout, num_hist: int) -> FrameMask:
    """Each frame sees, of every stream of its clip, no more than `num_hist` valid frames up to its own time."""
    streams: dict[tuple[int, int], list[int]] = {}
    own = list(zip(layout.clip, layout.stream, strict=True))
    for key, index, valid in zip(own, layout.frame_index, layout.valid, strict=True):
        if valid:
            streams.setdefault(key, []).append(index)
    for found in streams.values():
        found.sort()
    upto = [bisect_right(streams.get(key, []), index) for key, index in zip(own, layout.frame_index, strict=True)]
    rows = []
    for i, now in enumerate(layout.frame_index):
        seen = {key: bisect_right(found, now) for key, found in streams.items()}
        row = 1 << i
        for j, key in enumerate(own):
            if seen.get(key, 0) - upto[j] < num_hist:  # so many valid frames of the stream lie between the two
                row |= 1 << j
        rows.append(row)
    return FrameMask((FramePattern(tuple(rows), layout.patches),))
