"""Several clips in one sequence: which go together, what sees what, and that the model notices none of it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils.data import DataLoader

from framestream.model.evaluate import evaluate
from framestream.model.towers import PixelTower
from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.dataset import ClipDataset
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.frame_mask import FrameMask
from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.masks import RULES, make_mask
from framestream.pipeline.packing import Packing, first_fit_decreasing
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling, Sampling
from framestream.pipeline.transforms import ClipTransform

from loader_setup import IMAGE_SIZE, make_loader
from model_setup import HIDDEN, PATCH, PATCHES, SIDE, small_module
from synthetic import read_indices
from synthetic_shards import make_shards

ORDERS = ("concat", "interleave", "time")
WINDOW = 2


def clip(
    num_frames: int, key: str = "", sampling: Sampling | None = None, side: int = 8, start: float = 0.0, **extra: Any
) -> dict[str, Any]:
    """A clip as `ClipTransform` gives it; by default of all its frames. Equal frames of the source are equal."""
    plan = (sampling or DenseSampling(num_frames)).plan(num_frames)
    generator = torch.Generator().manual_seed(num_frames)
    video = torch.randint(0, 256, (num_frames, 3, side, side), generator=generator, dtype=torch.uint8)
    index = torch.from_numpy(plan.frame_index)
    return {
        "frames": video[index],
        "frame_index": index,
        "frame_time": (start + index / 24).float(),
        "frame_stream": torch.from_numpy(plan.stream),
        "frame_valid": torch.from_numpy(plan.valid),
        "key": key or f"clip{num_frames}",
        "text": f"text of {num_frames}",
        "meta": {"frames": num_frames},
        **extra,
    }


def packed(clips: Sequence[dict[str, Any]], pack_to: int, patches: Any = 1, **options: Any) -> dict[str, Any]:
    return ClipCollator(patches_per_frame=patches, pack_to=pack_to, **options)(clips)


def tokens_per_frame(batch: dict[str, Any]) -> torch.Tensor:
    """int64 `[B, F]`, as the mask says."""
    mask = batch["frame_mask"]
    return torch.tensor([mask[b].patterns[0].lengths for b in range(len(mask))])


# -- which clips go together -----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(20, 40))
def test_every_clip_has_its_place_and_no_two_sequences_fit_into_one(sizes: list[int], capacity: int) -> None:
    bins = first_fit_decreasing(sizes, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in items) for items in bins]
    assert max(filled) <= capacity
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])
    assert all(list(items) == sorted(items) for items in bins)  # clips keep their order
    assert [items[0] for items in bins] == sorted(items[0] for items in bins)
    fewest = -(-sum(sizes) // capacity)
    assert len(bins) <= max(fewest, 2 * fewest - 1)


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [
        ([16, 12, 8, 5], 16, ((0,), (1,), (2, 3))),
        ([5, 8, 12, 16], 20, ((0,), (1, 2), (3,))),
        ([5, 8, 12, 16], 41, ((0, 1, 2, 3),)),
        ([4, 4, 4], 8, ((0, 1), (2,))),
        ([7], 7, ((0,),)),
    ],
)
def test_the_largest_come_first(sizes: list[int], capacity: int, expected: Any) -> None:
    assert first_fit_decreasing(sizes, capacity) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=7), min_size=1, max_size=8),
    st.integers(0, 60),
    st.sampled_from([(1, 5), (3, 2), (4, 4), (7, 1)]),
)
def test_sequences_get_one_shape(clips: list[list[int]], more: int, patches: tuple[int, int]) -> None:
    pack_to = 7 * max(patches) + more
    layouts = [FrameLayout.from_arrays(range(len(streams)), streams, patches=patches) for streams in clips]
    plan = Packing.of(layouts, pack_to)
    counts = {n for layout in layouts for n in layout.patches}
    own = 0
    for members, padding in zip(plan.sequences, plan.padding, strict=True):
        frames = sum(layouts[i].num_frames for i in members)
        tokens = sum(layouts[i].num_tokens for i in members)
        own += tokens
        assert frames + len(padding) == plan.num_frames
        assert tokens + sum(padding) == plan.num_tokens
        assert all(1 <= n <= max(counts) for n in padding)
        assert set(padding) <= counts or len(counts) > 1
        assert tokens <= pack_to
    assert plan.num_tokens <= pack_to + (plan.num_frames if len(counts) > 1 else 0)
    assert plan.fill_rate == own / (len(plan.sequences) * plan.num_tokens)


def test_a_full_sequence_of_few_frames_beside_one_of_many_costs_a_token_for_each_frame_it_lacks() -> None:
    layouts = [FrameLayout.from_arrays([0], [0], patches=(8, 2)), FrameLayout.from_arrays(range(4), patches=(8, 2))]
    plan = Packing.of(layouts, 8)
    assert (plan.num_frames, plan.num_tokens, plan.padding) == (5, 12, ((1, 1, 1, 1), (4,)))


# -- the batch -------------------------------------------------------------------------------------------


def test_a_packed_batch_is_the_contract_and_nothing_else() -> None:
    clips = [clip(5, start=7.0), clip(8), clip(12), clip(16)]
    batch = packed(clips, pack_to=83, patches=4, position_ids="source")
    # 20 frames fit into 83 tokens: 5, 8 + 12, 16.
    shapes = {
        "video_frames": ((3, 20, 3, 8, 8), torch.uint8),
        "frame_index": ((3, 20), torch.int64),
        "frame_time": ((3, 20), torch.float32),
        "frame_stream": ((3, 20), torch.uint8),
        "frame_valid": ((3, 20), torch.bool),
        "frame_clip": ((3, 20), torch.int64),
        "frame_position_ids": ((3, 80), torch.int64),
    }
    assert set(batch) == {*shapes, "frame_mask", "keys", "text", "meta", "fill_rate"}
    assert {name: (tuple(batch[name].shape), batch[name].dtype) for name in shapes} == shapes
    assert batch["frame_mask"].shape == (3, 20, 20)
    assert batch["keys"] == ["clip5", "clip8", "clip12", "clip16"]
    assert batch["text"] == ["text of 5", "text of 8", "text of 12", "text of 16"]
    assert batch["meta"] == [{"frames": n} for n in (5, 8, 12, 16)]
    assert batch["fill_rate"] == 41 / 60
    assert batch["frame_clip"].tolist() == [
        [0] * 5 + [-1] * 15,
        [1] * 8 + [2] * 12,
        [3] * 16 + [-1] * 4,
    ]
    assert torch.equal(batch["frame_valid"], batch["frame_clip"] >= 0)
    for number, one in enumerate(clips):
        own = batch["frame_clip"] == number
        assert torch.equal(batch["video_frames"][own], one["frames"])
        for name in ("frame_index", "frame_time", "frame_stream"):
            assert torch.equal(batch[name][own], one[name])
        in_tokens = own.repeat_interleave(4, dim=1)
        assert torch.equal(batch["frame_position_ids"][in_tokens], one["frame_index"].repeat_interleave(4))
    padding = batch["frame_clip"] < 0
    for name in ("video_frames", "frame_index", "frame_time"):
        assert not batch[name][padding].any()


def test_frames_that_pad_a_short_clip_are_not_packed() -> None:
    sampling = FastSlowSampling(num_fast=4, num_slow=4)
    batch = packed([clip(2, sampling=sampling), clip(20, sampling=sampling), clip(3, sampling=sampling)], 8)
    assert batch["frame_clip"].tolist() == [[0] * 4 + [-1] * 4, [1] * 8, [2] * 6 + [-1] * 2]
    assert batch["frame_index"][0].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert batch["frame_stream"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert batch["fill_rate"] == 18 / 24


def test_sequence_positions_begin_anew_with_each_clip() -> None:
    batch = packed([clip(2), clip(3)], pack_to=12, patches=2, position_ids="sequence")
    assert batch["frame_position_ids"].tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 0, 0]]


def test_fields_stay_those_of_the_clips() -> None:
    clips = [clip(n, **{"label.npy": torch.tensor([n]), "tags.json": [n]}) for n in (3, 5, 4)]
    batch = packed(clips, pack_to=8, normalize=(0.5, 0.5))
    assert batch["label.npy"].tolist() == [[3], [5], [4]]
    assert batch["tags.json"] == [[3], [5], [4]]
    assert batch["video_frames"].dtype == torch.float32
    torch.testing.assert_close(
        batch["video_frames"][batch["frame_clip"] == 1], clips[1]["frames"].float() / 127.5 - 1, rtol=1e-5, atol=1e-5
    )


def test_one_clip_in_each_sequence_is_the_batch_without_packing() -> None:
    clips = [clip(6, "a"), clip(6, "b", start=3.0)]
    apart = ClipCollator(patches_per_frame=3)(clips)
    batch = packed(clips, pack_to=18, patches=3)
    assert batch.pop("frame_clip").tolist() == [[0] * 6, [1] * 6]
    assert batch.pop("fill_rate") == 1.0
    assert batch.pop("frame_mask") == apart.pop("frame_mask")
    assert all(torch.equal(v, apart[k]) if isinstance(v, torch.Tensor) else v == apart[k] for k, v in batch.items())
    assert set(batch) == set(apart)


@pytest.mark.parametrize("pack_to", [0, True, 3.5, 3, "64"])
def test_an_impossible_length_is_refused_at_once(pack_to: Any) -> None:
    with pytest.raises(ConfigError, match=r"pack_to is .*at least the 4 of one frame"):
        ClipCollator(patches_per_frame=(16, 4), pack_to=pack_to)


def test_a_clip_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"clip long, 9 frames, has 36 tokens, .*pack_to=35; .* at least 36"):
        packed([clip(3), clip(9, "long")], pack_to=35, patches=4)
    with pytest.raises(ConfigError, match=r"\[3, 8, 8\] in clip a and \[3, 9, 9\] in b; .* one image_size"):
        packed([clip(3, "a"), clip(4, "b", side=9)], pack_to=8)
    nothing = {**clip(3, "none"), "frame_valid": torch.zeros(3, dtype=torch.bool)}
    with pytest.raises(ConfigError, match="clip none has no valid frame"):
        packed([clip(2), nothing], pack_to=8)


# -- masks -----------------------------------------------------------------------------------------------


@st.composite
def packings(draw: Any, max_patches: int = 9) -> tuple[list[dict[str, Any]], Any, int]:
    """Clips of one sampling, some too short for it; patches; and a length that holds the longest."""
    sampling = FastSlowSampling(
        num_fast=draw(st.integers(1, 5)), num_slow=draw(st.integers(1, 4)), order=draw(st.sampled_from(ORDERS))
    )
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    clips = [clip(n, f"{i}", sampling, side=1) for i, n in enumerate(lengths)]
    patches = draw(st.one_of(st.integers(1, max_patches), st.tuples(*[st.integers(1, max_patches)] * 2)))
    slow, fast = (patches, patches) if isinstance(patches, int) else patches
    longest = sampling.num_slow * slow + sampling.num_fast * fast
    return clips, patches, draw(st.integers(longest, 3 * longest))


def may_attend(rule: str, batch: dict[str, Any], row: int) -> torch.Tensor:
    """bool `[N, N]` of a sequence, written down pair by pair from nothing but the batch's own tensors."""
    clips, index, stream = (batch[name][row].tolist() for name in ("frame_clip", "frame_index", "frame_stream"))
    frames = len(clips)
    matrix = torch.eye(frames, dtype=torch.bool)
    for q in range(frames):
        for k in range(frames):
            if clips[q] != clips[k] or clips[q] < 0:
                continue
            past = index[k] <= index[q]
            matrix[q, k] = {
                "full": True,
                "frame_causal": k <= q,
                "sliding_window": q - WINDOW < k <= q,  # a clip's frames stand together
                "time_causal": past,
                "fast_slow": stream[k] == 0 or (stream[q] == 1 and past),
                "fast_slow_causal": past and (stream[k] == 0 or stream[q] == 1),
            }[rule]
    counts = tokens_per_frame(batch)[row]
    return matrix.repeat_interleave(counts, 0).repeat_interleave(counts, 1)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(packings())
