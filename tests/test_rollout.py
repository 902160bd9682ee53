"""Generation with a cache: on true frames it is the parallel pass; on its own it feeds itself and sees no future."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.model.rollout import rollout
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.masks import FrameMask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from model_setup import HIDDEN, PATCHES, batch_of, dense_batch, small_module

CAUSAL = [
    ("frame_causal", {}),
    ("sliding_window", {"window_size": 2}),
    ("sliding_window", {"window_size": 4}),
    ("time_causal", {}),
    ("fast_slow_causal", {}),
]
# Slow frames that all lie before the last three fast ones: then the rollout's history is the parallel pass's.
APART = FastSlowSampling(num_fast=6, num_slow=4, slow_coverage="stride", slow_stride=6)
assert all(max(plan.frame_index[plan.stream == 0]) < t - 3 for t in (24, 30) for plan in [APART.plan(t)])


def parallel(module: Any, batch: dict[str, Any], steps: int, **states: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions whose targets are the last `steps` fast frames, and their errors, from one parallel pass."""
    output = module(batch, **states)
    picked, errors = [], []
    for b in range(len(batch["frame_index"])):
        fast = torch.nonzero((batch["frame_stream"][b] == 1) & batch["frame_valid"][b]).flatten()
        queries = fast[batch["frame_index"][b, fast].argsort()][-steps - 1 : -1]
        picked.append(output.predictions[b, queries])
        errors.append(output.frame_error[b, queries])
    return torch.stack(picked), torch.stack(errors)


def slow_first(batch: dict[str, Any], steps: int) -> dict[str, Any]:
    """The batch with slow frames at or after the first generated frame marked invalid, mask included."""
    from framestream.pipeline.layout import FrameLayout
    from framestream.pipeline.masks import FrameMask, make_mask

    valid = batch["frame_valid"].clone()
    for b, index in enumerate(batch["frame_index"]):
        now = index[batch["frame_stream"][b] == 1].sort().values[-steps]
        valid[b] &= (batch["frame_stream"][b] == 1) | (index < now)
    layouts = [
        FrameLayout.from_arrays(i, s, v, PATCHES)
        for i, s, v in zip(batch["frame_index"], batch["frame_stream"], valid, strict=True)
    ]
    mask = FrameMask.stack([make_mask("time_causal", layout) for layout in layouts])
    return {**batch, "frame_valid": valid, "frame_mask": mask}


@pytest.mark.parametrize(("mask", "options"), CAUSAL)
@pytest.mark.parametrize("order", ["concat", "interleave", "time"])
@pytest.mark.parametrize("backend", ["ranges", "dense"])
def test_on_true_frames_it_equals_the_parallel_pass(mask: str, options: Any, order: str, backend: str) -> None:
    sampling = FastSlowSampling(**{**APART.__dict__, "order": order})
    batch = batch_of(sampling, (24, 30, 24), mask=mask, **options)
    if mask in ("frame_causal", "sliding_window") and order == "interleave":
        batch = dense_batch(8, mask=mask, **options)  # there slow frames see later fast ones: not causal in time
    module = small_module(attention_backend=backend)
    steps = 3
    got = rollout(module, batch, steps, teacher_forced=True)
    predictions, errors = parallel(module, batch, steps)
    torch.testing.assert_close(got.predictions, predictions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.frame_error, errors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["concat", "interleave", "time"])
def test_slow_frames_of_the_generated_moment_are_hidden(order: str) -> None:
    """Default slow frames reach into the generated span; what equals the rollout is the pass without those."""
    sampling = FastSlowSampling(num_fast=6, num_slow=6, order=order)  # type: ignore[arg-type]
    batch = batch_of(sampling, (24, 18))
    assert not slow_first(batch, 4)["frame_valid"].all()
    module = small_module()
    got = rollout(module, batch, 4, teacher_forced=True)
    predictions, _ = parallel(module, slow_first(batch, 4), 4)
    torch.testing.assert_close(got.predictions, predictions, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([{}, {"slow_pool": 2}, {"fast_pool": 2}]))
