"""What a training step costs, by formula: operations, parameters and bytes (pure; `bench_scaling` holds them to it).

Operations are counted as torch's `FlopCounterMode` does: a product of `[a, b]` and `[b, c]` is `2 a b c`, sums, norms
and activations are nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from framestream.model.predictor import MLP_TOKENS, StepEmbedding
from framestream.pipeline.errors import ConfigError

FLOAT = 4  # bytes of a number in float32: weights, gradients, optimiser state, the residual stream, attention's sums


class StepFlops(NamedTuple):
    """Floating-point operations of one training step.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, without what it computes again.
        recomputed: what gradient checkpointing computes a second time.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True)
class StepSize:
    """The sizes that decide what a training step of the predictor costs.

    Attributes:
        clips: B, clips of a step on one device.
        frames: F, frames of a clip.
        patches: P, tokens of a frame.
        embedding_dim: D, channels of the tower.
        width: W, channels inside the predictor (`predictor_dim`).
        layers: L, blocks.
        heads: H, attention heads.
        mlp_ratio: hidden size of the MLP by W.
        density: share of token pairs that may attend (`FrameMask.density`); None = frame-causal, `(F + 1) / 2F`.
        context_dim: C, channels of the host's hidden states.
        states: S, hidden states of each clip; 0 = none.
        gradient_checkpointing: blocks are computed again in the backward pass.
        product_bytes: bytes of a number that a matrix product gives: 4 in float32, 2 under bf16 autocast.
        mlp_tokens: tokens that the MLP takes at once; the predictor's own limit on a CPU by default.

    Raises:
        ConfigError: a size that cannot be.
    """

    clips: int
    frames: int
    patches: int
    embedding_dim: int
    width: int
    layers: int = 3
    heads: int = 8
    mlp_ratio: float = 4.0
    density: float | None = None
    context_dim: int = 32
    states: int = 0
    gradient_checkpointing: bool = False
    product_bytes: int = 4
    mlp_tokens: int = MLP_TOKENS[0]

    def __post_init__(self) -> None:
        least = dict.fromkeys(("clips", "frames", "patches", "embedding_dim", "width", "layers", "heads"), 1)
        least |= {"context_dim": 1, "mlp_tokens": 1, "states": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} is {getattr(self, name)}, it has to be at least {smallest}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density:g}; it is a share of token pairs, above 0 and at most 1.")
        if self.product_bytes not in (2, 4):
            raise ConfigError(f"product_bytes is {self.product_bytes}; it has to be 4 (float32) or 2 (bf16).")

    @property
    def tokens(self) -> int:
        """Tokens of a step, `B F P`."""
        return self.clips * self.frames * self.patches

    @property
    def mlp_dim(self) -> int:
        """M, hidden size of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def share(self) -> float:
        """Share of token pairs that may attend."""
        return (self.frames + 1) / (2 * self.frames) if self.density is None else self.density

    def parameters(self) -> int:
        """Trained numbers: all but the tower's."""
        d, w, m, c = self.embedding_dim, self.width, self.mlp_dim, self.context_dim
        block = 6 * w + 6 * (w * w + w) + (c + 1) * 2 * w + (w + 1) * m + (m + 1) * w  # norms, 6 of W x W, kv, MLP
        ends = (d + 1) * w + 2 * (w + 1) * d + 2 * w  # embedding, two heads, the norm before them
        small = 2 * w + 3 * c + (2 * StepEmbedding.features + 2) * w  # streams, null state and its norm, step
        return self.layers * block + ends + small

    def state_bytes(self) -> int:
        """Weights, gradients and AdamW's two averages, in float32: 16 bytes a parameter."""
        return 4 * FLOAT * self.parameters()

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint on disk: weights and AdamW's averages, in float32 (and some kilobytes of text)."""
        return 3 * FLOAT * self.parameters()

    def flops(self) -> StepFlops:
        """Of the predictor; the tower's are `tower_flops`."""
        n, b, d, w, s = self.tokens, self.clips, self.embedding_dim, self.width, self.states
        pairs = round(b * (self.frames * self.patches) ** 2 * self.share)
        mlp = 4 * n * w * self.mlp_dim
        # Alone, the null state is read with one query a clip; with states every token has its own.
        readers = n if s else b
        linear = 8 * n * w * w + 4 * readers * w * w + 4 * b * (s + 1) * self.context_dim * w + mlp
        # Forward Q K^T and A V; backward the scores once more and four products.
        attention = 4 * w * (pairs + readers * (s + 1))
        block = linear + attention
        embed, heads = 2 * n * d * w, 4 * n * d * w
        step = 2 * b * self.frames * (2 * StepEmbedding.features + 1) * w
        # Twice the forward pass, for inputs and weights; embeddings and times want no gradient.
        backward = self.layers * (2 * linear + 5 * attention // 2) + embed + 2 * heads + step
        again = 0
        if self.gradient_checkpointing:
            # Recomputation stops when all is there that the backward pass asks for: before the MLP's last product.
            last = n - (n - 1) // self.mlp_tokens * self.mlp_tokens
            again = self.layers * (block - 2 * last * w * self.mlp_dim)
        return StepFlops(self.layers * block + embed + heads + step, backward, again)

    def kept_per_block(self) -> int:
        """Bytes that one block keeps from its forward to its backward pass, without checkpointing.

        The stream before attention and before the MLP; rotated queries and keys, values, attention's output and
        softmax sums; the MLP's hidden layer. With states also the stream, the queries and the output of reading them.
        """
        n, w, s, number = self.tokens, self.width, self.states, self.product_bytes
        kept = 6 * n * w * number + n * self.heads * FLOAT + n * self.mlp_dim * number
        if s:
            kept += 3 * n * w * number + n * self.heads * FLOAT + 2 * self.clips * (s + 1) * w * number
        return kept

    def kept_bytes(self) -> int:
        """Bytes of activations that are kept from the forward to the backward pass of a step."""
        block = self._stream if self.gradient_checkpointing else self.kept_per_block()
        return self.layers * block + sum(self._ends)

    def peak_moments(self) -> dict[str, int]:
        """Bytes held at the moments of a step that may be its worst, beyond weights and AdamW's averages.

        `loss`: the forward pass is done and its error is computed. `heads`, `last block`, `first block`: the backward
        pass is there, with the gradients that it has by then. `forward`: in the last block, under checkpointing.
        `optimiser`: all gradients, and two numbers for each weight of the largest matrix.
        """
        d, w, m, number = self.embedding_dim, self.width, self.mlp_dim, self.product_bytes
        errors, rotary, _, casts = self._ends
        embeddings, stream, kept = errors // 2, self._stream, self.kept_bytes()
        # The hidden layer of a part of the tokens: its value or gradient, before and after GELU.
        hidden = 2 * min(self.tokens, self.mlp_tokens) * m * number
        block = self.kept_per_block()
        each = stream if self.gradient_checkpointing else block
        work = embeddings + rotary + stream + hidden  # of the backward pass in any block
        gradients = FLOAT * self.parameters()
        unfinished = FLOAT * w * (6 * w + m)  # the first block's own, all but its MLP's second matrix
        moments = {
            "loss": kept + 2 * errors,
            "heads": kept + 2 * stream,
            "last block": (self.layers - 1) * each + block + work + casts + FLOAT * w * (m + 2 * d),
            "first block": block + work + gradients - unfinished,
            "optimiser": gradients + 2 * FLOAT * w * max(m, 3 * w, d),
        }
        if self.gradient_checkpointing:
            moments["forward"] = self.layers * stream + work + stream + casts
        return moments

    def peak_bytes(self) -> int:
        """The most that a step holds at once beyond weights and AdamW's averages."""
        return max(self.peak_moments().values())

    @property
    def _stream(self) -> int:
        """Bytes of one number for each token and channel inside the predictor."""
        return self.tokens * self.width * self.product_bytes

    @property
    def _ends(self) -> tuple[int, int, int, int]:
        """Bytes kept outside the blocks: embeddings and errors, rotary table, what the heads read, weights as bf16."""
        n, d, w = self.tokens, self.embedding_dim, self.width
        errors, rotary = 2 * n * d * FLOAT, n * (w // self.heads) * FLOAT
        if self.product_bytes == FLOAT:
            return errors, rotary, 2 * self._stream, 0
        return errors, rotary, n * w * FLOAT + 2 * self._stream, self.product_bytes * self.parameters()


def tower_flops(patches: int, width: int, layers: int, mlp_dim: int, patch_values: int) -> int:
    """Operations of a vision transformer's forward pass over one frame.

    Args:
        patches: tokens of a frame, before any pooling.
        width: its channels.
        layers: its blocks.
        mlp_dim: hidden size of its MLP.
        patch_values: numbers in a patch, `3 p^2`.
    """
    block = 2 * patches * (4 * width * width + 2 * width * mlp_dim) + 4 * patches * patches * width
    return layers * block + 2 * patches * patch_values * width