def test_every_form_of_the_mask_equals_brute_force(rule: str, drawn: Any) -> None:
    clips, patches, pack_to = drawn
    batch = packed(clips, pack_to, patches, mask=rule, window_size=WINDOW)
    mask, size = batch["frame_mask"], len(batch["frame_clip"])
    brute = torch.stack([may_attend(rule, batch, row) for row in range(size)])
    tokens = brute.shape[-1]
    assert batch["frame_position_ids"].shape == (size, tokens)
    assert torch.equal(mask.dense()[:, 0], brute)
    for row in range(size):
        ranges = torch.zeros(tokens, tokens, dtype=torch.bool)
        for group in mask.ranges()[mask.clips[row]]:
            for start, stop in group.keys:
                ranges[group.start : group.stop, start:stop] = True
        assert torch.equal(ranges, brute[row])
    block_mask = mask.block_mask(block_size=16)
    rows = len(block_mask.kv_num_blocks)
    assert torch.equal(create_mask(block_mask.mask_mod, size, 1, tokens, tokens, device="cpu")[:, 0], brute)
    reference = create_block_mask(
        lambda b, h, q, k: brute[b, q, k], rows, 1, tokens, tokens, device="cpu", BLOCK_SIZE=16
    )
    assert torch.equal(block_mask.to_dense(), reference.to_dense())
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(block_mask, name), getattr(reference, name)), name
    # No pair of different clips, and nothing to or from padding but to itself.
    whose = torch.stack([batch["frame_clip"][b].repeat_interleave(n) for b, n in enumerate(tokens_per_frame(batch))])
    assert not (brute & (whose[:, :, None] != whose[:, None, :])).any()
    assert brute.any(-1).all()


