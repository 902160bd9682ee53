"""Masked attention: every backend gives what a plain softmax under the mask gives, and never builds N x N."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framestream.model.attention import AttentionPlan, frame_attention, plan_attention
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import RULES, FrameMask, make_mask
from framestream.pipeline.sampling import FastSlowSampling

from square_tensors import SquareTensors

ORDERS = ("concat", "interleave", "time")


def layout_of(order: str = "concat", frames: int = 11, patches: tuple[int, int] = (4, 4)) -> FrameLayout:
    plan = FastSlowSampling(num_fast=4, num_slow=3, order=order).plan(frames)  # type: ignore[arg-type]
    return FrameLayout.from_plan(plan, patches=patches)


def random_qkv(batch: int, tokens: int, *, heads: int = 2, size: int = 8, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return tuple(torch.randn(batch, heads, tokens, size, dtype=dtype, requires_grad=True) for _ in range(3))


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The definition, in double precision."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.double()


def out_and_gradients(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["ranges", "dense"])
def test_backends_equal_the_definition_forward_and_backward(rule: str, order: str, backend: str) -> None:
    mask = make_mask(rule, layout_of(order))
    q, k, v = random_qkv(2, mask.num_tokens)
    got = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, backend))
    want = out_and_gradients(q, k, v, reference(q, k, v, mask.dense()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ["ranges", "dense"])
def test_clips_with_different_patterns_and_padding_in_one_batch(backend: str) -> None:
    layouts = [layout_of("time", frames) for frames in (11, 11, 30, 2, 30, 1)]
    mask = FrameMask.stack([make_mask("time_causal", layout) for layout in layouts])
    assert len(mask.patterns) > 2
    q, k, v = random_qkv(6, mask.num_tokens)
    got = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, backend))
    want = out_and_gradients(q, k, v, reference(q, k, v, mask.dense()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-5)


def test_streams_with_different_patch_counts() -> None:
    mask = make_mask("time_causal", layout_of("interleave", patches=(2, 5)))
    q, k, v = random_qkv(1, mask.num_tokens)
    torch.testing.assert_close(
        frame_attention(q, k, v, mask, "ranges"), frame_attention(q, k, v, mask, "dense"), atol=1e-5, rtol=1e-5
    )


@given(
    matrix=st.integers(1, 6).flatmap(
        lambda f: st.lists(st.lists(st.booleans(), min_size=f, max_size=f), min_size=f, max_size=f)
    ),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_ranges_equal_dense_for_any_frame_matrix(matrix: list[list[bool]], data: st.DataObject) -> None:
    allowed = torch.tensor(matrix) | torch.eye(len(matrix), dtype=torch.bool)
    patches = data.draw(st.lists(st.integers(1, 4), min_size=len(matrix), max_size=len(matrix)))
    mask = FrameMask.from_matrix(allowed, patches)
    q, k, v = random_qkv(1, mask.num_tokens, dtype=torch.float64)
    got = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, "ranges"))
    want = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, "dense"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rule", ["time_causal", "sliding_window", "fast_slow"])
def test_gradients_of_ranges_pass_a_numeric_check(rule: str) -> None:
    mask = make_mask(rule, layout_of("interleave", patches=(1, 2)))
    q, k, v = random_qkv(1, mask.num_tokens, heads=1, size=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *qkv: frame_attention(*qkv, mask, "ranges"), (q, k, v))


def test_bfloat16_keeps_the_precision_of_its_inputs() -> None:
    mask = make_mask("time_causal", layout_of())
    q, k, v = random_qkv(2, mask.num_tokens, dtype=torch.bfloat16)
    got = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, "ranges"))
    want = out_and_gradients(q, k, v, reference(q, k, v, mask.dense()))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b.double(), atol=0.06, rtol=0.03)


@pytest.mark.parametrize("backend", ["ranges", "dense"])
def test_autocast_casts_every_backend_alike(backend: str) -> None:
    mask = make_mask("frame_causal", layout_of())
    q, k, v = random_qkv(1, mask.num_tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = frame_attention(q, k, v.to(torch.bfloat16), mask, backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_inputs_may_be_strided_and_the_incoming_gradient_expanded() -> None:
    mask = make_mask("time_causal", layout_of())
    torch.manual_seed(0)
    x = torch.randn(2, mask.num_tokens, 3 * 16, requires_grad=True)
    grads = []
    for backend in ("ranges", "dense"):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in x.chunk(3, dim=-1))
        grads.append(torch.autograd.grad(frame_attention(q, k, v, mask, backend).sum(), x)[0])
        turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)  # channels not dense
        torch.testing.assert_close(
            frame_attention(turned, k, v, mask, backend), frame_attention(q, k, v, mask, backend), atol=1e-6, rtol=1e-5
        )
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["time_causal", "sliding_window"])
def test_ranges_never_build_a_square_over_all_tokens(rule: str) -> None:
    mask = make_mask(rule, layout_of("interleave", patches=(6, 6)))
    n = mask.num_tokens
    q, k, v = random_qkv(1, n, heads=1)
    with SquareTensors(n) as squares:
        frame_attention(q, k, v, mask, "ranges").sum().backward()
    assert squares.seen == []
    with SquareTensors(n) as squares:  # the same watch does see the reference's mask
        frame_attention(q, k, v, mask, "dense").sum().backward()
    assert squares.seen


def test_token_causal_order_inside_and_between_frames() -> None:
    layout = FrameLayout.from_arrays(range(4), valid=[False, True, True, True], patches=3)
    mask = make_mask("frame_causal", layout)
    allowed = mask.dense() & torch.ones(12, 12, dtype=torch.bool).tril()
    q, k, v = random_qkv(2, 12)
    for backend in ("ranges", "dense"):
        plan = plan_attention(mask, 2, "cpu", backend, token_causal=True)
        got = out_and_gradients(q, k, v, frame_attention(q, k, v, plan))
        want = out_and_gradients(q, k, v, reference(q, k, v, allowed))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-5)


def test_fewer_queries_than_keys_with_a_plan() -> None:
    """The step of a cached generation: one frame's queries over scattered keys."""
    q, k, v = random_qkv(2, 10)
    q = q[:, :, :2]
    plan = AttentionPlan("ranges", runs=((0, 2, ((0, 2, ((1, 4), (8, 10))),)),))
    keys = torch.tensor([1, 2, 3, 8, 9])
    want = reference(q, k[:, :, keys], v[:, :, keys], torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(frame_attention(q, k, v, plan).double(), want, atol=1e-5, rtol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    mask = make_mask("frame_causal", layout_of())
    q, k, v = random_qkv(2, mask.num_tokens)
    with pytest.raises(ConfigError, match=r"'fast'.*auto, ranges, dense, flex"):
        frame_attention(q, k, v, mask, "fast")
    with pytest.raises(ConfigError, match=r"28 tokens.*queries have 27"):
        frame_attention(q[:, :, 1:], k, v, mask)
    with pytest.raises(ConfigError, match=r"3 clips.*batch has 2"):
        frame_attention(q, k, v, FrameMask.stack([mask] * 3))
    with pytest.raises(ConfigError, match=r"no backward pass on the CPU"):
        frame_attention(q, k, v, mask, "flex")
    with pytest.raises(ConfigError, match=r"'ranges' or 'dense', not 'flex'"):
        plan_attention(mask, 2, "cpu", "flex", token_causal=True)


@pytest.mark.slow
def test_flex_equals_dense_compiled_forward_on_the_cpu() -> None:
    layouts = [layout_of("interleave", frames) for frames in (11, 30)]
    mask = FrameMask.stack([make_mask("time_causal", layout) for layout in layouts])
    q, k, v = random_qkv(2, mask.num_tokens, size=16)
    with torch.no_grad():
        torch.testing.assert_close(
            frame_attention(q, k, v, mask, "flex"), frame_attention(q, k, v, mask, "dense"), atol=1e-5, rtol=1e-5
        )


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["flex", "ranges", "auto"])
def test_backends_agree_on_cuda(rule: str, backend: str) -> None:
    mask = make_mask(rule, layout_of("interleave", patches=(49, 49)))
    q, k, v = (x.detach().cuda().requires_grad_() for x in random_qkv(2, mask.num_tokens, size=32))
    got = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, backend))
    want = out_and_gradients(q, k, v, frame_attention(q, k, v, mask, "dense"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
