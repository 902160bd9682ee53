"""A watch over every tensor that torch makes: which of them are as large as a token-by-token square?"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SquareTensors(TorchDispatchMode):
    """Collects, in `seen`, operators that returned a tensor with two dimensions of at least `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.seen: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and sum(size >= self.tokens for size in leaf.shape) >= 2:
                self.seen.append((str(func), list(leaf.shape)))
        return result
