"""Masks: every rule against its definition, every form against brute force, and what leaks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from framestream.pipeline import (
    ConfigError,
    DenseSampling,
    FastSlowSampling,
    FrameLayout,
    FrameMask,
    FrameRule,
    leaking_targets,
    make_mask,
    next_frame_targets,
    sliding_window,
    time_causal,
)
from framestream.pipeline.block_mask import build_block_mask
from framestream.pipeline.masks import RULES

BLOCK_LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


@st.composite
def layouts(draw, max_patches=40):
    sampling = FastSlowSampling(
        num_fast=draw(st.integers(1, 6)),
        num_slow=draw(st.integers(1, 6)),
        fast_stride=draw(st.integers(1, 3)),
        order=draw(st.sampled_from(["concat", "interleave", "time"])),
    )
    patches = (draw(st.integers(1, max_patches)), draw(st.integers(1, max_patches)))
    one = FrameLayout.from_plan(sampling.plan(draw(st.integers(1, 30))), patches)
    if not draw(st.booleans()):
        return one
    return FrameLayout.concat([one, FrameLayout.from_plan(sampling.plan(draw(st.integers(1, 30))), patches)])


def expected(name, layout, window=3):
    """The rules as a reader would write them down, pair by pair."""
    frames = layout.num_frames
    matrix = torch.zeros(frames, frames, dtype=torch.bool)
    for q in range(frames):
        for k in range(frames):
            slow_q, slow_k = layout.stream[q] == 0, layout.stream[k] == 0
            past = layout.frame_index[k] <= layout.frame_index[q]
            between = [j for j in range(min(q, k), max(q, k)) if layout.clip[j] == layout.clip[q]]
            allowed = {
                "full": True,
                "frame_causal": k <= q,
                "sliding_window": k <= q and len(between) < window,
                "time_causal": past,
                "fast_slow": slow_k or (not slow_q and past),
                "fast_slow_causal": past and (slow_k or not slow_q),
            }[name]
            ok = layout.valid[q] and layout.valid[k] and layout.clip[q] == layout.clip[k] and allowed
            matrix[q, k] = ok or q == k
    return matrix


@pytest.mark.parametrize("name", RULES)
@given(layout=layouts(), window=st.integers(1, 5))
def test_rule_equals_its_definition(name, layout, window):
    options = {"window_size": window} if name == "sliding_window" else {}
    mask = make_mask(name, layout, **options)
    assert torch.equal(mask.matrix(), expected(name, layout, window))


@pytest.mark.parametrize("name", RULES)
@given(layout=layouts(max_patches=12))
def test_every_form_equals_brute_force(name, layout):
    mask = make_mask(name, layout)
    frame = torch.tensor(np.repeat(np.arange(layout.num_frames), layout.patches))
    brute = expected(name, layout)[frame][:, frame]
    assert torch.equal(mask.dense(), brute)
    from_ranges = torch.zeros_like(brute)
    covered = 0
    (groups,) = mask.ranges()
    for group in groups:
        assert group.start == covered
        covered = group.stop
        assert all(a[1] < b[0] for a, b in zip(group.keys, group.keys[1:], strict=False))
        for start, stop in group.keys:
            from_ranges[group.start : group.stop, start:stop] = True
    assert covered == mask.num_tokens
    assert torch.equal(from_ranges, brute)
    assert mask.density == pytest.approx(brute.float().mean().item())
    assert brute.any(dim=1).all()  # no empty softmax row


def assert_equal_block_masks(ours, reference):
    assert ours.shape == reference.shape
    assert ours.seq_lengths == reference.seq_lengths
    assert ours.BLOCK_SIZE == reference.BLOCK_SIZE
    for name in BLOCK_LISTS:
        a, b = getattr(ours, name), getattr(reference, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("patches", [1, 49, 64, 100, 128, 196, (100, 37), (256, 64)])
def test_block_mask_equals_create_block_mask(name, patches):
    # Token counts here are multiples of 128 for some patch counts and not for most.
    layout = FrameLayout.from_plan(FastSlowSampling(5, 4, 2).plan(7), patches)
    mask = make_mask(name, layout)
    ours, n = mask.block_mask(), mask.num_tokens
    dense = mask.dense()
    reference = create_block_mask(lambda b, h, q, kv: dense[q, kv], 1, 1, n, n, device="cpu")
    assert_equal_block_masks(ours, reference)
    assert torch.equal(create_mask(ours.mask_mod, 1, 1, n, n, device="cpu")[0, 0], dense)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 7), st.sampled_from([16, 32, 128]))
def test_block_mask_of_random_matrices_and_batches(data, frames, block_size):
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=frames, max_size=frames))
    bits = data.draw(st.lists(st.booleans(), min_size=2 * frames * frames, max_size=2 * frames * frames))
    matrix = torch.tensor(bits).view(2, frames, frames)
    mask = FrameMask.from_matrix(matrix, lengths)
    n, dense = mask.num_tokens, mask.dense()
    ours = build_block_mask(mask, "cpu", block_size)
    batch = ours.shape[0]
    assert batch == len(mask.patterns)
    reference = create_block_mask(
        lambda b, h, q, kv: dense[b, 0, q, kv], batch, 1, n, n, device="cpu", BLOCK_SIZE=block_size
    )
    assert_equal_block_masks(ours, reference)
    assert torch.equal(create_mask(ours.mask_mod, 2, 1, n, n, device="cpu"), dense)


def test_block_mask_never_visits_token_pairs():
    layout = FrameLayout.from_plan(FastSlowSampling(16, 16).plan(90), patches=1001)  # N x N would be 1.0 GB
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    largest = max(largest, leaf.numel())
            return out

    with Watch():
        mask = time_causal(layout).block_mask()
    blocks = -(-layout.num_tokens // 128)
    assert mask.shape == (1, 1, layout.num_tokens, layout.num_tokens)
    assert 0 < largest <= 2 * blocks * (blocks + 1)


def test_forms_are_cached():
    layout = FrameLayout.from_plan(FastSlowSampling().plan(40), patches=64)
    one, equal = time_causal(layout), time_causal(layout)
    assert one.prepare("cpu", "flex").block_mask() is equal.block_mask()
    assert one.ranges()[0] is equal.ranges()[0]
    assert one.prepare("cpu") is one


def test_a_mask_travels_as_a_few_hundred_bytes():
    layout = FrameLayout.from_plan(FastSlowSampling(32, 32).plan(400), patches=256)
    mask = FrameMask.stack([time_causal(layout)] * 8)
    pickled = pickle.dumps(mask)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert again == mask
    assert hash(again) == hash(mask)
    assert again.to("cpu", non_blocking=True) is again
    assert again.pin_memory() is again
    rule = pickle.loads(pickle.dumps(mask.block_mask().mask_mod))
    assert rule(*torch.tensor([0, 0, 5, 9])) == mask.block_mask().mask_mod(*torch.tensor([0, 0, 5, 9]))


def test_a_batch_of_different_masks_travels_in_less_than_64_kb():
    sampling = FastSlowSampling(32, 32, order="interleave")
    each = [time_causal(FrameLayout.from_plan(sampling.plan(33 + 7 * i), patches=(64, 256))) for i in range(64)]
    mask = FrameMask.stack(each)
    assert len(mask.patterns) > 40
    assert mask.num_frames == 64
    assert len(pickle.dumps(mask)) < 64 * 1024


@pytest.mark.parametrize("operator", ["and", "or"])
@given(layout=layouts(max_patches=2), names=st.tuples(st.sampled_from(list(RULES)), st.sampled_from(list(RULES))))
def test_rules_combine_before_there_is_a_layout(operator, layout, names):
    one, other = (FrameRule(name, **({"window_size": 2} if name == "sliding_window" else {})) for name in names)
    rule = one & other if operator == "and" else one | other
    matrices = [expected(name, layout, window=2) for name in names]
    want = matrices[0] & matrices[1] if operator == "and" else matrices[0] | matrices[1]
    assert torch.equal(rule(layout).matrix(), want)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert torch.equal((rule | "full")(layout).matrix(), expected("full", layout))


def test_a_combined_rule_stands_where_a_name_may():
    layout = FrameLayout.from_plan(FastSlowSampling(4, 4).plan(40), patches=2)
    rule = FrameRule("fast_slow") & time_causal
    assert make_mask(rule, layout) == make_mask("fast_slow_causal", layout)
    with pytest.raises(ConfigError, match="'slow_fast' is unknown"):
        FrameRule("slow_fast")
    with pytest.raises(ConfigError, match="not with 3"):
        rule & 3
    with pytest.raises(ConfigError, match=r"'time_causal' does not take these options.*window_size"):
        FrameRule("time_causal", window_size=3)
    with pytest.raises(ConfigError, match="plain values, window_size is none"):
        FrameRule("sliding_window", window_size=[3])


def test_batches_stack_index_and_combine():
    a, b = (FrameLayout.from_plan(FastSlowSampling(3, 3).plan(n), patches=2) for n in (20, 2))
    mask = FrameMask.stack([time_causal(a), time_causal(b), time_causal(a)])
    assert mask.shape == (3, 6, 6)
    assert len(mask) == mask.batch_size == 3
    assert len(mask.patterns) == 2
    assert mask[1] == time_causal(b)
    assert torch.equal(mask.matrix()[2], time_causal(a).matrix())
    assert mask.dense().shape == (3, 1, 12, 12)
    window = sliding_window(a, window_size=2)
    assert torch.equal((mask & window).matrix(), mask.matrix() & window.matrix())
    assert torch.equal((window | mask).matrix(), mask.matrix() | window.matrix())
    assert torch.equal((time_causal(a) & window).matrix(), time_causal(a).matrix() & window.matrix())
    assert torch.equal((mask | mask).matrix(), mask.matrix())
    with pytest.raises(ConfigError, match="3 and 2 clips"):
        mask & FrameMask.stack([window, window])
    with pytest.raises(ConfigError, match="same frames and patches"):
        time_causal(a) & time_causal(FrameLayout.from_plan(FastSlowSampling(3, 3).plan(20), patches=3))
    with pytest.raises(ConfigError, match="equal"):
        FrameMask.stack([time_causal(a), time_causal(FrameLayout.from_arrays([0], patches=2))])
    with pytest.raises(ConfigError, match="no batch axis"):
        window[0]


@given(st.data(), st.integers(1, 6), st.integers(0, 7))
def test_reach_is_the_boolean_power(data, frames, layers):
    bits = data.draw(st.lists(st.booleans(), min_size=frames * frames, max_size=frames * frames))
    matrix = torch.tensor(bits).view(frames, frames)
    power = torch.linalg.matrix_power((matrix | torch.eye(frames, dtype=torch.bool)).double(), layers) > 0
    assert torch.equal(FrameMask.from_matrix(matrix, 2).reach(layers).matrix(), power)


def test_slow_frames_leak_fast_targets_and_time_causal_does_not():
    layout = FrameLayout.from_plan(FastSlowSampling().plan(16), patches=1)
    leaks = {name: sum(leaking_targets(layout, make_mask(name, layout), 3)) for name in RULES}
    assert leaks["time_causal"] == leaks["fast_slow_causal"] == 0
    # Slow 14 shows what fast 8 to 13 have to predict, and all slow frames see each other.
    assert leaks["frame_causal"] == 6
    assert leaks["fast_slow"] == 13
    assert leaks["full"] == 14


def test_a_leak_through_a_third_frame_counts():
    # Fast 9 sees fast 8 through its window, fast 8 saw slow 14 one layer earlier: fast 10 is known by then.
    layout = FrameLayout.from_plan(FastSlowSampling().plan(16), patches=1)
    window = sliding_window(layout, window_size=2)
    nine = layout.frame_index.index(9)
    assert not leaking_targets(layout, window, 1)[nine]
    assert leaking_targets(layout, window, 2)[nine]


@given(layouts(max_patches=1), st.integers(1, 4))
def test_honest_masks_never_leak(layout, layers):
    for name in ("time_causal", "fast_slow_causal"):
        assert not any(leaking_targets(layout, make_mask(name, layout), layers))
    one_stream = FrameLayout.from_plan(DenseSampling(7, 2).plan(max(layout.frame_index) + 1), patches=1)
    for name in ("frame_causal", "sliding_window"):
        assert not any(leaking_targets(one_stream, make_mask(name, one_stream), layers))
    full = leaking_targets(layout, make_mask("full", layout), layers)
    assert full == tuple(target >= 0 for target in next_frame_targets(layout))


def test_plot_writes_a_picture(tmp_path):
    layout = FrameLayout.from_plan(FastSlowSampling(4, 4).plan(16), patches=3)
    path = time_causal(layout).plot(tmp_path / "mask.png", "time-causal", layout.stream)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda layout: make_mask("causal", layout), "'causal' is unknown; valid names are frame_causal"),
        (lambda layout: make_mask(lambda _: torch.ones(2, 2), layout), "must return a FrameMask, got Tensor"),
        (lambda layout: sliding_window(layout, window_size=0), "must be >= 1, got 0"),
        (lambda _: FrameMask.from_matrix(torch.ones(2, 2), 1), "needs bool"),
        (lambda _: FrameMask.from_matrix(torch.ones(2, 2, dtype=torch.bool), [1, 2, 3]), "each of 2 frames"),
        (lambda layout: build_block_mask(time_causal(layout), "cpu", 0), "block_size must be positive"),
        (lambda _: FrameMask.stack([]), "at least one mask"),
    ],
)
def test_impossible_masks_stop_at_once(build, message):
    with pytest.raises(ConfigError, match=message):
        build(FrameLayout.from_arrays(range(3), patches=2))
