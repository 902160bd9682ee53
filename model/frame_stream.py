"""A parallel pass over the history of some clips, and then one frame at a time, from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from framestream.pipeline.masks import FrameMask
from framestream.pipeline.sampling import FAST

from .clips import PreparedClips, frames_at
from .continuation import Continuation
from .geometry import Geometry
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction


class FrameStream:
    """Predicts the first generated frame from the history, and each further one from the frame that is fed.

    Args:
        module: the reconstruction module.
        clips: b clips, none packed.
        ways: how each goes on.
        patches: tokens P of a fast frame.
        first_step: `[b]` seconds from the last true fast frame to the first generated one.
        hidden_states, hidden_time: as for the module's `forward`.

    Attributes:
        frame: `[b, P, D]`, the last prediction.
        cache: keys and values that it works from.
        steps: how many frames were fed.
    """

    def __init__(
        self,
        module: AutoregressiveReconstruction,
        clips: PreparedClips,
        ways: Sequence[Continuation],
        patches: int,
        first_step: Tensor,
        hidden_states: Tensor | None,
        hidden_time: Tensor | None,
    ) -> None:
        self._module, self._patches, self._grids = module, patches, clips.grids
        self._states = (hidden_states, hidden_time)
        self._origin = clips.time.amin(dim=1, keepdim=True)
        starts = torch.tensor([[way.start] for way in ways], device=clips.embeddings.device)
        tokens, geometry = clips.pack(), clips.geometry()
        geometry = replace(geometry, step=geometry.step.scatter(1, starts, first_step[:, None].to(geometry.step.dtype)))
        plan = module.plan(FrameMask.stack([way.history for way in ways]), tokens)
        tokens, layers = module.predictor(tokens, geometry, plan, *self._states, time_origin=self._origin)
        self.frame = frames_at(clips.unpack(tokens), starts)[:, 0, :patches]
        self.steps = 0
        self.cache = KVCache(
            layers,
            [layout.patches for layout in clips.layouts],
            [way.future for way in ways],
            patches,
            token_causal=not module.config.use_frame_causal_mask,
        )

    def feed(self, frame: Tensor, time: Tensor, step: Tensor) -> Tensor:
        """Takes the next frame of each clip and predicts the one after it.

        Args:
            frame: `[b, P, D]`, usually the last prediction.
            time: `[b]` seconds at which it stands.
            step: `[b]` seconds from there to what is predicted.

        Returns:
            `[b, P, D]`.
        """
        geometry = Geometry.build(
            [(self._patches,)] * len(frame),
            time[:, None],
            torch.full((len(frame), 1), FAST, device=frame.device),
            step[:, None],
            self._grids,
        )
        plan, places = self.cache.advance(self.steps)
        self.frame, self.cache.layers = self._module.predictor(
            frame, geometry, plan, *self._states, cache=self.cache.layers, places=places, time_origin=self._origin
        )
        self.steps += 1
        return self.frame
