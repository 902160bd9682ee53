"""No prediction has seen what it predicts: by perturbation, for every mask, backend and path of information."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from framestream.model.attention import plan_attention
from framestream.pipeline.errors import ConfigError, LeakError
from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.masks import RULES, FrameMask, leaking_targets, make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from model_setup import HIDDEN, PATCHES, batch_of, geometry_of, small_module, small_predictor

ORDERS = ("concat", "interleave", "time")
FRAME_PATCHES = 3


def layout_of(order: str = "concat", frames: int = 16) -> FrameLayout:
    plan = FastSlowSampling(num_fast=4, num_slow=4, order=order).plan(frames)  # type: ignore[arg-type]
    return FrameLayout.from_plan(plan, patches=[FRAME_PATCHES] * plan.num_frames)


def influence(
    layout: FrameLayout, mask: FrameMask, layers: int, backend: str, width: int = 16, **options: Any
) -> torch.Tensor:
    """bool `[F, F]`: does any bit of what frame i predicts change when the content of frame j does?"""
    predictor = small_predictor(layers=layers, attention_backend=backend, width=width)
    torch.manual_seed(2)
    tokens = torch.randn(1, layout.num_tokens, 6)
    plan = plan_attention(mask, 1, "cpu", backend, **options)
    with torch.no_grad():
        calm, _ = predictor(tokens, geometry_of(layout), plan)
        rows = []
        for j in range(layout.num_frames):
            pushed = tokens.clone()
            pushed[:, j * FRAME_PATCHES : (j + 1) * FRAME_PATCHES] += 3
            out, _ = predictor(pushed, geometry_of(layout), plan)
            rows.append((out != calm).unflatten(1, (-1, FRAME_PATCHES)).flatten(2).any(-1)[0])
        if backend == "flex":  # a kernel that gives the same input other results says nothing about masks
            again = [predictor(tokens, geometry_of(layout), plan)[0] for _ in range(20)]
            if not all(torch.equal(calm, other) for other in again):
                pytest.skip(f"compiled FlexAttention of torch {torch.__version__} is not reproducible on this CPU")
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["ranges", "dense"])
@pytest.mark.parametrize("layers", [1, 3])
def test_influence_equals_the_boolean_power_of_the_mask(rule: str, order: str, backend: str, layers: int) -> None:
    """Equal, both ways: nothing forbidden reaches a frame by one bit, and nothing allowed is missing."""
    for frames in (16, 3):  # 3: a clip too short for its streams, with padding
        layout = layout_of(order, frames)
        mask = make_mask(rule, layout)
        assert torch.equal(influence(layout, mask, layers, backend), mask.reach(layers).matrix())


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_influence_under_flex_equals_the_boolean_power_of_the_mask(rule: str) -> None:
    layout = layout_of("interleave")
    mask = make_mask(rule, layout)
    assert torch.equal(influence(layout, mask, 3, "flex", width=32), mask.reach(3).matrix())


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["flex", "ranges"])
def test_influence_through_the_module_on_a_gpu(rule: str, backend: str) -> None:
    batch = batch_of(FastSlowSampling(num_fast=4, num_slow=4, order="interleave"), (16,), mask=rule)
    batch = {name: value.to("cuda") for name, value in batch.items()}
    module = small_module(on_leak="allow", attention_backend=backend).cuda().eval()
    clips = module.prepare(batch)
    with torch.no_grad():
        calm = module.predict(clips)
        columns = []
        for frame in range(len(clips.layouts[0].stream)):
            pushed = replace(clips, embeddings=clips.embeddings.clone())
            pushed.embeddings[:, frame] += 3
            columns.append((module.predict(pushed) != calm).unflatten(1, (-1, PATCHES)).flatten(2).any(-1)[0])
    assert torch.equal(torch.stack(columns, dim=1).cpu(), clips.mask[0].reach(module.config.num_layers).matrix())


@pytest.mark.parametrize("backend", ["ranges", "dense"])
def test_token_order_instead_of_frame_masks_is_causal_too(backend: str) -> None:
    layout = FrameLayout.from_arrays(range(5), patches=FRAME_PATCHES)
    mask = make_mask("frame_causal", layout)
    assert torch.equal(influence(layout, mask, 2, backend, token_causal=True), mask.matrix())


@pytest.mark.parametrize("mask", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_no_scored_prediction_depends_on_its_target_or_later(mask: str, order: str) -> None:
    """Through the whole module: change a source frame wherever it stands, and look at what is in the loss."""
    sampling = FastSlowSampling(num_fast=4, num_slow=4, order=order)  # type: ignore[arg-type]
    batch = batch_of(sampling, (16,), mask=mask)
    module = small_module()
    with pytest.warns(UserWarning, match=r"targets") if mask in ("fast_slow", "full") else nullcontext():
        calm = module(batch)
    index, targets = batch["frame_index"][0], next_frame_targets(module.prepare(batch).layouts[0])
    for frame in index.unique().tolist():
        changed = {**batch, "video_frames": batch["video_frames"].clone()}
        changed["video_frames"][0, index == frame] = 0
        moved = (module(changed).predictions != calm.predictions)[0].flatten(1).any(-1)
        for query, target in enumerate(targets):
            if not calm.frame_error[0, query].isnan() and index[target] <= frame:
                assert not moved[query], f"frame {frame} reaches {query}, which predicts {int(index[target])}"


# -- the known faults, by name ---------------------------------------------------------------------------


def test_memory_passed_to_a_decoder_without_memory_mask() -> None:
    """The fault, shown on torch's decoder; and that one of ours has no second path that shows the future."""
    from framestream.model.video_frame_utils import create_causal_frame_mask

    torch.manual_seed(0)
    hide = ~create_causal_frame_mask(4, 3)
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), 1).eval()
    x = torch.randn(1, 12, 8)
    y = x.clone()
    y[:, 9:] += 1
    assert not torch.equal(
        decoder(x, x, tgt_mask=hide, memory_mask=None)[:, :9], decoder(y, y, tgt_mask=hide, memory_mask=None)[:, :9]
    )
    torch.testing.assert_close(
        decoder(x, x, tgt_mask=hide, memory_mask=hide)[:, :9], decoder(y, y, tgt_mask=hide, memory_mask=hide)[:, :9]
    )
    layout = FrameLayout.from_arrays(range(4), patches=FRAME_PATCHES)
    mask = make_mask("frame_causal", layout)
    assert torch.equal(influence(layout, mask, 3, "ranges"), mask.matrix())


