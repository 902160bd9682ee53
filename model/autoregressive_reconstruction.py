"""The module that learns to predict the next frame's patch embeddings: what it sees, what it is scored on, its loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framestream.pipeline.errors import ConfigError, LeakError
from framestream.pipeline.layout import next_frame_targets
from framestream.pipeline.masks import FrameMask, leaking_targets
from framestream.pipeline.sampling import FAST, DenseSampling, FastSlowSampling, Sampling

from .attention import AttentionPlan
from .clips import PreparedClips, frames_at, layouts_of, unique_frames
from .geometry import squarest_grid
from .mask_choice import choose_mask
from .pooling import Pool, StreamPools
from .predictor import FramePredictor
from .reconstruction_config import ReconstructionConfig
from .reconstruction_output import ReconstructionOutput
from .towers import FrozenTower

if TYPE_CHECKING:
    from typing_extensions import Self

    from .feature_cache import FeatureCache
    from .generation import FrameGenerator
    from .rollout import RolloutOutput

__all__ = [
    "AutoregressiveReconstruction",
    "PreparedClips",
    "ReconstructionConfig",
    "ReconstructionOutput",
    "create_autoregressive_reconstruction_module",
]


class AutoregressiveReconstruction(nn.Module):
    """Predicts, at every frame of a clip, the patch embeddings of the next frame of its stream.

    A frozen tower turns frames into patch embeddings, which are input and target at once; a `FramePredictor` under a
    frame mask predicts; the mean error over all targets that no query can see is the loss. The hidden states of a
    host model may condition the prediction, and receive gradients.

    Args:
        vision_tower: any module that gives patch embeddings, see `framestream.model.towers`. It is frozen in place.
        hidden_size: channels of the host's hidden states.
        config: settings; a mapping or the path of a YAML file is read as one.

    Attributes:
        batches_without_target: how many batches had nothing to learn from (too short, or all targets leak).
        hidden_size: channels of the host's hidden states.
        feature_cache: a `FeatureCache` in which the tower's embeddings are kept, or None, the default.

    Raises:
        ConfigError: impossible settings, or an `embedding_dim` that is not the tower's.
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        hidden_size: int,
        config: ReconstructionConfig | Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config = ReconstructionConfig.make(config)
        self.tower = FrozenTower(vision_tower)
        if self.tower.tower.dim is not None:
            self._check_dim(self.tower.tower.dim)
        self.pools = StreamPools(Pool.parse(config.slow_pool), Pool.parse(config.fast_pool))
        self.predictor = FramePredictor(
            config.embedding_dim,
            config.num_heads,
            config.num_layers,
            context_dim=hidden_size,
            width=config.predictor_dim,
            gradient_checkpointing=config.gradient_checkpointing,
            attention_backend=config.attention_backend,
        )
        self.hidden_size = hidden_size
        self.batches_without_target = 0
        self.feature_cache: FeatureCache | None = None
        self._warned_of_leaks = False

    def forward(
        self,
        batch: Mapping[str, Any],
        hidden_states: Tensor | None = None,
        hidden_time: Tensor | None = None,
    ) -> ReconstructionOutput:
        """Scores the prediction of every frame of a loader batch.

        Args:
            batch: `video_frames [B, F, 3, H, W]` (uint8, scaled to 0..1, or float as the tower wants it);
                `frame_index`, `frame_time`, `frame_stream`, `frame_valid` (each `[B, F]`); its `frame_mask`, where
                there, decides. With `frame_clip [B, F]` several clips share a sequence (`ClipCollator(pack_to=…)`),
                and B counts sequences; there is no rollout of these.
            hidden_states: `[B, S, hidden_size]` states of a host model. For packed batches `[K, S, hidden_size]`, a row
                for each of the K clips that `frame_clip` counts, and no clip reads the states of another.
            hidden_time: `[B, S]` or `[K, S]` seconds, when each state had last seen a frame: no frame reads a later
                one. None: all states are context given beforehand.

        Raises:
            ConfigError: keys missing or of wrong shape; settings that contradict the batch's mask or patches.
            LeakError: a target is visible and `on_leak="raise"`.
        """
        clips = self.prepare(batch)
        self._report_leaks(clips.leaking)
        predictions = clips.unpack(self.predict(clips, hidden_states, hidden_time))
        truth = frames_at(clips.embeddings, clips.targets)
        error = clips.frame_error(predictions, truth, self.config.loss)
        copied = clips.frame_error(clips.embeddings, truth, self.config.loss)
        loss = torch.where(clips.scored, error, 0).sum() / max(clips.num_scored, 1)
        if clips.num_scored == 0:
            self.batches_without_target += 1
        if self.config.rollout_steps and self.training:
            loss = loss + self._rollout_loss(clips, hidden_states, hidden_time)
        return ReconstructionOutput(
            loss=loss * self.config.loss_weight,
            frame_error=torch.where(clips.scored, error, torch.nan),
            copy_last_error=torch.where(clips.scored, copied, torch.nan),
            leaking_targets=clips.leaking,
            targets=clips.num_scored,
            predictions=predictions,
        )

    def compute_autoregressive_loss(
        self,
        hidden_states: Tensor | None,
        video_frames: Tensor,
        *,
        hidden_time: Tensor | None = None,
        frame_time: Tensor | None = None,
        fps: float = 30.0,
    ) -> Tensor:
        """The loss for plain tensors, to be added to a host model's own.

        With `use_fast_slow_frames` the sampling settings choose the frames, else all frames are taken.

        Args:
            hidden_states: `[B, S, hidden_size]`, or None.
            video_frames: `[B, T, 3, H, W]`, uint8 (scaled to 0..1) or float as the tower wants it.
            hidden_time: `[B, S]` seconds, see `forward`.
            frame_time: `[T]` or `[B, T]` seconds of all frames; None: regular, at `fps`.
            fps: frames per second where `frame_time` is None.

        Returns:
            A scalar, already times `loss_weight`, with gradients to the predictor and to `hidden_states`.

        Raises:
            ConfigError: no video, a wrong shape, or impossible times.
        """
        _check_video(video_frames)
        batch_size, length = video_frames.shape[:2]
        plan = self._sampling(length).plan(length)
        chosen = torch.from_numpy(plan.frame_index).to(video_frames.device)
        if frame_time is None:
            if not 0 < fps < float("inf"):
                raise ConfigError(f"fps must be positive, got {fps!r}")
            frame_time = torch.arange(length, device=video_frames.device) / fps
        if frame_time.shape not in ((length,), (batch_size, length)):
            raise ConfigError(
                f"frame_time must be [{length}] or [{batch_size}, {length}] for video_frames of "
                f"{list(video_frames.shape)}, got {list(frame_time.shape)}"
            )
        batch = {
            "video_frames": video_frames[:, chosen],
            "frame_index": chosen.expand(batch_size, -1),
            "frame_time": frame_time.expand(batch_size, length)[:, chosen],
            "frame_stream": torch.from_numpy(plan.stream).to(chosen.device).expand(batch_size, -1),
            "frame_valid": torch.from_numpy(plan.valid).to(chosen.device).expand(batch_size, -1),
        }
        return self(batch, hidden_states, hidden_time).loss

    def encode(
        self,
        frames: Tensor,
        frame_index: Tensor | None = None,
        frame_valid: Tensor | None = None,
        frame_clip: Tensor | None = None,
    ) -> Tensor:
        """Patch embeddings of the frozen tower: `[B, F, 3, H, W]` to float32 `[B, F, P, D]`, detached.

        Args:
            frames: uint8 or float.
            frame_index: `[B, F]`; frames of one clip with equal index are encoded once.
            frame_valid: bool `[B, F]`, with an index; what is not valid is not encoded, and gets some other embedding.
            frame_clip: `[B, F]`, with an index: which clip of a packed sequence a frame belongs to.

        Raises:
            ConfigError: the tower's embeddings have another size than `embedding_dim`.
        """
        _check_video(frames)
        flat = frames.flatten(0, 1)
        if frame_index is None:
            embedded = self._embed(flat)
        else:
            first, source = unique_frames(frame_index, frame_valid, frame_clip)
            embedded = self._embed(flat if len(first) == len(flat) else flat[first.to(flat.device)])
            if len(first) != len(flat):
                embedded = embedded[source.to(embedded.device)]
        self._check_dim(embedded.shape[-1])
        return embedded.unflatten(0, frames.shape[:2])

    def _embed(self, frames: Tensor) -> Tensor:
        return self.tower(frames) if self.feature_cache is None else self.feature_cache.encode(self.tower, frames)

    def prepare(self, batch: Mapping[str, Any]) -> PreparedClips:
        """Embeds a batch and decides mask and targets; see `forward` for its keys and errors."""
        frames = _check_video(batch.get("video_frames"))
        shape = tuple(frames.shape[:2])
        deciding = ("frame_index", "frame_stream", "frame_valid", *(("frame_clip",) if "frame_clip" in batch else ()))
        for key in (*deciding, "frame_time"):
            value = batch.get(key)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"the batch's {key} must be a tensor of {list(shape)} like its frames, got {got}")
        # One transfer from the device for everything that decides about frames.
        facts = torch.stack([batch[key].long() for key in deciding]).cpu()
        clip = facts[3] if len(facts) > 3 else None
        embedded = self.encode(frames, facts[0], facts[2].bool(), clip)
        grid = self.tower.tower.grid or squarest_grid(embedded.shape[2])
        stream = batch["frame_stream"].to(embedded.device).long()
        embeddings, patches, grids = self.pools(embedded, stream, grid)
        if self.config.target_norm:
            embeddings = F.layer_norm(embeddings, embeddings.shape[-1:])
        # Whatever stands in padding, NaN even, reaches nothing.
        embeddings = embeddings.masked_fill(~batch["frame_valid"].to(embeddings.device).bool()[:, :, None, None], 0)
        layouts = layouts_of(facts, patches, batch.get("frame_mask"))
        mask = choose_mask(self.config, batch.get("frame_mask"), layouts)
        targets = torch.tensor([next_frame_targets(layout) for layout in layouts])
        leaks = torch.tensor(
            [leaking_targets(layout, mask[i], self.config.num_layers) for i, layout in enumerate(layouts)]
        )
        scored = targets >= 0 if self.config.on_leak == "allow" else (targets >= 0) & ~leaks
        if not self.config.slow_targets:
            scored &= facts[1] == FAST
        device = embeddings.device
        return PreparedClips(
            embeddings=embeddings,
            layouts=layouts,
            mask=mask,
            time=batch["frame_time"].to(device),
            stream=stream,
            targets=targets.clamp(min=0).to(device, non_blocking=True),
            has_target=(targets >= 0).to(device, non_blocking=True),
            scored=scored.to(device, non_blocking=True),
            leaking=int(leaks.sum()),
            num_scored=int(scored.sum()),
            grids=grids,
            clip=None if clip is None else clip.to(device, non_blocking=True),
        )

    def predict(
        self, clips: PreparedClips, hidden_states: Tensor | None = None, hidden_time: Tensor | None = None
    ) -> Tensor:
        """The predictor's parallel pass: `[B, N, D]`."""
        tokens, own = clips.pack(), None
        if clips.clip is not None and hidden_states is not None:
            hidden_states, hidden_time, own = clips.spread_states(hidden_states, hidden_time)
        predicted, _ = self.predictor(
            tokens,
            clips.geometry(),
            self.plan(clips.mask, tokens),
            hidden_states,
            hidden_time,
            hidden_allowed=own,
            time_origin=clips.time_origin(),
            keep_cache=False,
        )
        return predicted

    def plan(self, mask: FrameMask, tokens: Tensor) -> AttentionPlan:
        """The attention that these settings make of a mask."""
        return self.predictor.plan(mask, tokens, token_causal=not self.config.use_frame_causal_mask)

    def rollout(
        self,
        batch: Mapping[str, Any],
        steps: int,
        *,
        hidden_states: Tensor | None = None,
        hidden_time: Tensor | None = None,
    ) -> RolloutOutput:
        """See `framestream.model.rollout.rollout`."""
        from .rollout import rollout

        return rollout(self, batch, steps, hidden_states=hidden_states, hidden_time=hidden_time)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write settings and weights, without the tower; see `framestream.model.pretrained.save_pretrained`."""
        from .pretrained import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, vision_tower: nn.Module) -> Self:
        """A module in eval mode from such a folder; see `framestream.model.pretrained.from_pretrained`."""
        from .pretrained import from_pretrained

        return from_pretrained(cls, folder, vision_tower)

    def generate_frames(self, batch: Mapping[str, Any], steps: int | None = None, **options: Any) -> FrameGenerator:
        """See `framestream.model.generation.generate_frames`."""
        from .generation import generate_frames

        return generate_frames(self, batch, steps, **options)

    def _rollout_loss(self, clips: PreparedClips, hidden_states: Tensor | None, hidden_time: Tensor | None) -> Tensor:
        from .rollout import generate, longest_rollout

        if longest_rollout(clips) < self.config.rollout_steps:
            return clips.embeddings.new_zeros(())
        free = generate(self, clips, self.config.rollout_steps, hidden_states, hidden_time)
        there = torch.isfinite(free.copy_last_error)  # NaN for clips too short to roll out
        return torch.where(there, free.frame_error, 0).sum() / there.sum().clamp(min=1)

    def _sampling(self, length: int) -> Sampling:
        c = self.config
        if not c.use_fast_slow_frames:
            return DenseSampling(length)
        return FastSlowSampling(
            c.num_fast,
            c.num_slow,
            c.fast_stride,
            c.slow_stride,
            slow_coverage=c.slow_coverage,  # type: ignore[arg-type]
        )

    def _report_leaks(self, leaking: int) -> None:
        if not leaking:
            return
        if self.config.on_leak == "raise":
            raise LeakError(
                f"{leaking} targets of this batch are visible to the frames that predict them: use the mask "
                "time_causal, or on_leak='exclude'"
            )
        if not self._warned_of_leaks:
            self._warned_of_leaks = True
            fate = "left out of the loss" if self.config.on_leak == "exclude" else "kept in the loss (on_leak='allow')"
            warnings.warn(
                f"{leaking} targets of this batch are visible to the frames that predict them, and are {fate}: such a "
                "prediction is a copy. The mask time_causal shows no frame its future. (Said once.)",
                stacklevel=3,
            )

    def _check_dim(self, dim: int) -> None:
        if dim != self.config.embedding_dim:
            raise ConfigError(
                f"embedding_dim is {self.config.embedding_dim}, and the vision tower's patch embeddings have {dim} "
                f"channels: set embedding_dim: {dim}"
            )


def create_autoregressive_reconstruction_module(
    vision_tower: nn.Module,
    hidden_size: int,
    config: ReconstructionConfig | Mapping[str, Any] | str | Path | None = None,
) -> AutoregressiveReconstruction:
    """The module for a tower, a host's hidden size and settings (config, mapping or YAML path)."""
    return AutoregressiveReconstruction(vision_tower, hidden_size, config)


def _check_video(video: Any) -> Tensor:
    if not isinstance(video, Tensor):
        raise ConfigError(
            f"video_frames must be a tensor [B, T, 3, H, W], got {type(video).__name__}: leave batches without video "
            "out of this loss, nothing is made up for them"
        )
    if video.dim() != 5 or video.shape[2] != 3 or 0 in video.shape:
        raise ConfigError(f"video_frames must be [B, T, 3, H, W] and not empty, got {list(video.shape)}")
    return video
