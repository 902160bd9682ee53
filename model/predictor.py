"""The transformer that predicts, at every frame, the embedding of the next frame of its stream."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.masks import FrameMask

from .attention import AttentionPlan, choose_backend, frame_attention, plan_attention
from .geometry import Geometry
from .recompute import recomputed

# Angular frequencies of the rotary axes, highest and lowest. Time in radians per second: neighbouring frames at
# 30 Hz lie 0.4 rad apart, and the slowest turn takes a minute. Space in radians per 1/16 of the image.
TIME_BAND = (4 * math.pi, 2 * math.pi / 60)
SPACE_BAND = (1.0, 1.0 / 64)

# Tokens that the MLP takes at once, on the CPU and on a GPU, which needs more to be busy.
MLP_TOKENS = (1024, 16384)

KeyValue = tuple[Tensor, Tensor]
# Neighbouring clips whose new keys go to one place: (first clip, one past the last clip, first token of the place).
Place = tuple[int, int, int]


class LayerCache(NamedTuple):
    """Keys and values of one block: of the frames so far, and of the context (which does not grow)."""

    frames: KeyValue  # each [B, H, N, Dh]; N is the room that there is, where new frames are written in place
    context: KeyValue  # each [B, H, S + 1, Dh]


class Context(NamedTuple):
    """Host states beside the frames."""

    states: Tensor  # [B, S + 1, D], the null state first
    allowed: Tensor | None  # bool [B, F, S + 1]; None: every frame may read every state


class FramePredictor(nn.Module):
    """Pre-norm transformer over the patches of frames: masked self-attention, cross-attention, MLP.

    What it predicts is the current frame, with a share of each channel that fades and something else that appears:
    `x + fade * x + appear`, as the update of a gated recurrent unit (Cho et al. 2014) without squashing. The share
    matters because detail that moves is best predicted by letting go of it, in proportion to how strong it is, and
    the norm before the last layer has forgotten how strong that was. Both parts start at zero, so that the untrained
    model repeats every frame: exactly the baseline that it has to beat. Rotary positions (Su et al. 2021) run over
    three axes, seconds, patch row and patch column, and depend on differences only. All parameters take part in
    every forward pass, also without host states, because one learned null state is always there.

    Args:
        embedding_dim: D, size of a patch embedding, in and out.
        num_heads: attention heads; `width / num_heads` must be an even number, at least 6.
        num_layers: blocks.
        context_dim: size of the host's hidden states.
        width: size inside the blocks; None = `embedding_dim`.
        mlp_ratio: hidden size of the MLP by `width`.
        gradient_checkpointing: recompute each block in the backward pass.
        attention_backend: see `frame_attention`.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 8,
        num_layers: int = 3,
        *,
        context_dim: int,
        width: int | None = None,
        mlp_ratio: float = 4.0,
        gradient_checkpointing: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        width = embedding_dim if width is None else width
        head_dim, rest = divmod(width, num_heads)
        if rest or head_dim % 2 or head_dim < 6:
            raise ConfigError(
                f"a predictor of width {width} with {num_heads} heads has {width / num_heads:g} channels for each "
                "head: rotary positions over time, row and column need an even number of at least 6"
            )
        self.head_dim = head_dim
        self.num_layers = num_layers
        self.gradient_checkpointing = gradient_checkpointing
        self.attention_backend = attention_backend
        self.embed = nn.Linear(embedding_dim, width)
        self.stream_embedding = nn.Embedding(2, width)
        self.null_state = nn.Parameter(torch.randn(1, 1, context_dim) * 0.02)
        self.context_norm = nn.LayerNorm(context_dim)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, context_dim, int(width * mlp_ratio)) for _ in range(num_layers)
        )
        self.step_embedding = StepEmbedding(width)
        self.norm = nn.LayerNorm(width)
        self.appear = nn.Linear(width, embedding_dim)
        self.fade = nn.Linear(width, embedding_dim)
        nn.init.normal_(self.stream_embedding.weight, std=0.02)
        for head in (self.appear, self.fade):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self,
        tokens: Tensor,
        geometry: Geometry,
        mask: FrameMask | AttentionPlan,
        hidden_states: Tensor | None = None,
        hidden_time: Tensor | None = None,
        *,
        hidden_allowed: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        places: tuple[Place, ...] | None = None,
        time_origin: Tensor | None = None,
        keep_cache: bool = True,
    ) -> tuple[Tensor, list[LayerCache]]:
        """Predicts the next frame at every frame.

        Args:
            tokens: `[B, N, D]` patch embeddings, frame after frame.
            geometry: where they stand; of the new frames only, with a cache.
            mask: who sees whom, or the plan made from it.
            hidden_states: `[B, S, context_dim]` states of a host model.
            hidden_time: `[B, S]` seconds: when each state had last seen a frame. A frame reads the states whose
                time is not after its own; infinite marks padding. None: all are context given beforehand.
            hidden_allowed: bool `[B, F, S]`, which states a frame may read, as far as `hidden_time` lets it. None: all.
            cache: what earlier calls returned: their keys come before those of `tokens`, and `mask` must be a
                plan over all of them. The context is that of the first call.
            places: where in the cache's own tensors the keys of `tokens` are written, instead of behind all others in
                new ones. Not differentiable; see `framestream.model.kv_cache`.
            time_origin: `[B, 1]` seconds, or `[B, F]` for clips that share a sequence: what rotary time counts from;
                the earliest frame by default. Calls that share a cache must share it.
            keep_cache: False returns an empty cache, and with `gradient_checkpointing` frees keys and values at once.

        Returns:
            `[B, N, D]` predictions, and the cache with these tokens added.

        Raises:
            ConfigError: hidden states of a wrong shape; times without states.
        """
        plan = mask if isinstance(mask, AttentionPlan) else self.plan(mask, tokens)
        context = self._context(tokens, geometry, hidden_states, hidden_time, hidden_allowed)
        rotary = _rotary_table(geometry, self.head_dim, time_origin)
        x = self.embed(tokens.to(self.embed.weight.dtype))
        x = x + geometry.spread(self.stream_embedding(geometry.stream)).to(x.dtype)
        grown: list[LayerCache] = []
        for i, block in enumerate(self.blocks):
            past = None if cache is None else cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, kept = checkpoint(
                    block, x, rotary, plan, context, geometry.patches, past, places, use_reentrant=False
                )
            else:
                x, kept = block(x, rotary, plan, context, geometry.patches, past, places)
            if keep_cache:
                grown.append(kept)
            del kept  # before the next block is at work
        x = x + geometry.spread(self.step_embedding(geometry.step)).to(x.dtype)
        x = self.norm(x)
        return tokens + self.fade(x) * tokens + self.appear(x), grown

    def plan(self, mask: FrameMask, tokens: Tensor, *, token_causal: bool = False) -> AttentionPlan:
        """The attention plan of `mask` for a batch like `tokens [B, N, D]`."""
        backend = self.attention_backend
        if token_causal and backend == "auto":
            backend = "ranges"
        backend = choose_backend(backend, tokens.device, self.head_dim, tokens.dtype)
        return plan_attention(mask, tokens.shape[0], tokens.device, backend, token_causal=token_causal)

    def _context(
        self,
        tokens: Tensor,
        geometry: Geometry,
        hidden_states: Tensor | None,
        hidden_time: Tensor | None,
        allowed: Tensor | None,
    ) -> Context:
        batch = tokens.shape[0]
        null = self.null_state.expand(batch, -1, -1)
        if hidden_states is None:
            if hidden_time is not None:
                raise ConfigError("hidden_time was given without hidden_states")
            return Context(self.context_norm(null), None)
        size = self.null_state.shape[-1]
        if hidden_states.dim() != 3 or hidden_states.shape[0] != batch or hidden_states.shape[2] != size:
            raise ConfigError(
                f"hidden_states must be [{batch}, S, {size}] (batch, states, hidden_size), "
                f"got {list(hidden_states.shape)}"
            )
        states = self.context_norm(torch.cat([null, hidden_states.to(null.dtype)], dim=1))
        if hidden_time is None:
            return Context(states, None if allowed is None else F.pad(allowed, (1, 0), value=True))
        if hidden_time.shape != hidden_states.shape[:2]:
            raise ConfigError(
                f"hidden_time must be {list(hidden_states.shape[:2])}, a time for each state, "
                f"got {list(hidden_time.shape)}"
            )
        # Both rounded to float32, so that a state of the very time of a frame compares equal whoever computed it.
        when = hidden_time.to(geometry.time.device).float()
        seen = when[:, None, :] <= geometry.time.float()[:, :, None]
        return Context(states, F.pad(seen if allowed is None else seen & allowed, (1, 0), value=True))


