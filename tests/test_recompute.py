"""What is computed again in the backward pass gives what keeping it would give, or an error, never something else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from framestream.model.recompute import recomputed


class Half(nn.Module):
    """A layer normed and projected, up and down, as in a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor, *, again: bool = True) -> Tensor:
        if again:
            return recomputed(self.act, self.down, recomputed(self.norm, self.up, x))
        return self.down(self.act(self.up(self.norm(x))))


def inputs() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(run: Callable[[Tensor], Tensor], weights: list[Tensor]) -> list[Tensor]:
    x = inputs()
    return list(torch.autograd.grad(run(x).square().sum(), [x, *weights]))


def saved_numbers(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Numbers that the graph of `run(x)` holds on to, weights and `x` aside, each tensor once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() != x.data_ptr():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(kept.values())


def test_gradients_are_those_of_keeping_everything() -> None:
    half = Half()
    weights = list(half.parameters())
    for ours, plain in zip(gradients(half, weights), gradients(lambda x: half(x, again=False), weights), strict=True):
        assert torch.equal(ours, plain)


def test_what_the_products_take_in_is_not_kept() -> None:
    half, x = Half(), inputs()
    assert saved_numbers(lambda x: half(x, again=False), x) > 15 * (8 + 16 + 16)
    assert saved_numbers(half, x) == 15 * 16  # the hidden layer before its activation


def test_weights_swapped_for_a_call_are_those_of_the_backward_pass() -> None:
    half = Half()
    others = {name: (weight.detach() * 2).requires_grad_() for name, weight in half.named_parameters()}
    found = []
    for again in (True, False):
        out = torch.func.functional_call(half, others, (inputs(),), {"again": again})
        found.append(torch.autograd.grad(out.square().sum(), list(others.values())))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_a_weight_changed_in_between_is_an_error_as_without() -> None:
    for again in (True, False):
        half = Half()
        out = half(inputs(), again=again).sum()
        with torch.no_grad():
            half.down.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            out.backward()


def test_a_layer_that_is_more_than_its_weights_is_called_as_it_is() -> None:
    class Random(nn.Linear):  # as adapters with dropout are
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(nn.functional.dropout(x, 0.5)), 0.5)

    half = Half()
    half.up = Random(8, 16)
    found = []
    for again in (True, False):
        torch.manual_seed(3)
        found.append(gradients(lambda x, again=again: half(x, again=again), list(half.parameters())))  # type: ignore[misc]
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_hooks_on_a_layer_are_run_once() -> None:
    half, calls = Half(), []
    half.up.register_forward_hook(lambda *_: calls.append(1))
    half(inputs()).sum().backward()
    assert calls == [1]