@settings(max_examples=60, deadline=None)
@given(packings(), st.sampled_from(list(RULES)))
def test_the_rule_of_the_packed_layout_is_the_mask_too(drawn: Any, rule: str) -> None:
    """So settings of a model that name the rule agree with the batch."""
    clips, patches, pack_to = drawn
    batch = packed(clips, pack_to, patches, mask=rule, window_size=WINDOW)
    options = {"window_size": WINDOW} if rule == "sliding_window" else {}
    for row, counts in enumerate(tokens_per_frame(batch)):
        index, stream, valid, own = (
            batch[name][row].tolist() for name in ("frame_index", "frame_stream", "frame_valid", "frame_clip")
        )
        layout = FrameLayout(tuple(index), tuple(stream), tuple(valid), tuple(own), tuple(counts.tolist()))
        assert make_mask(rule, layout, **options) == batch["frame_mask"][row]
        for query, target in enumerate(next_frame_targets(layout)):
            assert target < 0 or (own[query] == own[target] >= 0 and stream[query] == stream[target])


def test_a_rule_of_ones_own_cannot_join_clips() -> None:
    def everything(layout: FrameLayout) -> FrameMask:
        return FrameMask.from_matrix(np.ones((layout.num_frames,) * 2, dtype=bool), layout.patches)

    clips = [clip(3), clip(5), clip(2)]
    assert packed(clips, 11, mask=everything)["frame_mask"] == packed(clips, 11, mask="full")["frame_mask"]


