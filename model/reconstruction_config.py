"""Settings of the reconstruction module, checked before any work begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, check_rule, make_mask

from .attention import BACKENDS
from .losses import LOSSES
from .pooling import Pool

ON_LEAK = ("exclude", "raise", "allow")


@dataclass(frozen=True)
class ReconstructionConfig:
    """How `AutoregressiveReconstruction` predicts and what it is trained on.

    The first ten settings carry the names and defaults that existing configurations use; the sampling ones apply
    to plain video tensors only, since a loader's batch has been sampled already.

    Raises:
        ConfigError: an impossible value, by its name.
    """

    # Size of a patch embedding. It must be the tower's own; 1152 is SigLIP-so400m's.
    embedding_dim: int = 1152
    # Factor on the loss that comes out, so that it can be added to a language model's loss as it is.
    loss_weight: float = 0.1
    num_heads: int = 8
    num_layers: int = 3
    # False: tokens in raster order see every token before them, also in their own frame; the baseline without
    # frame masks.
    use_frame_causal_mask: bool = True
    # For plain video tensors: a dense recent and a sparse long stream, instead of all frames.
    use_fast_slow_frames: bool = False
    fast_stride: int = 1
    slow_stride: int = 4
    num_fast: int = 8
    num_slow: int = 8

    # "stride" lets `slow_stride` act and spreads over clips too short for it; "clip" always spreads over the clip.
    slow_coverage: str = "stride"
    # Name of a rule in `framestream.pipeline.masks`, or a function of a layout. None: what a batch brings, else
    # frame_causal, or time_causal with fast-slow frames, the two that show no frame its future.
    mask: str | Callable[..., FrameMask] | None = None
    # Frames that "sliding_window" shows, the frame itself included. Set it with that mask only.
    window_size: int | None = None
    # A frame sees of each stream only this many frames, itself included, on top of any mask. None: no limit.
    num_hist: int | None = None
    # What happens to targets that the mask lets their query see: out of the loss, an error, or into it.
    on_leak: str = "exclude"
    # Layer-normed embeddings as input and target: towers whose channels differ in scale by orders of magnitude
    # would otherwise train on the loudest channel alone. Off for pixels, so that predictions stay pictures.
    target_norm: bool = False
    # False: slow frames are seen, and what comes after them is no part of the loss. Their steps are wider than those of
    # fast frames, and a small model that has to learn both learns the fast ones less well.
    slow_targets: bool = True
    loss: str = "mse"
    # Frames that the model generates from its own output in training, added to the loss; 0: teacher-forced only.
    rollout_steps: int = 0
    # Spatial pooling of each stream: a factor, or "average:2", "max:2", "bilinear:2". None: as the tower gives it.
    slow_pool: str | int | None = None
    fast_pool: str | int | None = None
    # "auto", "ranges", "dense" or "flex", see `framestream.model.attention`.
    attention_backend: str = "auto"
    # Recompute blocks in the backward pass: a third more time for memory of one block instead of all.
    gradient_checkpointing: bool = False
    # Size inside the predictor; None: embedding_dim. Smaller for a cheap model of large embeddings.
    predictor_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_heads", "num_layers", "fast_stride", "slow_stride", "num_fast", "num_slow"):
            self._check_whole(name, 1)
        for name in ("num_hist", "window_size", "predictor_dim"):
            if getattr(self, name) is not None:
                self._check_whole(name, 1)
        self._check_whole("rollout_steps", 0)
        if isinstance(self.loss_weight, bool) or not isinstance(self.loss_weight, (int, float)):
            raise ConfigError(f"loss_weight must be a number, got {self.loss_weight!r}")
        if not 0 <= self.loss_weight < float("inf"):
            raise ConfigError(f"loss_weight must be finite and not negative, got {self.loss_weight!r}")
        for name in (
            "use_frame_causal_mask",
            "use_fast_slow_frames",
            "target_norm",
            "slow_targets",
            "gradient_checkpointing",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        self._check_choice("on_leak", ON_LEAK)
        self._check_choice("loss", tuple(LOSSES))
        self._check_choice("attention_backend", BACKENDS)
        self._check_choice("slow_coverage", ("clip", "stride"))
        if self.slow_coverage == "clip" and self.slow_stride != type(self).slow_stride:
            raise ConfigError(
                f"slow_stride={self.slow_stride} has no effect with slow_coverage='clip', which spreads the slow "
                "frames over the whole clip: use slow_coverage='stride'"
            )
        if self.mask is not None:
            check_rule(self.mask)
            if not self.use_frame_causal_mask:
                raise ConfigError(
                    f"mask={self.mask!r} contradicts use_frame_causal_mask=False, which stands for token order "
                    "instead of a frame mask: drop one of them"
                )
        if self.window_size is not None and self.mask != "sliding_window":
            raise ConfigError(
                f"window_size={self.window_size} acts with mask='sliding_window' only, and mask is {self.mask!r}: "
                "set that mask, or num_hist, which limits the history under any mask"
            )
        if not self.use_frame_causal_mask and self.attention_backend == "flex":
            raise ConfigError("use_frame_causal_mask=False needs attention_backend 'auto', 'ranges' or 'dense'")
        if not self.use_frame_causal_mask and self.num_hist is not None:
            raise ConfigError("num_hist limits frames, and use_frame_causal_mask=False has no frame mask to limit")
        for name in ("slow_pool", "fast_pool"):
            Pool.parse(getattr(self, name), name)

    @classmethod
    def make(cls, config: ReconstructionConfig | Mapping[str, Any] | str | Path | None) -> ReconstructionConfig:
        """From a config, a mapping, or the path of a YAML file that holds one.

        Raises:
            ConfigError: unknown keys, by name; a file that is missing or no mapping; impossible values.
        """
        if isinstance(config, ReconstructionConfig):
            return config
        if config is None:
            return cls()
        if isinstance(config, (str, Path)):
            config = _read_yaml(Path(config))
        if not isinstance(config, Mapping):
            raise ConfigError(
                f"a reconstruction config is a mapping, a ReconstructionConfig or a YAML path, "
                f"got {type(config).__name__}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [str(key) for key in config if key not in known]:
            raise ConfigError(
                f"unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)} in the reconstruction config; "
                f"known are {', '.join(known)}"
            )
        return cls(**config)

    def make_mask(self, layout: FrameLayout) -> FrameMask:
        """The mask that these settings stand for where a batch brings none; without `num_hist`."""
        if self.mask is not None:
            options = {} if self.window_size is None else {"window_size": self.window_size}
            return make_mask(self.mask, layout, **options)
        if not self.use_frame_causal_mask:
            return make_mask("frame_causal", layout)  # with token order inside each frame, see plan_attention
        both_streams = len({s for s, v in zip(layout.stream, layout.valid, strict=True) if v}) > 1
        return make_mask("time_causal" if both_streams else "frame_causal", layout)

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"cannot read the reconstruction config {path}: {err}") from err
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"the reconstruction config {path} is no YAML: {err}") from err