def test_under_any_mask_it_equals_the_parallel_pass_without_the_future(seed: int, steps: int, pools: Any) -> None:
    """Clips with masks, orders and indices of their own; whatever a mask shows of the future is taken off it."""
    random = torch.Generator().manual_seed(seed)
    slow, fast, clips = 3, 6, 3
    batch = batch_of(FastSlowSampling(num_fast=fast, num_slow=slow), (24,) * clips, mask=None, seed=seed % 2**31)
    given_masks, masks = [], []
    for b in range(clips):
        order = torch.randperm(slow + fast, generator=random)
        index = torch.randperm(24, generator=random)[: slow + fast]  # no two frames at the same moment
        stream = (order >= slow).long()
        batch["frame_index"][b], batch["frame_stream"][b], batch["frame_time"][b] = index, stream, index / 30
        matrix = torch.rand(slow + fast, slow + fast, generator=random) < torch.rand((), generator=random)
        matrix |= torch.eye(slow + fast, dtype=torch.bool)
        moments = index[stream == 1].sort().values[-steps:]
        old = index < moments[0]
        new = (stream == 1) & ~old
        honest = matrix & (old | new) & (old | new)[:, None] & (index <= index[:, None]) | torch.eye(len(old)).bool()
        honest |= matrix & old & old[:, None]  # among themselves known frames see what they may, in any direction
        kept = [PATCHES // 4 if f"{name}_pool" in pools else PATCHES for name in ("slow", "fast")]
        patches = [kept[s] for s in stream.tolist()]
        given_masks.append(FrameMask.from_matrix(matrix, patches))
        masks.append(FrameMask.from_matrix(honest, patches))
    module = small_module(on_leak="allow", **pools)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # targets may leak under such masks, and that is said once
        got = rollout(module, {**batch, "frame_mask": FrameMask.stack(given_masks)}, steps, teacher_forced=True)
        want, _ = parallel(module, {**batch, "frame_mask": FrameMask.stack(masks)}, steps)
    torch.testing.assert_close(got.predictions, want[:, :, : got.predictions.shape[2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["time_causal", "fast_slow", "full", "frame_causal"])
def test_nothing_from_the_generated_span_reaches_the_predictions(mask: str) -> None:
    batch = batch_of(FastSlowSampling(num_fast=6, num_slow=6), (24, 24), mask=mask)
    module = small_module(on_leak="allow")
    states = {"hidden_states": torch.randn(2, 3, HIDDEN), "hidden_time": torch.tensor([[0.0, 20 / 30, 21 / 30]] * 2)}
    before = rollout(module, batch, 3, **states)
    changed = {**batch, "video_frames": batch["video_frames"].clone()}
    changed["video_frames"][batch["frame_index"] >= 21] = 7
    states["hidden_states"] = states["hidden_states"].clone()
    states["hidden_states"][:, 2] = 9.0  # it has seen frame 21, the first generated one
    after = rollout(module, changed, 3, **states)
    assert torch.equal(before.predictions, after.predictions)
    assert not torch.equal(before.frame_error, after.frame_error)
    changed["video_frames"][batch["frame_index"] == 20] = 7  # the last frame of the history does reach them
    assert not torch.equal(before.predictions, rollout(module, changed, 3, **states).predictions)


def test_predictions_are_fed_back() -> None:
    batch, module = dense_batch(7), small_module()
    free = module.rollout(batch, 4)
    forced = rollout(module, batch, 4, teacher_forced=True)
    assert torch.equal(free.predictions[:, 0], forced.predictions[:, 0])
    assert not torch.allclose(free.predictions[:, 1:], forced.predictions[:, 1:], atol=1e-3)
    # By hand: put the first prediction in the place of the true frame, and look at the parallel pass.
    clips = module.prepare(batch)
    clips.embeddings[:, 3] = free.predictions[:, 0]
    again = clips.unpack(module.predict(clips))
    torch.testing.assert_close(again[:, 3], free.predictions[:, 1], atol=1e-5, rtol=1e-5)


def test_errors_are_in_the_units_of_the_loss_against_the_last_true_frame() -> None:
    batch = dense_batch(6)
    module = small_module(trained=False)
    out = module.rollout(batch, 3)
    frames = module.encode(batch["video_frames"])
    for step in range(3):
        want = (frames[:, 3 + step] - frames[:, 2]).square().mean((1, 2))
        torch.testing.assert_close(out.copy_last_error[:, step], want)
    assert torch.equal(out.predictions, frames[:, 2:3].expand(-1, 3, -1, -1))  # untrained = copy-last
    torch.testing.assert_close(out.frame_error, out.copy_last_error)


def test_short_clips_of_a_batch_are_nan_and_leave_the_others_alone() -> None:
    batch = batch_of(DenseSampling(6), (6, 3, 6), mask="time_causal")
    module = small_module()
    out = module.rollout(batch, 4)
    assert out.frame_error.isnan().any(1).tolist() == [False, True, False]
    assert out.predictions.isnan().flatten(1).all(1).tolist() == [False, True, False]
    alone = {k: v[[0, 2]] if isinstance(v, torch.Tensor) else None for k, v in batch.items()}
    del alone["frame_mask"]
    torch.testing.assert_close(out.predictions[[0, 2]], module.rollout(alone, 4).predictions)
    assert module.rollout(batch_of(DenseSampling(6), (2, 2)), 4).frame_error.isnan().all()


@pytest.mark.parametrize(
    "config",
    [
        {"fast_pool": 2},
        {"slow_pool": 4},
        {"slow_pool": "max:2", "fast_pool": "bilinear:2", "target_norm": True, "loss": "cosine"},
        {"use_frame_causal_mask": False},
        {"num_hist": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda config: "-".join(config),
)
def test_under_other_settings_it_still_equals_the_parallel_pass(config: dict[str, Any]) -> None:
    batch = batch_of(FastSlowSampling(**{**APART.__dict__, "order": "time"}), (24, 30), mask=None)
    module = small_module(**config)
    states = {"hidden_states": torch.randn(2, 3, HIDDEN), "hidden_time": torch.rand(2, 3)}
    got = rollout(module, batch, 3, teacher_forced=True, **states)
    predictions, errors = parallel(module, batch, 3, **states)
    kept = got.predictions.shape[2]
    torch.testing.assert_close(got.predictions, predictions[:, :, :kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.frame_error, errors, atol=1e-5, rtol=1e-5)


def test_rollout_loss_trains_through_its_own_predictions() -> None:
    batch = dense_batch(6)
    plain, extra = small_module(), small_module(rollout_steps=3)
    loss, with_rollout = plain(batch).loss, extra(batch).loss
    want = plain.rollout(batch, 3).frame_error.mean() * plain.config.loss_weight
    torch.testing.assert_close(with_rollout - loss, want)
    with_rollout.backward()
    assert all(p.grad is not None for p in extra.parameters())
    loss.backward()
    assert not torch.allclose(plain.predictor.embed.weight.grad, extra.predictor.embed.weight.grad)
    torch.testing.assert_close(extra.eval()(batch).loss, loss)  # in eval mode the loss is teacher-forced


def test_a_first_clip_without_fast_frames_is_left_out() -> None:
    batch = batch_of(APART, (24, 30), mask=None)
    batch["frame_stream"][0] = 0
    got = small_module().rollout(batch, 3)
    assert got.frame_error.isnan().all(1).tolist() == [True, False]
    alone = {name: value[1:] for name, value in batch.items()}
    torch.testing.assert_close(got.predictions[1:], small_module().rollout(alone, 3).predictions)
    batch["frame_stream"][1] = 0
    with pytest.raises(ConfigError, match=r"these clips allow none"):
        small_module().rollout(batch, 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_hidden_states_of_another_batch_are_refused(rows: int) -> None:
    batch = dense_batch(6, clips=2)
    with pytest.raises(ConfigError, match=r"hidden_states must have a row for each of 2 clips"):
        small_module().rollout(batch, 3, hidden_states=torch.randn(rows, 3, HIDDEN))
    with pytest.raises(ConfigError, match=r"hidden_time must have a row for each of 2 clips"):
        small_module().rollout(batch, 3, hidden_states=torch.randn(2, 3, HIDDEN), hidden_time=torch.zeros(rows, 3))


@pytest.mark.parametrize("steps", [2.0, True, "2"])
def test_steps_that_are_no_whole_number_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a whole number"):
        small_module().rollout(dense_batch(6), steps)


@pytest.mark.parametrize("steps", [0, 6, 7])
def test_impossible_steps_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=r"allow 1 to 5"):
        small_module().rollout(dense_batch(6), steps)