def test_slow_frames_show_fast_targets() -> None:
    layout = layout_of()  # slow 0 4 8 12, fast 12 13 14 15
    fast_slow = make_mask("fast_slow", layout)
    assert leaking_targets(layout, fast_slow, 1) == (True, True, True, False, False, False, False, False)
    batch = batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16,), mask="fast_slow")  # slow 14 shows fast 9..14
    with pytest.warns(UserWarning, match=r"13 targets.*left out"):
        out = small_module()(batch)
    assert (out.leaking_targets, out.targets) == (13, 1)
    assert out.frame_error.isnan().sum() == 15
    honest = small_module()(batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16,)))
    assert (honest.leaking_targets, honest.targets) == (0, 14)


def test_a_window_leaks_through_a_third_frame() -> None:
    """With a window, fast 9 sees fast 8, which saw slow 14: only the power of the mask knows."""
    batch = batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16,), mask="sliding_window", window_size=2)
    with pytest.warns(UserWarning, match=r"targets"):
        assert small_module(num_layers=3)(batch).leaking_targets > small_module(num_layers=1)(batch).leaking_targets


def test_on_leak_raise_and_allow() -> None:
    batch = batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16,), mask="fast_slow")
    with pytest.raises(LeakError, match=r"13 targets.*time_causal"):
        small_module(on_leak="raise")(batch)
    with pytest.warns(UserWarning, match=r"kept in the loss"):
        out = small_module(on_leak="allow")(batch)
    assert (out.leaking_targets, out.targets) == (13, 14)


def test_the_warning_about_leaks_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    batch = batch_of(FastSlowSampling(num_fast=8, num_slow=8), (16,), mask="fast_slow")
    module = small_module()
    for _ in range(3):
        module(batch)
    assert len([w for w in recwarn if "targets" in str(w.message)]) == 1


def test_targets_shifted_across_the_stream_boundary() -> None:
    batch = batch_of(FastSlowSampling(num_fast=3, num_slow=3), (12,))
    module = small_module(trained=False)
    out = module(batch)
    frames = module.encode(batch["video_frames"])[0]
    want = [1, 2, None, 4, 5, None]  # the last slow frame's next in the sequence is the first fast one: no target
    for query, target in enumerate(want):
        error = out.frame_error[0, query]
        if target is None:
            assert error.isnan()
        else:
            torch.testing.assert_close(error, (frames[target] - frames[query]).square().mean())


