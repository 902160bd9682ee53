"""Frames beyond the end of a clip: what parallel passes over the longer clip give, from a cache the mask bounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from framestream.model.generation import FrameGenerator, GeneratedFrame, generate_frames
from framestream.model.geometry import Geometry
from framestream.model.mask_choice import history_mask
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask, fast_slow_causal, frame_causal, make_mask, sliding_window, time_causal
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from model_setup import HIDDEN, PATCHES, batch_of, dense_batch, geometry_of, small_module, small_predictor

Rule = Callable[[FrameLayout], FrameMask]
FAST_SLOW = FastSlowSampling(num_fast=5, num_slow=4)
TOKEN_BYTES = 2 * 4 * 2 * 32 * 2  # of two clips, float32, keys and values, width, layers


def window_3(layout: FrameLayout) -> FrameMask:
    return sliding_window(layout, window_size=3)


def slow_and_window(layout: FrameLayout) -> FrameMask:
    """All slow frames of the past, and the last three frames."""
    slow = FrameMask.from_matrix(torch.tensor([[s == 0 for s in layout.stream]] * layout.num_frames), layout.patches)
    return (slow | window_3(layout) | sliding_window(layout, window_size=1)) & time_causal(layout)


def every_other(layout: FrameLayout) -> FrameMask:
    """Frames of the last nine that lie an even number of source frames before: seen, not seen, and seen again."""
    index = torch.tensor(layout.frame_index)
    even = (index[:, None] - index) % 2 == 0
    return FrameMask.from_matrix(even, layout.patches) & sliding_window(layout, window_size=9) & time_causal(layout)


RULES: dict[str, Rule] = {
    "frame_causal": frame_causal,
    "sliding_window": window_3,
    "time_causal": time_causal,
    "fast_slow_causal": fast_slow_causal,
    "slow_and_window": slow_and_window,
    "every_other": every_other,
}


def again(module: Any, batch: dict[str, Any], made: list[GeneratedFrame], rule: Rule, **states: Any) -> Tensor:
    """Predictions `[B, n, P, D]` of n generated frames, clip by clip in parallel passes over the longer clips."""
    clips, count = module.prepare(batch), len(made) - 1
    found = []
    for b, layout in enumerate(clips.layouts):
        fast = [i for i in range(layout.num_frames) if layout.valid[i] and layout.stream[i]]
        fast.sort(key=layout.frame_index.__getitem__)
        start, step = fast[-1], layout.frame_index[fast[-1]] - layout.frame_index[fast[-2]]
        old = [i for i in range(layout.num_frames) if layout.valid[i]]
        assert max(layout.frame_index[i] for i in old) == layout.frame_index[start]
        new = [layout.frame_index[start] + step * (k + 1) for k in range(count)]
        longer = FrameLayout.from_arrays(
            [*(layout.frame_index[i] for i in old), *new],
            [*(layout.stream[i] for i in old), *(1 for _ in new)],
            patches=[*(layout.patches[i] for i in old), *(layout.patches[start] for _ in new)],
        )
        tokens = [clips.embeddings[b, i, : layout.patches[i]] for i in old]
        tokens += [frame.embeddings[b] for frame in made[:count]]
        time = torch.cat([clips.time[b, old].double(), torch.stack([f.time[b] for f in made[:count]]).double()])
        following = torch.full((1, longer.num_frames), float(made[-1].time[b] - made[-2].time[b]))
        stream = torch.tensor(longer.stream)[None]
        geometry = Geometry.build([longer.patches], time[None], stream, following, clips.grids)
        own = {name: value[b : b + 1] for name, value in states.items()}
        sequence = torch.cat(tokens)[None]
        predicted, _ = module.predictor(sequence, geometry, module.plan(rule(longer), sequence), **own)
        queries = [old.index(start), *range(len(old), longer.num_frames)]
        offsets = longer.offsets()
        found.append(torch.stack([predicted[0, offsets[q] : offsets[q + 1]] for q in queries]))
    return torch.stack(found)


def stacked(made: list[GeneratedFrame]) -> Tensor:
    return torch.stack([frame.embeddings for frame in made], dim=1)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("order", ["concat", "interleave", "time", "dense"])
def test_it_equals_recomputing_the_longer_clip_each_time(name: str, order: str) -> None:
    rule = RULES[name]
    sampling = DenseSampling(6) if order == "dense" else FastSlowSampling(num_fast=5, num_slow=4, order=order)  # type: ignore[arg-type]
    batch = batch_of(sampling, (24, 30, 24), mask=rule)  # type: ignore[arg-type]
    module = small_module()
    made = list(generate_frames(module, batch, 7, mask=rule))
    with torch.no_grad():
        want = again(module, batch, made, rule)
    torch.testing.assert_close(stacked(made), want, atol=1e-5, rtol=1e-5)
    endless = list(islice(generate_frames(module, batch, mask=rule), 7))
    torch.testing.assert_close(stacked(endless), stacked(made), atol=1e-5, rtol=1e-5)
    assert torch.equal(endless[6].time, made[6].time)


@pytest.mark.parametrize(
    "config",
    [
        {"mask": "sliding_window", "window_size": 2},
        {"fast_pool": 2},
        {"slow_pool": 2, "num_hist": 3},
        {"num_hist": 2, "target_norm": True},
        {"use_frame_causal_mask": False},
        {"mask": slow_and_window, "fast_pool": 2, "attention_backend": "dense"},
    ],
    ids=lambda config: "-".join(config),
)
def test_under_other_settings_too_with_clips_that_differ_and_padding(config: dict[str, Any]) -> None:
    module = small_module(**config)
    batch = batch_of(FAST_SLOW, (24, 3, 30), mask=None)
    assert not batch["frame_valid"][1].all()

    def rule(layout: FrameLayout) -> FrameMask:
        mask = module.config.make_mask(layout)
        return mask & history_mask(layout, module.config.num_hist) if module.config.num_hist else mask

    states = {"hidden_states": torch.randn(3, 3, HIDDEN), "hidden_time": torch.rand(3, 3) / 20}
    made = list(generate_frames(module, batch, 7, frame_step=0.05, **states))
    with torch.no_grad():
        want = again(module, batch, made, rule, **states)
    torch.testing.assert_close(stacked(made), want, atol=1e-5, rtol=1e-5)
    last = torch.where(batch["frame_valid"], batch["frame_time"], 0).amax(1).double()
    torch.testing.assert_close(made[6].time, last + 7 * 0.05, atol=1e-6, rtol=0)


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("config", [{"mask": "sliding_window", "window_size": 4}, {"num_hist": 3}], ids=str)
def test_under_a_window_memory_and_work_stay_the_same(config: dict[str, Any], endless: bool) -> None:
    module = small_module(**config).requires_grad_(False)  # the counter wants to hook what has gradients
    steps = 60 if endless else 200
    stream = generate_frames(module, batch_of(FAST_SLOW, mask=None), None if endless else steps)
    bytes_of, keys, work = measured(stream, steps)
    assert len(set(bytes_of)) == 1
    assert len(set(keys[10:])) == 1
    assert len(set(work[1:])) == 1
    frames = keys[-1] // PATCHES
    assert frames == (4 if "window_size" in config else 6)  # num_hist: three of each stream
    assert bytes_of[-1] == TOKEN_BYTES * keys[-1]


@pytest.mark.parametrize("endless", [False, True])
def test_under_causal_masks_they_grow_by_one_frame_each_time(endless: bool) -> None:
    module = small_module().requires_grad_(False)
    stream = generate_frames(module, dense_batch(6, mask=None), None if endless else 64)
    bytes_of, keys, work = measured(stream, 64)
    assert keys[1:] == [(6 + k) * PATCHES for k in range(1, 64)]
    growth = {b - a for a, b in pairwise(work[1:])}
    assert len(growth) == 1
    assert growth.pop() > 0
    if endless:
        assert TOKEN_BYTES * keys[-1] <= bytes_of[-1] <= 3 * TOKEN_BYTES * keys[-1]
    else:  # what the last frame sees, no more, and from the beginning
        assert set(bytes_of) == {TOKEN_BYTES * keys[-1]}


def measured(stream: FrameGenerator, steps: int) -> tuple[list[int], list[int], list[int]]:
    """Bytes of the cache and attended key tokens of each frame; floating-point operations of every 16th."""
    bytes_of, keys, work = [], [], []
    # Of the attention kernels the counter does not know the CPU's.
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
    for k in range(steps):
        with FlopCounterMode(display=False, custom_mapping=known) if k % 16 == 0 else nullcontext() as counter:
            next(stream)
        bytes_of.append(stream.cache.nbytes)
        keys.append(stream.cache.key_tokens)
        if counter:
            work.append(counter.get_total_flops())
    return bytes_of, keys, work


def sdpa_flop(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Of queries times keys, and of weights times values."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def test_a_frame_out_of_the_windows_reach_changes_no_bit() -> None:
    """Two layers of a window of two frames look back two frames from the last true one."""
    module = small_module(mask="sliding_window", window_size=2)
    batch = dense_batch(8, mask=None)
    before = stacked(list(generate_frames(module, batch, 12)))
    for frame in range(8):
        changed = {**batch, "video_frames": batch["video_frames"].clone()}
        changed["video_frames"][0, frame] = 255 - changed["video_frames"][0, frame]
        after = stacked(list(generate_frames(module, changed, 12)))
        assert torch.equal(before[0], after[0]) == (frame < 5)
        assert torch.equal(before[1], after[1])


def test_slow_frames_of_the_generated_moment_are_hidden() -> None:
    module = small_module()
    batch = batch_of(FAST_SLOW, mask=None)
    batch["frame_index"][:, 3] = 24  # the last slow frame, at the first generated moment
    batch["frame_time"] = batch["frame_index"] / 30
    states = {"hidden_states": torch.randn(2, 2, HIDDEN), "hidden_time": torch.tensor([[0.0, 24 / 30]] * 2)}
    before = list(generate_frames(module, batch, 4, **states))
    batch["video_frames"][:, 3] = 7
    states["hidden_states"][:, 1] = 9.0
    after = list(generate_frames(module, batch, 4, **states))
    assert torch.equal(stacked(before), stacked(after))
    states["hidden_states"][:, 0] = 9.0
    assert not torch.equal(stacked(before), stacked(list(generate_frames(module, batch, 4, **states))))


@pytest.mark.parametrize("rule", [window_3, slow_and_window, every_other])
def test_without_end_frames_are_those_of_a_generation_with_one(rule: Rule) -> None:
    module = small_module(mask=rule)
    batch = batch_of(FastSlowSampling(num_fast=5, num_slow=4, order="time"), (24, 30), mask=None)
    for parameter in module.predictor.fade.parameters():
        parameter.data.zero_()  # else random weights blow up within a hundred frames
    stream = generate_frames(module, batch)
    endless = stacked(list(islice(stream, 110)))
    assert endless.isfinite().all()
    with_end = stacked(list(generate_frames(module, batch, 130)))  # near its end it gives places up sooner
    assert torch.equal(endless, with_end[:, :110])
    # What it remembers of the past does not grow either.
    for future in stream.cache.futures:
        assert future.known - future.base == 128
        assert future.base > 0


@pytest.mark.parametrize("last", range(1, 40, 3))
def test_states_of_the_first_generated_moment_are_hidden_however_its_time_rounds(last: int) -> None:
    module, batch = small_module(mask="frame_causal"), dense_batch(4)
    batch["frame_time"] = (torch.arange(last - 3, last + 1) / 30).expand(2, -1)
    when = torch.tensor([[0.0, (last + 1) / 30]] * 2)
    states = torch.randn(2, 2, HIDDEN)
    other = states.clone()
    other[:, 1] += 1
    frames = [
        next(generate_frames(module, batch, 2, hidden_states=s, hidden_time=when)).embeddings for s in (states, other)
    ]
    later = [
        list(generate_frames(module, batch, 2, hidden_states=s, hidden_time=when))[1].embeddings
        for s in (states, other)
    ]
    assert torch.equal(*frames)
    assert torch.equal(*later)


def test_a_generator_made_in_inference_mode_goes_on_outside() -> None:
    module, batch = small_module(mask="frame_causal"), dense_batch(4)
    with torch.inference_mode():
        made = generate_frames(module, batch, 3)
    want = torch.stack([frame.embeddings for frame in generate_frames(module, batch, 3)])
    assert torch.equal(torch.stack([frame.embeddings for frame in made]), want)


def test_autocast_stays_as_it_was_in_the_beginning() -> None:
    module, batch = small_module(), dense_batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        stream = generate_frames(module, batch, 4)
        inside = stacked(list(generate_frames(module, batch, 4)))
    assert stream.cache.layers[0].frames[0].dtype == torch.bfloat16
    assert torch.equal(stacked(list(stream)), inside)


@torch.no_grad()
def test_positions_are_as_exact_after_a_day_as_in_the_beginning() -> None:
    predictor = small_predictor()
    layout = FrameLayout.from_arrays(range(4), patches=4)
    tokens = torch.randn(1, 16, 6)
    mask = make_mask("frame_causal", layout)
    early, _ = predictor(tokens, geometry_of(layout), mask, time_origin=torch.zeros(1, 1, dtype=torch.float64))
    for turns in (60, 60 * 60 * 24):  # whole minutes are whole turns of no axis but the slowest
        late = geometry_of(layout, start=float(turns))
        moved, _ = predictor(tokens, late, mask, time_origin=torch.zeros(1, 1, dtype=torch.float64))
        torch.testing.assert_close(moved, early, atol=1e-5, rtol=1e-5)


def test_generation_records_no_gradients_and_leaves_the_mode_alone() -> None:
    module = small_module(gradient_checkpointing=True).train()
    made = list(generate_frames(module, dense_batch(6, mask=None), 3))
    assert module.training
    assert torch.is_grad_enabled()
    assert not made[-1].embeddings.requires_grad
    torch.testing.assert_close(made[0].embeddings, next(generate_frames(module, dense_batch(6), 1)).embeddings)


def test_a_rule_that_looks_back_to_what_was_given_up_is_refused_without_end_and_kept_with_one() -> None:
    def far(layout: FrameLayout) -> FrameMask:
        """From source frame 80 on, the first frame is seen again."""
        again = torch.zeros(layout.num_frames, layout.num_frames, dtype=torch.bool)
        again[torch.tensor(layout.frame_index) >= 80, 0] = True
        return sliding_window(layout, window_size=2) | FrameMask.from_matrix(again, layout.patches)

    module = small_module(mask=far)
    batch = dense_batch(4, clips=1, mask=None)
    assert len(list(generate_frames(module, batch, 80))) == 80
    with pytest.raises(ConfigError, match=r"see frame 0 of its sequence again.*give the number of steps"):
        list(islice(generate_frames(module, batch), 80))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "2"])
def test_impossible_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match=r"whole number of at least 1, or None"):
        generate_frames(small_module(), dense_batch(6), steps)


@pytest.mark.parametrize("frame_step", [0, -0.1, float("nan"), float("inf"), True, "fast"])
def test_impossible_paces_are_refused(frame_step: Any) -> None:
    with pytest.raises(ConfigError, match=r"frame_step must be a positive number of seconds"):
        generate_frames(small_module(), dense_batch(6), 2, frame_step=frame_step)


def test_clips_that_do_not_say_how_to_go_on_are_refused() -> None:
    module = small_module()
    one = batch_of(DenseSampling(4), (4, 1), mask=None)
    with pytest.raises(ConfigError, match=r"clip 1 has one fast frame only.*give frame_step"):
        generate_frames(module, one, 2)
    assert len(list(generate_frames(module, one, 2, frame_step=0.1))) == 2
    still = dense_batch(4)
    still["frame_time"][:] = 1.0
    with pytest.raises(ConfigError, match=r"last two fast frames of clip 0 stand at 1.0 s and 1.0 s"):
        generate_frames(module, still, 2)
    slow = dense_batch(4)
    slow["frame_stream"][1] = 0
    with pytest.raises(ConfigError, match=r"clip 1 has no valid fast frame"):
        generate_frames(module, slow, 2)
    with pytest.raises(ConfigError, match=r"hidden_states must have a row for each of 2 clips"):
        generate_frames(module, dense_batch(4), 2, hidden_states=torch.randn(3, 1, HIDDEN))
    packed = {**dense_batch(4), "frame_clip": torch.zeros(2, 4, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=r"generation continues one clip.*without pack_to"):
        generate_frames(module, packed, 2)


def test_a_mask_whose_rule_is_not_known_is_refused() -> None:
    module, batch = small_module(), dense_batch(6, mask="sliding_window", window_size=3)
    with pytest.raises(ConfigError, match=r"mask of clip 0 is not the one.*give the rule that made it"):
        generate_frames(module, batch, 2)
    with pytest.raises(ConfigError, match=r"mask of clip 0 is not the one"):
        generate_frames(module, batch, 2, mask="sliding_window", window_size=4)
    with pytest.raises(ConfigError, match=r"window_size=3 acts with mask='sliding_window' only"):
        generate_frames(module, batch, 2, window_size=3)
    assert len(list(generate_frames(module, batch, 2, mask="sliding_window", window_size=3))) == 2


@pytest.mark.slow
def test_the_benchmark_measures_generations_that_agree() -> None:
    from framestream.tools.bench_rollout import rollout

    rows = rollout(tokens=64, repeats=1, device="cpu")
    assert [row.case for row in rows] == ["frame_causal, N=64", "sliding_window 4, N=64"]
    for row in rows:
        assert row.facts["largest difference / largest value"] < 1e-5
        assert row.ms["cached"] < row.ms["recomputed"]
