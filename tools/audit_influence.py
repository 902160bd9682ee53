"""Which frame of a module's input reaches which frame of its output, for any module, and whether it may.

Two instruments. A perturbation changes one frame and compares all output frames bit by bit: what is equal was not
reached, whatever the code between. The gradient asks the same of the derivative, for all outputs in one backward pass
of F copies of the clip, of which copy i carries what frame i gives. What is measured must equal what is allowed: more
is a leak, less is a mask that hides what it should show, or a module that proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError, FramestreamError
from framestream.pipeline.frame_mask import FrameMask

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Influence:
    """Who reaches whom: bool `[F, F]` each, row = frame of the output, column = frame of the input.

    Attributes:
        allowed: what may be reached, through all layers.
        perturbed: outputs of which a bit changed with the input.
        gradient: outputs with a derivative that is not zero; None where it was not asked for.
    """

    allowed: Tensor
    perturbed: Tensor
    gradient: Tensor | None = None

    @property
    def measured(self) -> Tensor:
        """Reached by either instrument."""
        return self.perturbed if self.gradient is None else self.perturbed | self.gradient

    @property
    def leaks(self) -> list[tuple[int, int]]:
        """(input, output) pairs that are reached and must not be."""
        return [(j, i) for i, j in (self.measured & ~self.allowed).nonzero().tolist()]

    @property
    def silent(self) -> list[tuple[int, int]]:
        """(input, output) pairs that may be reached, and are not."""
        return [(j, i) for i, j in (self.allowed & ~self.measured).nonzero().tolist()]

    @property
    def proves_nothing(self) -> bool:
        """Other frames may be seen, and none is: a module that ignores its input is causal for no reason."""
        others = ~torch.eye(len(self.allowed), dtype=torch.bool)
        return bool((self.allowed & others).any() and not (self.measured & others).any())

    @property
    def causal(self) -> bool:
        """No leak, and something was reached at all."""
        return not self.leaks and not self.proves_nothing


def audit_module(
    forward: Forward,
    frames: Tensor,
    allowed: FrameMask | Tensor,
    *,
    num_layers: int = 1,
    gradient: bool = True,
    seed: int = 0,
) -> Influence:
    """Measure which input frame reaches which output frame of any module.

    The module has to give the same result for the same input: call its `eval()` first.

    Args:
        forward: the module, or a function around it: `[B, F, ...]` to `[B, F, ...]`, frames on the second axis of both,
            for any B. It must not change its input.
        frames: float `[B, F, ...]`.
        allowed: the mask of one layer, bool `[F, F]` with True = may attend, or a `FrameMask` without a batch axis.
        num_layers: layers that apply it: what may be reached is `(allowed | I)^num_layers`.
        gradient: also measure by gradient.
        seed: of the perturbation.

    Raises:
        ConfigError: shapes that do not belong together.
        FramestreamError: two runs on one input differ.

    Example:
        found = audit_module(lambda x: model(x).predictions, clips, mask, num_layers=6)
        assert found.causal, found.leaks
    """
    count = frames.shape[1] if frames.dim() > 1 else 0
    mask = allowed if isinstance(allowed, FrameMask) else FrameMask.from_matrix(allowed, 1)
    if mask.clips is not None or mask.num_frames != count or not frames.is_floating_point():
        raise ConfigError(
            f"an audit needs float frames [B, F, ...] and a mask [F, F]; got {frames.dtype} {list(frames.shape)} "
            f"and a mask {list(mask.shape)}."
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        calm = repeatable(lambda: forward(frames))
        if calm.shape[:2] != frames.shape[:2]:
            raise ConfigError(f"frames {list(frames.shape)} gave {list(calm.shape)}; the first two axes must agree.")
        columns = []
        for j in range(count):
            pushed = frames.clone()
            noise = torch.randn(frames[:, j].shape, generator=generator)
            pushed[:, j] += noise.to(frames.device, frames.dtype)
            columns.append(changed(calm, forward(pushed)).any(0))
    by_gradient = gradient_influence(forward, frames[0], seed=seed) if gradient else None
    return Influence(mask.reach(num_layers).matrix(), torch.stack(columns, dim=1), by_gradient)


def gradient_influence(forward: Forward, clip: Tensor, *, seed: int = 0) -> Tensor:
    """bool `[F, F]` (output, input) from one backward pass: copy i of the clip carries a projection of its frame i.

    Args:
        forward: as for `audit_module`; called with F copies of the clip.
        clip: float `[F, ...]`.
        seed: of the projection.
    """
    count = len(clip)
    with torch.enable_grad():
        copies = clip.detach().expand(count, *clip.shape).clone().requires_grad_()
        out = forward(copies)
        own = out[torch.arange(count), torch.arange(count)]
        weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)).to(own)
        if not own.requires_grad:
            return torch.zeros(count, count, dtype=torch.bool)
        (found,) = torch.autograd.grad((own * weights).sum(), copies, allow_unused=True)
    if found is None:
        return torch.zeros(count, count, dtype=torch.bool)
    return (found != 0).flatten(2).any(-1).cpu()


def repeatable(run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives, twice the same.

    Raises:
        FramestreamError: it gives two results, so that no comparison could prove anything.
    """
    first = run()
    if changed(first, run()).any():
        raise FramestreamError(
            "two runs on the same input give different results, so that no comparison proves anything: put the module "
            "in eval mode, and use deterministic kernels (torch.use_deterministic_algorithms)."
        )
    return first


def changed(calm: Tensor, other: Tensor) -> Tensor:
    """bool `[B, F]` on the CPU: does any bit of `[B, F, ...]` differ? NaN equals NaN."""
    a, b = (x.detach().cpu().contiguous()[..., None].view(torch.uint8).flatten(2) for x in (calm, other))
    return (a != b).any(-1)