class Block(nn.Module):
    """Self-attention over frames, cross-attention to the context, MLP; each normed before and added after."""

    def __init__(self, width: int, num_heads: int, context_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_self = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_self = nn.Linear(width, width)
        self.norm_cross = nn.LayerNorm(width)
        self.q_cross = nn.Linear(width, width)
        self.kv_cross = nn.Linear(context_dim, 2 * width)
        self.out_cross = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, width))

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        plan: AttentionPlan,
        context: Context,
        patches: tuple[tuple[int, ...], ...],
        past: LayerCache | None,
        places: tuple[Place, ...] | None,
    ) -> tuple[Tensor, LayerCache]:
        """x `[B, N, W]` -> the same, and this block's keys and values."""
        q, k, v = recomputed(self.norm_self, self.qkv, x).chunk(3, dim=-1)
        v = self._heads(v.contiguous())  # a view would keep the other two thirds until the backward pass
        q, k = (_rotate(self._heads(part), rotary).to(v.dtype) for part in (q, k))
        if past is not None:
            k, v = _remember(past.frames[0], k, places), _remember(past.frames[1], v, places)
        x = x + self.out_self(self._merge(frame_attention(q, k, v, plan)))
        if past is None:
            ck, cv = (self._heads(part) for part in self.kv_cross(context.states).chunk(2, dim=-1))
        else:
            ck, cv = past.context
        if ck.shape[2] == 1:
            # The null state alone: whatever the query, all attention is on it, so one query serves every token.
            cq = self._heads(self.q_cross(self.norm_cross(torch.zeros_like(x[:, :1]))))
            x = x + self.out_cross(self._merge(F.scaled_dot_product_attention(cq, ck, cv)))
        else:
            cq = self._heads(recomputed(self.norm_cross, self.q_cross, x))
            x = x + self.out_cross(self._merge(_read_context(cq, ck, cv, context.allowed, patches)))
        x = x + self._mlp(x)
        return x, LayerCache((k, v), (ck, cv))

    def _mlp(self, x: Tensor) -> Tensor:
        # Part by part, because the backward pass has three tensors of the hidden size at a time.
        most = x.numel() if torch.compiler.is_compiling() else MLP_TOKENS[x.device.type == "cuda"]
        parts = []
        for part in x.flatten(0, 1).split(most):
            hidden = recomputed(self.norm_mlp, self.mlp[0], part)
            parts.append(recomputed(self.mlp[1], self.mlp[2], hidden))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, W] -> [B, H, N, Dh]

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # [B, H, N, Dh] -> [B, N, W]