def test_slow_and_fast_frames_of_256_and_64_tokens() -> None:
    sampling = FastSlowSampling(num_fast=8, num_slow=8)
    batch = packed([clip(n, sampling=sampling) for n in (16, 4, 40, 3)], 4096, (256, 64), block_mask=True)
    # Tokens of the clips: 2560, 1280, 2560 and 960.
    assert batch["frame_clip"].amax(1).tolist() == [1, 3]
    assert batch["frame_position_ids"].shape == (2, 4096)
    assert batch["fill_rate"] == 7360 / 8192
    counts = tokens_per_frame(batch)
    for row in range(2):
        for frames, own in zip(counts[row].tolist(), batch["frame_clip"][row].tolist(), strict=True):
            assert own < 0 or frames in (256, 64)
    dense = batch["frame_mask"].dense()[:, 0]
    reference = create_block_mask(lambda b, h, q, k: dense[b, q, k], 2, None, 4096, 4096, device="cpu")
    assert torch.equal(batch["block_mask"].to_dense(), reference.to_dense())


def test_diagonal_wants_masks_of_single_clips() -> None:
    one = make_mask("full", FrameLayout.from_arrays([0, 1], patches=2))
    for masks in ([], [FrameMask.stack([one, one])]):
        with pytest.raises(ConfigError, match=r"FrameMask.diagonal needs"):
            FrameMask.diagonal(masks)


# -- the model -------------------------------------------------------------------------------------------