def test_fast_slow_mask_built_but_not_applied() -> None:
    """Each mask that a batch brings changes what comes out."""
    outs = []
    for mask in RULES:
        batch = batch_of(FastSlowSampling(num_fast=4, num_slow=4, order="interleave"), (16,), mask=mask)
        outs.append(small_module(on_leak="allow")(batch).predictions)
    for i, a in enumerate(outs):
        for j, b in enumerate(outs[:i]):
            assert not torch.equal(a, b), f"{list(RULES)[i]} and {list(RULES)[j]} do the same"


def test_slow_stride_ignored_silently() -> None:
    video = torch.rand(1, 40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = {
        stride: small_module(use_fast_slow_frames=True, slow_stride=stride)
        .compute_autoregressive_loss(None, video)
        .item()
        for stride in (1, 2, 4)
    }
    assert len(set(losses.values())) == 3
    with pytest.raises(ConfigError, match=r"slow_stride=2 has no effect"):
        small_module(use_fast_slow_frames=True, slow_stride=2, slow_coverage="clip")


def test_interleave_dropping_frames() -> None:
    from framestream.model.video_frame_utils import VideoFrameSampler

    fast, slow = torch.arange(5.0).view(1, 5, 1, 1, 1), torch.arange(10.0, 12).view(1, 2, 1, 1, 1)
    merged = VideoFrameSampler.merge_fast_slow_frames(fast, slow, "interleave").flatten().tolist()
    assert merged == [0, 10, 1, 2, 3, 11, 4]
    assert sorted(merged) == [0, 1, 2, 3, 4, 10, 11]


def test_short_clips_padded_with_copies_that_become_targets() -> None:
    video = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    module = small_module(use_fast_slow_frames=True, num_fast=6, num_slow=6)
    seen = []
    module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    module.compute_autoregressive_loss(None, video)
    assert seen[0].targets == 4  # 0 -> 1 and 1 -> 2 in each stream, nothing from the padding
    assert torch.nonzero(~seen[0].frame_error[0].isnan()).flatten().tolist() == [3, 4, 9, 10]
    dense = small_module(trained=True).compute_autoregressive_loss(None, video)
    assert torch.isfinite(dense)


def test_missing_video_replaced_by_noise() -> None:
    module = small_module()
    batch = batch_of()
    for video in (None, [], torch.zeros(0, 3, 3, 16, 16), torch.zeros(2, 3, 16, 16)):
        with pytest.raises(ConfigError, match=r"video_frames must be"):
            module.compute_autoregressive_loss(torch.zeros(2, 3, HIDDEN), video)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"video_frames must be"):
            module({**batch, "video_frames": video})
    del batch["video_frames"]
    with pytest.raises(ConfigError, match=r"NoneType.*nothing is made up"):
        module(batch)


@pytest.mark.parametrize("order", ORDERS)
def test_conditioning_on_hidden_states_that_have_already_seen_later_frames(order: str) -> None:
    """A state reaches exactly the frames not before it, and those that see such frames."""
    layout = layout_of(order)
    mask = make_mask("time_causal", layout)
    predictor = small_predictor(layers=2)
    geometry = geometry_of(layout)
    tokens = torch.randn(1, layout.num_tokens, 6)
    states = torch.randn(1, 5, HIDDEN)
    frames = [0, 8, 12, 13, 15]
    when = torch.tensor([[frame / 30 for frame in frames]])  # float32, where the frames' times are float64
    with torch.no_grad():
        calm, _ = predictor(tokens, geometry, mask, states, when)
        for s, frame in enumerate(frames):
            pushed = states.clone()
            pushed[:, s] += 2
            out, _ = predictor(tokens, geometry, mask, pushed, when)
            moved = (out != calm).unflatten(1, (-1, FRAME_PATCHES)).flatten(2).any(-1)[0]
            assert moved.tolist() == [i >= frame for i in layout.frame_index]


def test_hidden_states_without_times_are_context_for_every_frame() -> None:
    module, batch = small_module(), batch_of()
    a = module(batch, torch.zeros(2, 3, HIDDEN)).predictions
    b = module(batch, torch.randn(2, 3, HIDDEN)).predictions
    assert (a != b).flatten(2).any(-1).all()


def test_frames_of_other_clips_in_the_batch_do_not_matter() -> None:
    batch = batch_of(DenseSampling(5), (5, 5, 2), patches=PATCHES)
    module = small_module()
    whole = module(batch).predictions
    batch["video_frames"][1] = 0
    again = module(batch).predictions
    assert torch.equal(whole[[0, 2]], again[[0, 2]])