def _remember(past: Tensor, new: Tensor, places: tuple[Place, ...] | None) -> Tensor:
    """`[B, H, N, Dh]` keys or values with the new ones behind them, or written into their places."""
    if places is None:
        return torch.cat([past, new], dim=2)
    for first, last, start in places:
        past[first:last, :, start : start + new.shape[2]] = new[first:last]
    return past


class StepEmbedding(nn.Module):
    """Seconds to the target -> `[B, F, W]`. Sines over the time band, and the logarithm for long steps."""

    features = 16

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * self.features + 1, width)

    def forward(self, step: Tensor) -> Tensor:
        angle = step[..., None].float() * _frequencies(self.features, TIME_BAND, step.device)
        parts = [angle.sin(), angle.cos(), step[..., None].float().clamp(min=0).log1p()]
        return self.project(torch.cat(parts, dim=-1).to(self.project.weight.dtype))


def _frequencies(count: int, band: tuple[float, float], device: torch.device) -> Tensor:
    """`count` frequencies from the highest of the band to its lowest, evenly spaced in ratio."""
    high, low = math.log(band[0]), math.log(band[1])
    return torch.linspace(high, low, count, dtype=torch.float32, device=device).exp()


def _rotary_table(geometry: Geometry, head_dim: int, origin: Tensor | None) -> Tensor:
    """cos and sin of each token's angles, float32 `[2, B, 1, N, head_dim / 2]`; made once for all layers."""
    pairs = head_dim // 2
    space = pairs // 3
    if origin is None:
        origin = geometry.time.amin(dim=1, keepdim=True)
    device = geometry.time.device
    # The difference is taken before rounding to float32, so that a late clip is as exact as an early one.
    seconds = geometry.time - origin
    exact = seconds.dtype == torch.float64
    turns = (seconds if exact else seconds.float())[..., None] * _frequencies(pairs - 2 * space, TIME_BAND, device)
    if exact:  # full turns are taken off before rounding too: an hour into a generation they are what would be rounded
        turns = turns.remainder(2 * math.pi).float()
    angles = torch.cat(
        [
            geometry.spread(turns),
            geometry.row[..., None] * _frequencies(space, SPACE_BAND, device),
            geometry.column[..., None] * _frequencies(space, SPACE_BAND, device),
        ],
        dim=-1,
    )
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    cos, sin = rotary[0], rotary[1]
    a, b = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _read_context(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, patches: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Cross-attention `[B, H, N, Dh]`; frame by frame where states are hidden, so that no `[N, S]` mask exists."""
    if allowed is None:
        return F.scaled_dot_product_attention(q, k, v)
    clips = [slice(None)] if len(patches) == 1 else [slice(i, i + 1) for i in range(len(patches))]
    outs = []
    for clip, counts in zip(clips, patches, strict=True):
        parts = [
            F.scaled_dot_product_attention(part, k[clip], v[clip], attn_mask=allowed[clip, f][:, None, None, :])
            for f, part in enumerate(q[clip].split(counts, dim=2))
        ]
        outs.append(torch.cat(parts, dim=2))
    return torch.cat(outs, dim=0)