LENGTHS = (9, 5, 2, 7, 1)


def model_clips(sampling: Sampling) -> list[dict[str, Any]]:
    return [clip(n, sampling=sampling, side=SIDE, start=40.0 * i) for i, n in enumerate(LENGTHS)]


@pytest.mark.filterwarnings("ignore:.*targets of this batch are visible")
@pytest.mark.parametrize("backend", ["ranges", "dense"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_packed_clip_is_scored_as_it_is_alone(rule: str, order: str, backend: str) -> None:
    sampling = FastSlowSampling(num_fast=5, num_slow=3, order=order)  # type: ignore[arg-type]
    clips = model_clips(sampling)
    options: dict[str, Any] = {"mask": rule, "window_size": WINDOW}
    module = small_module(attention_backend=backend, on_leak="allow", num_layers=3)
    batch = packed(clips, 14 * PATCHES, PATCHES, **options)
    assert len(batch["frame_clip"]) < len(clips)
    out = module(batch)
    targets = 0
    for number, one in enumerate(clips):
        kept = one["frame_valid"]
        bare = {k: v[kept] if k.startswith("frame") else v for k, v in one.items()}
        alone = module(ClipCollator(patches_per_frame=PATCHES, **options)([bare]))
        own = batch["frame_clip"] == number
        torch.testing.assert_close(out.frame_error[own], alone.frame_error[0], equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            out.copy_last_error[own], alone.copy_last_error[0], equal_nan=True, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(out.predictions[own], alone.predictions[0], rtol=1e-4, atol=1e-5)
        newest = one["frame_index"][kept] == one["frame_index"].max()
        assert out.frame_error[own][newest].isnan().all()  # no target across the border of a clip
        targets += alone.targets
    assert out.targets == targets
    assert out.frame_error[batch["frame_clip"] < 0].isnan().all()
    assert out.frame_error.isnan().sum() == out.frame_error.numel() - targets


@pytest.mark.parametrize("sampling", [DenseSampling(9), FastSlowSampling(num_fast=5, num_slow=4)])
@pytest.mark.parametrize("pools", [{}, {"fast_pool": "average:2"}, {"slow_pool": 4}])
def test_the_loss_and_its_gradients_are_those_of_the_batch_without_packing(
    sampling: Sampling, pools: dict[str, Any]
) -> None:
    clips = model_clips(sampling)
    patches = (PATCHES // (16 if "slow_pool" in pools else 1), PATCHES // (4 if "fast_pool" in pools else 1))
    found = []
    for pack_to in (None, 11 * PATCHES):
        module = small_module(**pools, target_norm=True)
        out = module(ClipCollator(patches_per_frame=patches, pack_to=pack_to)(clips))
        out.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
        found.append((out.loss, grads, out.targets, out.leaking_targets))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)
    assert found[1][2:] == found[0][2:]
    assert found[0][2] > 0


@pytest.mark.filterwarnings("ignore:.*targets of this batch are visible")
@pytest.mark.parametrize("rule", ["time_causal", "full"])
@pytest.mark.parametrize("backend", ["ranges", "dense"])
@pytest.mark.parametrize("patches", [PATCHES, (PATCHES, PATCHES // 4)])
def test_no_bit_of_a_clip_reaches_another(rule: str, backend: str, patches: Any) -> None:
    pools = {} if isinstance(patches, int) else {"fast_pool": 2}
    module = small_module(attention_backend=backend, on_leak="allow", num_layers=3, **pools)
    batch = packed(model_clips(FastSlowSampling(num_fast=5, num_slow=3)), 30 * PATCHES, patches, mask=rule)
    assert (batch["frame_clip"].amax(1) > batch["frame_clip"][:, 0]).all()  # several in each
    with torch.no_grad():
        calm = module(batch).predictions
        for number in (*range(len(LENGTHS)), -1):
            own = batch["frame_clip"] == number
            video = batch["video_frames"].clone()
            video[own] = 255 - video[own]
            moved = (module({**batch, "video_frames": video}).predictions != calm).flatten(2).any(-1)
            assert not moved[~own].any()
            assert moved[own].any() == (number >= 0)  # and what stands in padding reaches nothing at all


def test_times_count_from_each_clips_own_beginning() -> None:
    """Clips hours apart in one sequence: rotary angles are as exact as those of each clip alone."""
    near = [clip(6, side=SIDE), clip(5, side=SIDE)]
    far = [clip(6, side=SIDE), clip(5, side=SIDE)]
    far[1]["frame_time"] = far[1]["frame_time"].double() + 2.0**22
    far[0]["frame_time"] = far[0]["frame_time"].double()
    module = small_module()
    a, b = (module(packed(clips, 11 * PATCHES, PATCHES)) for clips in (near, far))
    torch.testing.assert_close(a.predictions, b.predictions, rtol=1e-5, atol=1e-5)


def test_settings_of_the_module_go_with_packed_batches() -> None:
    clips = model_clips(FastSlowSampling(num_fast=5, num_slow=3))
    batch = packed(clips, 14 * PATCHES, PATCHES, mask="time_causal")
    reference = small_module()(batch).predictions
    assert torch.equal(small_module(mask="time_causal")(batch).predictions, reference)
    with pytest.raises(ConfigError, match="contradict the batch's frame_mask"):
        small_module(mask="full")(batch)
    del batch["frame_mask"]  # the module's own default
    assert torch.equal(small_module()(batch).predictions, reference)
    wrong = packed(clips, 200, 4)
    with pytest.raises(ConfigError, match=r"frame_mask is for .*4.* patches per frame"):
        small_module()(wrong)
    with pytest.raises(ConfigError, match=r"frame_clip must be a tensor"):
        small_module()({**batch, "frame_clip": batch["frame_clip"][0]})
    history = small_module(num_hist=2)
    alone = history(ClipCollator(patches_per_frame=PATCHES)(clips[:1])).predictions[0]
    batch = packed(clips, 14 * PATCHES, PATCHES)
    torch.testing.assert_close(history(batch).predictions[batch["frame_clip"] == 0], alone, rtol=1e-4, atol=1e-5)


def test_token_order_stays_within_a_clip_too() -> None:
    clips = [clip(n, side=SIDE) for n in (6, 5)]
    module = small_module(use_frame_causal_mask=False)
    out = module(packed(clips, 12 * PATCHES, PATCHES, mask="frame_causal"))
    for one, rows in zip(clips, (slice(0, 6), slice(6, 11)), strict=True):
        alone = module(ClipCollator(patches_per_frame=PATCHES, mask="frame_causal")([one]))
        torch.testing.assert_close(out.predictions[0, rows], alone.predictions[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("timed", [False, True])
def test_a_clip_reads_the_host_states_of_its_own_alone(timed: bool) -> None:
    clips = [clip(n, side=SIDE) for n in (9, 5, 7, 2)]
    batch = packed(clips, 16 * PATCHES, PATCHES)
    assert batch["frame_clip"].amax(1).tolist() == [2, 3]
    module = small_module()
    torch.manual_seed(0)
    states, when = torch.randn(4, 3, HIDDEN, requires_grad=True), torch.tensor([[0.0, 0.1, 0.2]]).expand(4, -1)
    options = (states, when if timed else None)
    out = module(batch, *options)
    for number, one in enumerate(clips):
        its = (x if x is None else x[[number]] for x in options)
        alone = module(ClipCollator(patches_per_frame=PATCHES)([one]), *its)
        own = batch["frame_clip"] == number
        torch.testing.assert_close(out.predictions[own], alone.predictions[0], rtol=1e-4, atol=1e-5)
        pushed = states.detach().clone()
        pushed[number] += 2
        moved = (module(batch, pushed, options[1]).predictions != out.predictions).flatten(2).any(-1)
        assert torch.equal(moved, own)
    out.loss.backward()
    assert (states.grad.abs().sum((1, 2)) > 0).all()
    with pytest.raises(ConfigError, match=r"hidden_states must have a row for each of the 4 clips.*\[2, 3, 12\]"):
        module(batch, states[:2])
    with pytest.raises(ConfigError, match=r"hidden_time must have a row for each of the 4 clips.*\[3\]"):
        module(batch, states, when[0])
    with pytest.raises(ConfigError, match=r"hidden_time was given without"):
        module(batch, None, when)


def test_equal_indices_of_two_clips_are_two_frames_to_encode() -> None:
    asked = []

    class Counting(PixelTower):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            asked.append(len(frames))
            return super().forward(frames)

    sampling = FastSlowSampling(num_fast=3, num_slow=3)
    clips = [clip(3, "a", sampling, SIDE), clip(4, "b", sampling, SIDE)]
    small_module(Counting(SIDE, PATCH))(packed(clips, 20 * PATCHES, PATCHES))
    assert asked == [3 + len(set(clips[1]["frame_index"].tolist()))]


def test_what_needs_a_clip_in_each_sequence_refuses_others() -> None:
    batch = packed([clip(9, side=SIDE), clip(6, side=SIDE)], 16 * PATCHES, PATCHES)
    module = small_module()
    with pytest.raises(ConfigError, match=r"rollout continues one clip.*without pack_to"):
        module.rollout(batch, 2)
    with pytest.raises(ConfigError, match=r"rollout continues one clip.*rollout_steps: 0"):
        small_module(rollout_steps=2).train()(batch)
    with pytest.raises(ConfigError, match=r"evaluation counts clips.*without pack_to"):
        evaluate(module, [batch], rollout_steps=0)


# -- loaders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 clips."""
    return make_shards(tmp_path_factory.mktemp("shards"), num_samples=9, samples_per_shard=4)


def comparable(batch: dict[str, Any]) -> bytes:
    plain = {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return pickle.dumps(plain)


def check_pixels(batch: dict[str, Any]) -> None:
    valid = batch["frame_valid"]
    assert read_indices(batch["video_frames"][valid]) == batch["frame_index"][valid].tolist()


def test_the_loader_packs_and_says_how_full(shards: Path) -> None:
    streams = []
    for workers in (0, 2):
        options = {"pack_to": 64, "random_end": True, "batch_size": 4, "num_workers": workers, "drop_last": False}
        loader = make_loader(shards, **options)
        batches = list(loader)
        for batch in batches:
            check_pixels(batch)
            assert batch["frame_clip"].unique().tolist()[-1] == len(batch["keys"]) - 1
        mean = np.mean([batch["fill_rate"] for batch in batches])
        assert loader.stats()["fill_rate"] == pytest.approx(mean)
        assert 0 < mean <= 1
        assert loader.stats()["samples"] == 9
        streams.append([comparable(batch) for batch in batches])
        loader.close()
    assert streams[0] == streams[1]
    apart = make_loader(shards, batch_size=4, random_end=True, drop_last=False)
    assert [batch["keys"] for batch in apart] == [batch["keys"] for batch in batches]
    assert "fill_rate" not in apart.stats()


def test_the_loader_refuses_a_length_that_clips_can_exceed(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"A clip of 8 frames.*has 32 tokens.*pack_to=31; .* at least 32"):
        make_loader(shards, pack_to=31)
    with pytest.raises(ConfigError, match=r"pack_to is 0"):
        make_loader(shards, pack_to=0)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_packed_batches_survive_torchs_loader(shards: Path, context: str) -> None:
    dataset = ClipDataset(shards, sampling=DenseSampling(12, 3), image_size=IMAGE_SIZE, random_end=True)
    options: dict[str, Any] = {"batch_size": 4, "collate_fn": ClipCollator(patches_per_frame=4, pack_to=64)}
    here = [comparable(batch) for batch in DataLoader(dataset, **options)]
    there = list(DataLoader(dataset, num_workers=2, multiprocessing_context=context, pin_memory=True, **options))
    for batch in there:
        check_pixels(batch)
        assert isinstance(batch["frame_mask"], FrameMask)
        assert batch["frame_clip"].is_pinned() == torch.accelerator.is_available()
    assert [comparable(batch) for batch in there] == here


def test_a_webdataset_pipeline_packs_too(shards: Path) -> None:
    pipeline = (
        wds.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False)
        .map(ClipTransform(DenseSampling(12, 3), image_size=IMAGE_SIZE, random_end=True))
        .batched(4, collation_fn=ClipCollator(patches_per_frame=4, pack_to=64))
    )
    batches = list(wds.WebLoader(pipeline, batch_size=None, num_workers=1))
    assert [len(batch["keys"]) for batch in batches] == [4, 4, 1]
    for batch in batches:
        check_pixels(batch)
