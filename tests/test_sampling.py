"""Plans: the contract as a table, and properties over all settings against a slow, obvious reference."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline import (
    ConfigError,
    DenseSampling,
    FastSlowSampling,
    make_sampling,
    sampling_for_length,
)

counts = st.integers(1, 12)
samplings = st.builds(
    FastSlowSampling,
    num_fast=counts,
    num_slow=counts,
    fast_stride=st.integers(1, 5),
    slow_stride=st.integers(1, 9),
    slow_coverage=st.sampled_from(["clip", "stride"]),
    order=st.sampled_from(["concat", "interleave", "time"]),
)


def test_the_classic_example():
    plan = FastSlowSampling(num_fast=8, num_slow=8, fast_stride=1, slow_stride=4).plan(16)
    assert plan.frame_index.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 8, 9, 10, 11, 12, 13, 14, 15]
    assert plan.stream.tolist() == [0] * 8 + [1] * 8
    assert plan.valid.all()
    assert plan.unique.tolist() == [0, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("coverage", "length", "slow"),
    [
        ("clip", 64, [0, 16, 32, 48]),
        ("stride", 64, [32, 40, 48, 56]),
        ("stride", 32, [0, 8, 16, 24]),
        ("stride", 31, [0, 7, 15, 23]),  # shorter than 4 * 8: the whole clip instead
    ],
)
def test_slow_coverage(coverage, length, slow):
    plan = FastSlowSampling(1, 4, 1, 8, slow_coverage=coverage).plan(length)
    assert plan.frame_index[:4].tolist() == slow


def test_a_short_clip_is_padded_at_the_front_and_never_doubled():
    plan = FastSlowSampling(num_fast=4, num_slow=4, fast_stride=2).plan(3)
    assert plan.frame_index.tolist() == [0, 0, 1, 2, 0, 0, 0, 2]
    assert plan.valid.tolist() == [False, True, True, True, False, False, True, True]


def test_end_is_the_current_moment():
    sampling = FastSlowSampling(4, 4)
    np.testing.assert_array_equal(sampling.plan(100, end=20).frame_index, sampling.plan(20).frame_index)


def test_orders_hold_the_same_frames():
    plans = {o: FastSlowSampling(3, 6, order=o).plan(24) for o in ("concat", "interleave", "time")}
    pairs = {o: sorted(zip(p.frame_index, p.stream, strict=True)) for o, p in plans.items()}
    assert pairs["concat"] == pairs["interleave"] == pairs["time"]
    assert plans["interleave"].stream.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert (np.diff(plans["time"].frame_index) >= 0).all()


@given(samplings, st.integers(1, 90), st.data())
def test_plan_properties(sampling, length, data):
    end = data.draw(st.integers(1, length))
    plan = sampling.plan(length, end=end)
    assert plan.num_frames == sampling.num_frames == len(plan.stream) == len(plan.valid)
    np.testing.assert_array_equal(plan.unique[plan.gather], plan.frame_index)
    np.testing.assert_array_equal(plan.unique, np.unique(plan.frame_index))
    assert plan.frame_index.min() >= 0
    assert plan.frame_index.max() == end - 1  # the newest frame is always there, none after it
    for stream, count in ((0, sampling.num_slow), (1, sampling.num_fast)):
        mine = plan.stream == stream
        assert mine.sum() == count
        index, valid = plan.frame_index[mine], plan.valid[mine]
        assert (np.diff(index[valid]) > 0).all()  # in time order, no frame twice
        assert valid[-1]
        assert (np.diff(valid.astype(int)) >= 0).all()  # padding only at the front
        assert (index[~valid] == index[valid][0]).all()  # and only with the stream's own earliest
    fast = plan.frame_index[(plan.stream == 1) & plan.valid]
    assert fast.tolist() == list(range(end - 1, -1, -sampling.fast_stride))[: sampling.num_fast][::-1]


@given(st.integers(1, 9), st.integers(1, 9))
def test_interleave_equals_its_definition(num_fast, num_slow):
    places = [(Fraction(2 * k + 1, 2 * num_slow), 0, k) for k in range(num_slow)]
    places += [(Fraction(2 * k + 1, 2 * num_fast), 1, k) for k in range(num_fast)]
    sampling = FastSlowSampling(num_fast, num_slow, order="interleave")
    assert sampling.streams().tolist() == [stream for _, stream, _ in sorted(places)]
    assert sampling.plan(200).stream.tolist() == sampling.streams().tolist()


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 80))
def test_dense_plan(num_frames, stride, length):
    plan = DenseSampling(num_frames, stride).plan(length)
    wanted = list(range(length - 1, -1, -stride))[:num_frames][::-1]
    assert plan.frame_index[plan.valid].tolist() == wanted
    assert plan.stream.tolist() == [1] * num_frames


def test_fps_counts_on_the_resampled_clip():
    times = np.arange(60) / 30
    plan = FastSlowSampling(num_fast=4, num_slow=2, fps=10).plan(60, timestamps=times)
    assert plan.frame_index[2:].tolist() == [50, 53, 56, 59]
    rounded = np.round(times, 3)  # as Matroska stores them
    again = FastSlowSampling(num_fast=4, num_slow=2, fps=10).plan(60, timestamps=rounded)
    np.testing.assert_array_equal(plan.frame_index, again.frame_index)


def test_fps_follows_timestamps_of_a_variable_rate():
    times = np.concatenate([np.arange(10) * 0.5, 5 + np.arange(20) * 0.05])
    plan = DenseSampling(6, fps=2).plan(30, timestamps=times)
    np.testing.assert_allclose(np.diff(times[plan.frame_index]), 0.5, atol=0.26)


@given(st.floats(1, 120), st.integers(1, 60))
def test_fps_never_counts_a_source_frame_twice(fps, length):
    plan = DenseSampling(16, fps=fps).plan(length, timestamps=np.arange(length) / 24)
    assert (np.diff(plan.frame_index[plan.valid]) > 0).all()
    assert plan.frame_index[-1] == length - 1


def test_fps_without_timestamps_is_refused():
    with pytest.raises(ConfigError, match=r"fps=10.*timestamps"):
        DenseSampling(4, fps=10).plan(20)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (29, DenseSampling(29)),
        (30, FastSlowSampling(8, 8, 1, 4, slow_coverage="stride")),
        (60, FastSlowSampling(8, 8, 1, 4, slow_coverage="stride")),
        (61, FastSlowSampling(16, 8, 2, 8, slow_coverage="stride")),
    ],
)
def test_presets_by_length(length, expected):
    assert sampling_for_length(length) == expected
    assert make_sampling({"kind": "length", "num_frames": length}) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FastSlowSampling(num_fast=0), "num_fast must be a whole number >= 1, got 0"),
        (lambda: FastSlowSampling(num_slow=0), "num_slow"),
        (lambda: FastSlowSampling(fast_stride=-1), "fast_stride"),
        (lambda: FastSlowSampling(num_fast=2.5), "num_fast"),
        (lambda: FastSlowSampling(order="random"), "order must be one of concat, interleave, time"),
        (lambda: FastSlowSampling(slow_coverage="all"), "slow_coverage"),
        (lambda: DenseSampling(0), "num_frames"),
        (lambda: DenseSampling(4, fps=0), "fps must be positive"),
        (lambda: DenseSampling(4, fps="fast"), "fps must be positive, a number .* got 'fast'"),
        (lambda: FastSlowSampling(fps=[8]), "fps must be positive"),
        (lambda: DenseSampling(4, fps=True), "fps must be positive"),
        (lambda: DenseSampling(4, fps=10**400), "fps must be positive"),
        (lambda: make_sampling({"kind": ["x"]}), r"\['x'\] is unknown"),
        (lambda: make_sampling({"kind": "length", "num_frames": "ten"}), "at least 1 frame, got 'ten'"),
        (lambda: sampling_for_length(None), "at least 1 frame, got None"),
        (lambda: DenseSampling(4).plan(0), "at least 1 frame"),
        (lambda: DenseSampling(4).plan(5, end=6), r"end must be within 1\.\.5"),
        (lambda: make_sampling({"kind": "fast_slow", "num_quick": 3}), "'num_quick' is unknown"),
        (lambda: make_sampling({"kind": "uniform"}), "'uniform' is unknown"),
        (lambda: make_sampling({"kind": "dense"}), "needs the key 'num_frames'"),
        (lambda: make_sampling(8), "must be a sampling object"),
        (lambda: sampling_for_length(0), "at least 1 frame"),
        (lambda: FastSlowSampling(order="time").streams(), "no fixed answer"),
    ],
)
def test_impossible_settings_stop_at_once(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_make_sampling_reads_every_field():
    spec = {"kind": "fast_slow", "num_fast": 3, "num_slow": 2, "fast_stride": 2, "order": "time", "fps": 8.0}
    assert make_sampling(spec) == FastSlowSampling(3, 2, 2, order="time", fps=8.0)
    assert make_sampling(DenseSampling(4)) == DenseSampling(4)


def test_slow_frames_snap_to_key_frames() -> None:
    sampling = FastSlowSampling(num_fast=2, num_slow=4, slow_snap="keyframe")
    plan = sampling.plan(64, key_frames=range(0, 64, 12))
    assert plan.frame_index.tolist() == [0, 12, 36, 48, 62, 63]  # from 0, 16, 32, 48
    assert plan.unique.tolist() == [0, 12, 36, 48, 62, 63]
    assert plan.valid.all()
    off = FastSlowSampling(num_fast=2, num_slow=4).plan(64, key_frames=range(0, 64, 12))
    assert off.frame_index.tolist() == [0, 16, 32, 48, 62, 63]


def test_a_key_frame_takes_in_one_slow_frame_and_the_others_stay() -> None:
    plan = FastSlowSampling(num_fast=1, num_slow=4, slow_snap="keyframe").plan(64, key_frames=[0, 30])
    assert plan.frame_index.tolist() == [0, 16, 30, 48, 63]


def test_no_slow_frame_snaps_beyond_the_current_moment() -> None:
    plan = FastSlowSampling(num_fast=1, num_slow=4, slow_snap="keyframe").plan(64, end=50, key_frames=[0, 39, 50, 60])
    assert plan.frame_index.tolist() == [0, 12, 25, 39, 49]  # from 0, 12, 25, 37


@given(
    length=st.integers(1, 300),
    end_share=st.floats(0.01, 1),
    keys=st.sets(st.integers(1, 299)),
    num_slow=st.integers(1, 12),
    coverage=st.sampled_from(["clip", "stride"]),
    order=st.sampled_from(["concat", "interleave", "time"]),
    fps=st.sampled_from([None, 7.0]),
)
def test_snapping_keeps_number_order_and_meaning(length, end_share, keys, num_slow, coverage, order, fps) -> None:
    end = max(1, round(length * end_share))
    key_frames = [0, *sorted(key for key in keys if key < length)]
    options = {"num_fast": 3, "num_slow": num_slow, "slow_coverage": coverage, "order": order, "fps": fps}
    facts = {"end": end, "timestamps": np.arange(length) / 24}
    plain = FastSlowSampling(**options).plan(length, **facts)
    plan = FastSlowSampling(**options, slow_snap="keyframe").plan(length, **facts, key_frames=key_frames)
    assert sorted(zip(plan.stream, plan.valid, strict=True)) == sorted(zip(plain.stream, plain.valid, strict=True))
    np.testing.assert_array_equal(plan.frame_index[plan.stream == 1], plain.frame_index[plain.stream == 1])
    slow = plan.frame_index[(plan.stream == 0) & plan.valid]
    before = plain.frame_index[(plain.stream == 0) & plain.valid]
    assert (np.diff(slow) > 0).all()
    assert slow.max() < end
    reachable = np.array([key for key in key_frames if key < end])
    for here, there in zip(before, slow, strict=True):
        assert there == here or (there in key_frames and abs(there - here) == np.abs(reachable - here).min())
    # No key frame is left unused by a slow frame to which it is the nearest.
    for here in before[[index not in slow or index in key_frames for index in before]]:
        nearest = reachable[np.abs(reachable - here) == np.abs(reachable - here).min()]
        assert set(nearest) & set(slow)
    padding = plan.frame_index[(plan.stream == 0) & ~plan.valid]
    assert set(padding) <= {slow[0]}


def test_snapping_needs_the_key_frames() -> None:
    with pytest.raises(ConfigError, match="needs the key frames"):
        FastSlowSampling(slow_snap="keyframe").plan(64)
    with pytest.raises(ConfigError, match="slow_snap must be one of None, keyframe, got 'nearest'"):
        FastSlowSampling(slow_snap="nearest")
