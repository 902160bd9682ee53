"""One batch under audit: what stands where, what may be reached, and runs of the module with something changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framestream.model.clips import PreparedClips, frames_at
from framestream.model.evaluate import move_batch
from framestream.pipeline.layout import next_frame_targets

from .audit_report import STREAM_NAMES, Source, frame_name, sources_of

if TYPE_CHECKING:
    from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction

Progress = Callable[[int, int, int], None]
_TOKENS_AT_ONCE = 16384  # of the copies of one backward pass


class Runs:
    """The module and a batch of B clips of F frames; everything that is decided before anything is changed.

    Attributes:
        clips: as the module prepares them.
        attends: bool `[F, F]` for each clip, the mask of one layer.
        allowed: bool `[F, F]` for each clip, what may be reached through all layers.
        targets: position of each frame's target, or -1.
        scored: bool `[B, F]`, frames whose target is in the loss.
        sources: what is changed on its own.
        states: `[B, S, hidden_size]` hidden states, one for each frame of a clip, and one that is padding.
        state_times: `[B, S]` seconds, when each was made; infinite for padding.
        may_read: bool `[B, F, S]`: may state s reach what frame i predicts?
    """

    def __init__(
        self, module: AutoregressiveReconstruction, batch: Mapping[str, Any], seed: int, progress: Progress
    ) -> None:
        self.module, self.device = module, next(module.parameters()).device
        self.batch = move_batch(batch, self.device)
        self.generator = torch.Generator().manual_seed(seed)
        self.clips: PreparedClips = module.prepare(self.batch)
        self.layouts, self.num_layers = self.clips.layouts, module.config.num_layers
        masks = [self.clips.mask[b] for b in range(len(self.layouts))]
        self.attends = [mask.matrix() for mask in masks]
        self.allowed = [mask.reach(self.num_layers).matrix() for mask in masks]
        self.targets = [next_frame_targets(layout) for layout in self.layouts]
        self.scored = self.clips.scored.cpu()
        self.sources = [source for b, layout in enumerate(self.layouts) for source in sources_of(b, layout)]
        when = batch["frame_time"].cpu().float()
        self.seconds: list[list[float]] = when.tolist()
        self.state_times = _state_times(when)
        self.states = self._random(*self.state_times.shape, module.predictor.null_state.shape[-1])
        # A frame reads in each layer, after it has looked at other frames: what others read has one layer less to go.
        reads = self.state_times[:, None, :] <= when[:, :, None]
        onward = torch.stack([mask.reach(self.num_layers - 1).matrix() for mask in masks])
        self.may_read = (onward.float() @ reads.float()) > 0
        self._progress, self._done = progress, 0
        self._total = len(self.sources) + self.state_times.shape[1] + len(self.layouts) + 1

    def step(self, leaks: int) -> None:
        """One run more is done."""
        self._done += 1
        self._progress(min(self._done, self._total - 1), self._total, leaks)

    def end(self, leaks: int) -> None:
        """All are done."""
        self._progress(self._total, self._total, leaks)

    def may_reach(self, source: Source) -> Tensor:
        """bool `[B, F]`: predictions that a source may reach. Padding reaches nothing, and no clip another."""
        may = torch.zeros_like(self.scored)
        if not source.is_padding:
            valid = self.layouts[source.clip].valid
            shown = [j for j in source.positions if valid[j]]
            may[source.clip] = self.allowed[source.clip][:, shown].any(-1)
        return may

    def after_target(self, clip: int) -> Tensor:
        """bool `[F, F]`: frame j is the target of frame i, or later."""
        index, valid = self.layouts[clip].frame_index, self.layouts[clip].valid
        return torch.tensor(
            [
                [target >= 0 and valid[j] and index[j] >= index[target] for j in range(len(index))]
                for target in self.targets[clip]
            ]
        )

    def changed_batch(self, sources: Sequence[Source]) -> dict[str, Any]:
        """The batch with other pixels for some sources, everywhere they stand."""
        frames = self.batch["video_frames"].clone()
        for source in sources:
            old = frames[source.clip, source.positions[0]].cpu()
            if frames.is_floating_point():
                new = old + torch.randn(old.shape, generator=self.generator)
            else:  # every pixel becomes another one
                new = old + torch.randint(1, 256, old.shape, generator=self.generator)
            frames[source.clip, list(source.positions)] = new.to(frames.device, frames.dtype)
        return {**self.batch, "video_frames": frames}

    def predictions_from_states(self, pushed: int | None = None) -> Tensor:
        """Predictions `[B, F, P, D]` that read the hidden states, one of them changed in every clip."""
        states = self.states.clone()
        if pushed is not None:
            states[:, pushed] += self._random(*states[:, pushed].shape)
        return self.clips.unpack(self.module.predict(self.clips, states, self.state_times.to(self.device)))

    @torch.enable_grad()
    def derivatives(self, clip: int) -> tuple[Tensor, Tensor]:
        """bool `[F, F]` and `[F, S]`: does what frame i gives to the loss change with frame j, with state s?

        One backward pass of F copies, of which copy i carries frame i's error (its target held fixed), or where it has
        no target a projection of its prediction. Long clips take several passes.
        """
        count, times = self.layouts[clip].num_frames, self.state_times.to(self.device)
        at_once = max(1, _TOKENS_AT_ONCE // self.layouts[clip].num_tokens)
        frames, states = [], []
        for first in range(0, count, at_once):
            rows = range(first, min(first + at_once, count))
            same = [clip] * len(rows)
            copies = self.clips.select(same)
            shown = copies.embeddings.detach().clone().requires_grad_()
            read = self.states[same].clone().requires_grad_()
            copies = replace(copies, embeddings=shown)
            predictions = copies.unpack(self.module.predict(copies, read, times[same]))
            truth = frames_at(shown.detach(), copies.targets)
            error = copies.frame_error(predictions, truth, self.module.config.loss)
            carried = [
                error[k, i]
                if self.targets[clip][i] >= 0
                else (predictions[k, i] * self._random(*predictions.shape[2:])).sum()
                for k, i in enumerate(rows)
            ]
            to_frames, to_states = torch.autograd.grad(torch.stack(carried).sum(), (shown, read))
            frames.append((to_frames != 0).flatten(2).any(-1).cpu())
            states.append((to_states != 0).any(-1).cpu())
        return torch.cat(frames), torch.cat(states)

    # -- names, for messages ---------------------------------------------------------------------------------

    def frame(self, clip: int, position: int) -> str:
        """`frame 12 (fast, 0.40 s)`."""
        return frame_name(self.layouts[clip], position, self.seconds[clip][position])

    def source(self, source: Source, clip: int) -> str:
        """`clip 1: frame 12 (fast, 0.40 s)`, as something that reaches into that clip."""
        layout, seconds = self.layouts[source.clip], self.seconds[source.clip][source.positions[0]]
        streams = sorted({layout.stream[j] for j in source.positions if layout.valid[j]})
        shown = " and ".join(STREAM_NAMES[stream] for stream in streams)
        name = "padding" if source.is_padding else f"frame {source.index} ({shown}, {seconds:.2f} s)"
        return self.clip(clip) + name + ("" if source.clip == clip else f" of clip {source.clip}")

    def state(self, clip: int, number: int) -> str:
        """`clip 1: the hidden state of 0.40 s`."""
        when = float(self.state_times[clip, number])
        return self.clip(clip) + (
            f"the hidden state of {when:.2f} s" if when < float("inf") else "a hidden state that is padding"
        )

    def clip(self, clip: int) -> str:
        """`clip 1: `, where there is more than one."""
        return f"clip {clip}: " if len(self.layouts) > 1 else ""

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)


def _state_times(when: Tensor) -> Tensor:
    """`[B, S]`: the distinct times of each clip's frames `[B, F]`, then infinity."""
    rows = [sorted(set(row)) for row in when.tolist()]
    longest = max(map(len, rows)) + 1
    return torch.tensor([row + [float("inf")] * (longest - len(row)) for row in rows])
