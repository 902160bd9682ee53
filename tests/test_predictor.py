"""The transformer: starts as copy-last, knows time only by differences, uses every parameter, runs everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from framestream.model.geometry import Geometry, squarest_grid
from framestream.model.predictor import FramePredictor
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import make_mask
from framestream.pipeline.sampling import FastSlowSampling

from model_setup import HIDDEN, geometry_of, small_predictor

LAYOUT = FrameLayout.from_plan(FastSlowSampling(num_fast=4, num_slow=3).plan(13), patches=6)
MASK = make_mask("time_causal", LAYOUT)


def tokens_of(layout: FrameLayout = LAYOUT, batch: int = 2, dim: int = 6) -> torch.Tensor:
    return torch.randn(batch, layout.num_tokens, dim, generator=torch.Generator().manual_seed(1))


def test_the_untrained_model_is_copy_last() -> None:
    predictor = FramePredictor(6, 2, 2, context_dim=HIDDEN, width=16)
    tokens = tokens_of()
    out, _ = predictor(tokens, geometry_of(LAYOUT, 2), MASK, torch.randn(2, 3, HIDDEN))
    assert torch.equal(out, tokens)


@pytest.mark.parametrize("states", ["none", "all", "timed"])
def test_every_parameter_is_in_every_graph(states: str) -> None:
    predictor = small_predictor()
    hidden = None if states == "none" else torch.randn(2, 3, HIDDEN)
    when = torch.zeros(2, 3) if states == "timed" else None
    out, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK, hidden, when)
    out.sum().backward()
    assert [name for name, p in predictor.named_parameters() if p.grad is None] == []


def test_time_counts_by_differences_only() -> None:
    predictor = small_predictor().double()
    tokens = tokens_of().double()
    here, _ = predictor(tokens, geometry_of(LAYOUT, 2), MASK)
    later, _ = predictor(tokens, geometry_of(LAYOUT, 2, start=5000.0), MASK)
    # Bit-equal would ask the same of the times themselves, whose last digits differ after the shift.
    torch.testing.assert_close(here, later, atol=1e-6, rtol=1e-6)
    slower, _ = predictor(tokens, geometry_of(LAYOUT, 2, fps=10.0), MASK)
    assert (here - slower).abs().max() > 1e-4


def test_sequence_index_used_as_time() -> None:
    """Two layouts of the same sequence positions at other source times must not look the same to the model."""
    predictor = small_predictor(layers=1)
    near = FrameLayout.from_arrays([0, 1, 2], patches=4)
    far = FrameLayout.from_arrays([0, 7, 9], patches=4)
    tokens = tokens_of(near, 1)
    outs = []
    for layout in (near, far):
        geometry = geometry_of(layout, fps=8.0)
        outs.append(predictor(tokens, geometry, make_mask("time_causal", layout))[0])
    assert (outs[0][:, -4:] - outs[1][:, -4:]).abs().max() > 1e-4


def test_the_order_of_the_sequence_is_no_information() -> None:
    """Positions are seconds, rows and columns, so frames in another order give the same predictions."""
    predictor = small_predictor()
    order = [2, 0, 3, 1]
    frames = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    plain = FrameLayout.from_arrays(range(4), [0, 1, 1, 0], patches=4)
    mixed = FrameLayout.from_arrays(order, [plain.stream[i] for i in order], patches=[4] * 4)
    a, _ = predictor(frames.flatten(1, 2), geometry_of(plain), make_mask("time_causal", plain))
    b, _ = predictor(frames[:, order].flatten(1, 2), geometry_of(mixed), make_mask("time_causal", mixed))
    torch.testing.assert_close(a.unflatten(1, (4, 4))[:, order], b.unflatten(1, (4, 4)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["row", "column", "step", "stream"])
def test_place_in_the_image_step_and_stream_all_act(part: str) -> None:
    predictor = small_predictor()
    geometry = geometry_of(LAYOUT, 2)
    before, _ = predictor(tokens_of(), geometry, MASK)
    values = {name: getattr(geometry, name) for name in Geometry.__dataclass_fields__}
    changed = {"row": geometry.row * 0, "column": geometry.column * 0, "step": geometry.step * 3}
    values[part] = changed.get(part, 1 - geometry.stream)
    after, _ = predictor(tokens_of(), Geometry(**values), MASK)
    assert (before - after).abs().max() > 1e-4


def test_grids() -> None:
    assert [squarest_grid(n) for n in (1, 2, 6, 7, 16, 196, 256, 200)] == [
        (1, 1), (1, 2), (2, 3), (1, 7), (4, 4), (14, 14), (16, 16), (10, 20),
    ]  # fmt: skip
    wide = Geometry.build([(8,)], torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1), {8: (2, 4)})
    assert wide.row.unique().tolist() == [4, 12]
    assert wide.column.unique().tolist() == [2, 6, 10, 14]


def test_geometry_refuses_times_that_cannot_tell_frames_apart() -> None:
    with pytest.raises(ConfigError, match=r"bfloat16.*cast_forward_inputs"):
        Geometry.build([(4,)], torch.zeros(1, 1).bfloat16(), torch.ones(1, 1), torch.zeros(1, 1))


def test_gradient_checkpointing_changes_memory_not_numbers() -> None:
    grads = []
    for checkpointing in (False, True):
        predictor = small_predictor(gradient_checkpointing=checkpointing)
        out, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK, torch.ones(2, 3, HIDDEN))
        out.square().sum().backward()
        grads.append([p.grad for p in predictor.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_autocast_and_bf16_weights() -> None:
    predictor = small_predictor()
    exact, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK, torch.ones(2, 1, HIDDEN).bfloat16())
        mixed, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK)
    mixed.sum().backward()
    assert mixed.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in predictor.parameters())
    torch.testing.assert_close(mixed, exact, atol=0.03, rtol=0.03)
    half, _ = small_predictor().bfloat16()(tokens_of(), geometry_of(LAYOUT, 2), MASK)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)


def test_padding_states_with_infinite_time_changes_nothing() -> None:
    predictor = small_predictor()
    states = torch.randn(2, 5, HIDDEN)
    when = torch.tensor([[0.0, 0.1, 0.2, math.inf, math.inf]] * 2)
    a, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK, states, when)
    b, _ = predictor(tokens_of(), geometry_of(LAYOUT, 2), MASK, states[:, :3], when[:, :3])
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_where_every_state_is_hidden_the_null_state_is_read() -> None:
    predictor = small_predictor()
    geometry = geometry_of(LAYOUT, 2)
    hidden, _ = predictor(tokens_of(), geometry, MASK, torch.randn(2, 3, HIDDEN), torch.full((2, 3), math.inf))
    none, _ = predictor(tokens_of(), geometry, MASK)
    torch.testing.assert_close(hidden, none, atol=1e-6, rtol=1e-6)
    predictor.null_state.data += torch.randn(1, 1, HIDDEN)
    assert not torch.allclose(none, predictor(tokens_of(), geometry, MASK)[0], atol=1e-4)


def test_errors() -> None:
    predictor = small_predictor()
    geometry = geometry_of(LAYOUT, 2)
    with pytest.raises(ConfigError, match=r"\[2, S, 12\].*\[2, 3, 11\]"):
        predictor(tokens_of(), geometry, MASK, torch.zeros(2, 3, 11))
    with pytest.raises(ConfigError, match=r"hidden_time must be \[2, 3\]"):
        predictor(tokens_of(), geometry, MASK, torch.zeros(2, 3, HIDDEN), torch.zeros(3))
    with pytest.raises(ConfigError, match=r"without hidden_states"):
        predictor(tokens_of(), geometry, MASK, None, torch.zeros(2, 3))
    for width, heads in ((30, 4), (12, 4), (20, 4)):
        with pytest.raises(ConfigError, match=r"even number of at least 6"):
            FramePredictor(6, heads, context_dim=HIDDEN, width=width)


@pytest.mark.slow
def test_a_compiled_block_gives_the_same_without_graph_breaks() -> None:
    predictor = small_predictor()
    hidden = torch.randn(2, 3, HIDDEN)
    args = (tokens_of(), geometry_of(LAYOUT, 2), MASK, hidden, torch.zeros(2, 3))

    def run() -> list[torch.Tensor]:
        predictor.zero_grad()
        out, _ = predictor(*args)
        out.square().sum().backward()
        return [out, *(p.grad.clone() for p in predictor.parameters())]

    plain = run()
    for block in predictor.blocks:
        block.compile(fullgraph=True)
    for a, b in zip(run(), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_whole_predictor_compiles() -> None:
    predictor = small_predictor()
    compiled = torch.compile(predictor)
    for layout in (LAYOUT, FrameLayout.from_plan(FastSlowSampling(num_fast=5, num_slow=3).plan(30), patches=4)):
        args = (tokens_of(layout), geometry_of(layout, 2), make_mask("time_causal", layout))
        torch.testing.assert_close(compiled(*args)[0], predictor(*args)[0], atol=1e-5, rtol=1e-4)
