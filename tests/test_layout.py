"""Layouts, position IDs and targets."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline import (
    ConfigError,
    DenseSampling,
    FastSlowSampling,
    FrameLayout,
    frame_position_ids,
    next_frame_targets,
)


def test_position_ids_are_shared_within_a_frame():
    layout = FrameLayout.from_arrays(range(3), patches=2)
    assert frame_position_ids(layout, "sequence").tolist() == [0, 0, 1, 1, 2, 2]
    assert frame_position_ids(layout).dtype == torch.int64


def test_source_position_ids_tell_the_real_frame():
    layout = FrameLayout.from_plan(FastSlowSampling(2, 2).plan(16), patches=2)
    assert layout.position_ids().tolist() == [0, 0, 8, 8, 14, 14, 15, 15]
    with pytest.raises(ConfigError, match="'source' or 'sequence'"):
        layout.position_ids("time")


def test_patches_per_stream_and_per_frame():
    plan = FastSlowSampling(2, 1).plan(16)
    assert FrameLayout.from_plan(plan, patches=(4, 1)).patches == (4, 1, 1)
    assert FrameLayout.from_plan(plan, patches=[3, 2, 1]).patches == (3, 2, 1)
    assert FrameLayout.from_plan(plan, patches=(4, 1)).offsets() == (0, 4, 5, 6)
    with pytest.raises(ConfigError, match="one entry for each of 3 frames"):
        FrameLayout.from_plan(plan, patches=[1, 2, 3, 4])
    with pytest.raises(ConfigError, match="at least 1 patch"):
        FrameLayout.from_plan(plan, patches=0)


def test_targets_stay_in_their_stream():
    layout = FrameLayout.from_plan(FastSlowSampling(4, 4).plan(16), patches=1)
    assert next_frame_targets(layout) == (1, 2, 3, -1, 5, 6, 7, -1)


def test_padding_neither_has_nor_is_a_target():
    layout = FrameLayout.from_plan(FastSlowSampling(4, 4).plan(2), patches=1)
    assert layout.valid == (False, False, True, True) * 2
    assert next_frame_targets(layout) == (-1, -1, 3, -1, -1, -1, 7, -1)


@given(
    st.builds(
        FastSlowSampling,
        num_fast=st.integers(1, 9),
        num_slow=st.integers(1, 9),
        fast_stride=st.integers(1, 3),
        order=st.sampled_from(["concat", "interleave", "time"]),
    ),
    st.integers(1, 40),
)
def test_targets_are_the_nearest_later_frame_of_the_stream(sampling, length):
    layout = FrameLayout.from_plan(sampling.plan(length), patches=1)
    for i, target in enumerate(next_frame_targets(layout)):
        later = [
            j
            for j in range(layout.num_frames)
            if layout.valid[i] and layout.valid[j] and layout.stream[j] == layout.stream[i]
            if layout.frame_index[j] > layout.frame_index[i]
        ]
        assert target == (min(later, key=layout.frame_index.__getitem__) if later else -1)


def test_packing_keeps_clips_apart():
    one = FrameLayout.from_plan(DenseSampling(3).plan(9), patches=2, frame_time=[0.0, 0.5, 1.0])
    packed = FrameLayout.concat([FrameLayout.concat([one, one]), one])
    assert packed.clip == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert packed.num_tokens == 18
    assert next_frame_targets(packed) == (1, 2, -1, 4, 5, -1, 7, 8, -1)
    assert packed.frame_time == (0.0, 0.5, 1.0) * 3
    untimed = FrameLayout.from_plan(DenseSampling(3).plan(9), patches=2)
    assert FrameLayout.concat([one, untimed]).frame_time is None


def test_concat_keeps_interleaved_clips():
    mixed = FrameLayout.from_arrays([0, 0, 1, 1], clip=[5, 3, 5, 3], patches=1)
    assert FrameLayout.concat([mixed, mixed]).clip == (0, 1, 0, 1, 2, 3, 2, 3)


def test_a_layout_is_small_and_hashable():
    layout = FrameLayout.from_plan(FastSlowSampling().plan(99), frame_time=np.arange(16) / 8)
    assert len(pickle.dumps(layout)) < 1000
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert hash(layout) == hash(FrameLayout.from_plan(FastSlowSampling().plan(99)))


def test_fields_must_agree_in_length():
    with pytest.raises(ConfigError, match="stream has 2 entries, but frame_index has 3"):
        FrameLayout.from_arrays([0, 1, 2], stream=[0, 1])
    with pytest.raises(ConfigError, match="at least one frame"):
        FrameLayout.from_arrays([])
