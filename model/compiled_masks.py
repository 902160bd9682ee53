"""Whether the masks of a run are worth compiling for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from framestream.pipeline.masks import FrameMask

from .attention import choose_backend

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction


class MaskWatch:
    """Warns once when compiled blocks meet a second mask under the attention backend `ranges`.

    There a mask is a loop over its rectangles, which torch.compile unrolls: other rectangles are other code.
    """

    def __init__(self, module: AutoregressiveReconstruction, device: torch.device) -> None:
        predictor = module.predictor
        backend = choose_backend(predictor.attention_backend, device, predictor.head_dim, torch.float32)
        self._first: FrameMask | None = None
        self._done = backend != "ranges"

    def __call__(self, batch: Mapping[str, Any]) -> None:
        mask = batch.get("frame_mask")
        if self._done or not isinstance(mask, FrameMask):
            return
        self._first = self._first or mask
        if mask == self._first:
            return
        self._done = True
        warnings.warn(
            "train.compile: the batches have different masks, and under the attention backend 'ranges' each mask is "
            "compiled anew, until torch gives up and runs the blocks uncompiled. Set model.attention_backend to dense "
            "or, on CUDA, flex, whose code serves all masks, or leave compile out. Clips that are too short for the "
            "sampling, data.random_end and data.pack_to make such masks. (Said once.)",
            stacklevel=2,
        )
