"""How one source is cut: everything is in a clip or counted, nothing is held out and trained on at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.probe import VideoInfo
from framestream.tools.clips import Clip, Cut, cut
from framestream.tools.inputs import Source
from framestream.tools.shard_options import Cutting, ShardOptions, Transcode

# Shared machines stall now and then; nothing here is about time.
settings.register_profile("unhurried", deadline=None, max_examples=60)
settings.load_profile("unhurried")

SOURCE = Source("/videos/a.mp4", "a.mp4", "a")
EPSILON = 2e-6  # s: times of clips are rounded to a microsecond
SECONDS = st.floats(0.05, 20.0).map(lambda value: round(value, 3))


def video(num_frames: int = 250, fps: float = 25.0, keys: tuple[int, ...] = (0,)) -> VideoInfo:
    return VideoInfo(num_frames, fps, num_frames / fps, 64, 48, "h264", key_frames=keys)


def times(result: Cut) -> list[tuple[float, float]]:
    return [(clip.start, clip.end) for _, clip in result.clips]


def frames_of(clip: Clip, info: VideoInfo) -> range:
    return range(*(clip.frames or (0, info.num_frames)))


@st.composite
def videos(draw: st.DrawFn) -> VideoInfo:
    """Constant and variable rates, one frame and several minutes, key frames anywhere."""
    constant = draw(st.booleans())
    num_frames = draw(st.integers(1, 400 if constant else 40))
    keys = tuple(sorted(draw(st.sets(st.integers(0, num_frames - 1), min_size=1, max_size=12))))
    if constant:
        fps = draw(st.sampled_from([1.0, 24.0, 25.0, 30000 / 1001, 60.0]))
        return video(num_frames, fps, keys)
    steps = draw(st.lists(st.floats(0.001, 2.0), min_size=num_frames, max_size=num_frames))
    ends = list(accumulate(steps))
    stamps = (0.0, *ends[:-1])
    return VideoInfo(num_frames, num_frames / ends[-1], ends[-1], 64, 48, "h264", 0, keys, stamps)


Case = tuple[Source, VideoInfo, list[int], ShardOptions]


@st.composite
def cases(draw: st.DrawFn, transcode: Transcode = "auto", stride: bool = False, val_tail: bool = False) -> Case:
    info = draw(videos())
    start = draw(st.none() | st.floats(0.0, info.duration * 0.9))
    length = draw(st.none() | st.floats(0.02, info.duration + 0.4))
    end = None if length is None else min((start or 0.0) + length, info.duration + 0.4)
    clip_seconds = draw(SECONDS if stride or val_tail else SECONDS | st.none())
    cutting = Cutting(
        clip_seconds,
        stride_seconds=draw(SECONDS) if stride else None,
        scene_threshold=draw(st.sampled_from([None, 0.3])),
        val_tail=draw(st.floats(0.05, 0.9)) if val_tail else 0.0,
        val_gap=draw(st.floats(0.0, 3.0)) if val_tail else 0.0,
    )
    scenes = sorted(draw(st.sets(st.integers(0, info.num_frames - 1), max_size=6)) - {0})
    source = Source("/videos/a.mp4", "a.mp4", "a", start=start, end=end)
    return source, info, scenes, ShardOptions(cutting=cutting, transcode=transcode)


PLAIN, STRIDE, COPIED = cases(), cases(stride=True), cases("never")
HELD_OUT = st.one_of(cases(val_tail=True), cases(val_tail=True, stride=True), cases("never", val_tail=True))


@given(st.one_of(PLAIN, STRIDE, COPIED, HELD_OUT))
def test_clips_lie_in_their_source_have_frames_and_keys_of_their_own(case: Case) -> None:
    source, info, _, options = case
    result = cut(*case)
    assert not result.rejected
    assert bool(result.clips) != bool(result.left_out)
    assert cut(*case, times=info.times) == result
    clips = [clip for _, clip in result.clips]
    assert len({clip.key for clip in clips}) == len(clips)
    for clip in clips:
        assert 0.0 <= clip.start < clip.end <= info.duration + EPSILON
        assert 0 <= frames_of(clip, info).start < frames_of(clip, info).stop <= info.num_frames
        if options.transcode == "auto":
            assert clip.start >= (source.start or 0.0) - EPSILON
            assert source.end is None or clip.end <= source.end + EPSILON
        inside = info.times()[frames_of(clip, info)]
        assert clip.start - EPSILON <= inside[0]
        assert inside[-1] <= clip.end + EPSILON
    assert [clip.start for clip in clips] == sorted(clip.start for clip in clips)


@given(st.one_of(PLAIN, COPIED))
def test_every_frame_is_in_one_clip_or_something_is_counted_as_dropped(case: Case) -> None:
    source, info, _, options = case
    result = cut(*case)
    covered = [frame for _, clip in result.clips for frame in frames_of(clip, info)]
    assert len(set(covered)) == len(covered)
    end = np.inf if source.end is None or source.end >= info.duration - 1e-6 else source.end
    times = info.times()
    wanted = set(np.flatnonzero((times >= (source.start or 0.0) - 1e-6) & (times < end - 1e-6)).tolist())
    if options.transcode == "auto":
        assert set(covered) <= wanted
    missing = sorted(wanted - set(covered))
    holes = sum(b - a > 1 for a, b in pairwise(missing)) + bool(missing)
    assert holes <= sum(result.dropped.values())


@given(COPIED)
def test_copied_clips_begin_at_key_frames_and_end_there_or_at_the_end(case: Case) -> None:
    info = case[1]
    for _, clip in cut(*case).clips:
        if clip.frames is not None:
            assert clip.frames[0] in info.key_frames
            assert clip.frames[1] in {*info.key_frames, info.num_frames}
            assert clip.start == pytest.approx(info.times()[clip.frames[0]], abs=EPSILON)


@given(HELD_OUT)
def test_nothing_that_is_trained_on_touches_what_is_held_out_or_its_gap(case: Case) -> None:
    _, info, _, options = case
    result = cut(*case)
    train, val = ([clip for split, clip in result.clips if split == name] for name in ("train", "val"))
    assert len(train) + len(val) == len(result.clips)
    if train and val:
        assert max(clip.end for clip in train) <= min(clip.start for clip in val) - options.cutting.val_gap + EPSILON
        assert not {f for c in train for f in frames_of(c, info)} & {f for c in val for f in frames_of(c, info)}
    for clip in val:
        assert clip.start >= info.duration * (1.0 - options.cutting.val_tail) - EPSILON


@given(HELD_OUT, st.lists(st.tuples(st.floats(0.0, 0.99), st.floats(0.01, 1.0)), min_size=1, max_size=6), st.booleans())
def test_parts_of_one_video_agree_on_what_is_held_out(
    case: Case, shares: list[tuple[float, float]], whole: bool
) -> None:
    _, info, scenes, options = case
    rows = [replace(SOURCE, start=a * info.duration, end=min(1.0, a + b) * info.duration) for a, b in shares]
    rows += [SOURCE] * whole
    clips = [clip for row in rows for clip in cut(row, info, scenes, options, shared=True).clips]
    train, val = ([clip for split, clip in clips if split == name] for name in ("train", "val"))
    if train and val:
        assert max(clip.end for clip in train) <= min(clip.start for clip in val) - options.cutting.val_gap + EPSILON
        assert not {f for c in train for f in frames_of(c, info)} & {f for c in val for f in frames_of(c, info)}
    border = info.duration * (1.0 - options.cutting.val_tail)
    for clip in train:
        assert clip.end <= border - options.cutting.val_gap + EPSILON
    for clip in val:
        assert clip.start >= border - EPSILON


def test_the_held_out_tail_is_that_of_the_video_and_not_of_a_row() -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=0.2, val_tail=0.3))
    info = video(50)  # 2 s, of which the last 0.6 are held out
    rows = {name: replace(SOURCE, start=a, end=b) for name, a, b in (("one", 0.0, 1.2), ("two", 0.8, 2.0))}
    assert {split for split, _ in cut(rows["one"], info, (), options).clips} == {"train"}
    two = cut(rows["two"], info, (), options)
    assert [(split, clip.start) for split, clip in two.clips] == [
        ("train", 0.8), ("train", 1.0), ("train", 1.2), ("val", 1.4), ("val", 1.6), ("val", 1.8),
    ]  # fmt: skip
    behind = cut(replace(SOURCE, start=1.5), info, (), ShardOptions(cutting=Cutting(1.0, val_tail=0.3)))
    assert [(split, clip.start, clip.end) for split, clip in behind.clips] == [("val", 1.5, 2.0)]


def test_a_whole_video_loses_no_clip_at_the_border_and_a_row_the_one_across_it() -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=4.0, val_tail=0.3))
    assert [(split, clip.start) for split, clip in cut(SOURCE, video(), (), options).clips] == [
        ("train", 0.0), ("train", 4.0), ("val", 8.0),
    ]  # fmt: skip
    shared = cut(SOURCE, video(), (), options, shared=True)
    assert [(split, clip.start) for split, clip in shared.clips] == [("train", 0.0), ("val", 8.0)]
    assert shared.dropped == {"in the gap before the held-out part": 1}


@given(st.one_of(PLAIN, STRIDE))
def test_no_clip_is_shorter_than_half_of_what_was_asked_for(case: Case) -> None:
    seconds = case[3].cutting.clip_seconds
    for _, clip in cut(*case).clips:
        if seconds is not None and clip.frames is not None:
            assert seconds / 2 - EPSILON <= clip.end - clip.start <= seconds + EPSILON


def test_a_whole_source_is_one_clip_under_its_own_key() -> None:
    assert cut(SOURCE, video(), (), ShardOptions()).clips == [("", Clip(SOURCE, "a", 0.0, 10.0, None))]
    assert cut(SOURCE, video(), (), ShardOptions(), "test").clips[0][0] == "test"


def test_a_clip_as_long_as_the_source_takes_the_file_as_it_is() -> None:
    result = cut(SOURCE, video(), (), ShardOptions(cutting=Cutting(clip_seconds=10.0)))
    assert result.clips == [("", Clip(SOURCE, "a-00000", 0.0, 10.0, None))]


def test_a_row_that_asks_for_what_is_not_there_is_rejected_in_words() -> None:
    for start, end in ((10.0, None), (2.0, 10.6)):
        result = cut(Source("a", "a", "a", start=start, end=end), video(), (), ShardOptions())
        assert "the video has 10.000 s" in result.rejected
        assert not result.clips


def test_remainders_are_dropped_by_rule() -> None:
    result = cut(SOURCE, video(), (), ShardOptions(cutting=Cutting(clip_seconds=3.0)))
    assert times(result) == [(0.0, 3.0), (3.0, 6.0), (6.0, 9.0)]
    assert result.dropped == {"remainder shorter than half a clip": 1}
    short = cut(SOURCE, video(), (), ShardOptions(cutting=Cutting(clip_seconds=30.0)))
    assert (short.clips, short.left_out) == ([], "shorter than half a clip")


def test_overlapping_clips_end_with_the_first_that_reaches_the_end() -> None:
    result = cut(SOURCE, video(), (), ShardOptions(cutting=Cutting(clip_seconds=4.0, stride_seconds=2.0)))
    assert times(result) == [(0.0, 4.0), (2.0, 6.0), (4.0, 8.0), (6.0, 10.0)]


def test_scenes_are_cut_each_on_their_own() -> None:
    scenes = (75, 85, 200)  # at 3, 3.4 and 8 s
    alone = cut(SOURCE, video(), scenes, ShardOptions(cutting=Cutting(scene_threshold=0.3)))
    assert times(alone) == [(0.0, 3.0), (3.4, 8.0), (8.0, 10.0)]
    assert [clip.frames for _, clip in alone.clips] == [(0, 75), (85, 200), (200, 250)]
    assert [clip.key for _, clip in alone.clips] == ["a-00000", "a-00002", "a-00003"]
    assert alone.dropped == {"scene shorter than 0.5 s": 1}
    pieces = cut(SOURCE, video(), scenes, ShardOptions(cutting=Cutting(clip_seconds=2.0, scene_threshold=0.3)))
    assert times(pieces) == [(0.0, 2.0), (2.0, 3.0), (3.4, 5.4), (5.4, 7.4), (8.0, 10.0)]
    assert pieces.dropped == {"scene shorter than half a clip": 1, "remainder shorter than half a clip": 1}
    assert cut(SOURCE, video(), (), ShardOptions(cutting=Cutting(scene_threshold=0.3))).clips[0][1].frames is None


def test_scenes_are_not_looked_at_where_they_are_not_asked_for() -> None:
    assert times(cut(SOURCE, video(), (75,), ShardOptions())) == [(0.0, 10.0)]


def test_clips_that_are_copied_are_moved_to_key_frames() -> None:
    never = ShardOptions(cutting=Cutting(clip_seconds=2.0), transcode="never")
    result = cut(SOURCE, video(keys=(0, 60, 160)), (), never)  # keys at 0, 2.4 and 6.4 s
    assert times(result) == [(0.0, 2.4), (2.4, 6.4), (6.4, 10.0)]
    assert [clip.frames for _, clip in result.clips] == [(0, 60), (60, 160), (160, 250)]
    assert not result.dropped
    only_one = cut(SOURCE, video(), (), never)
    assert only_one.clips == [("", Clip(SOURCE, "a-00000", 0.0, 10.0, None))]


def test_a_part_without_a_key_frame_to_end_at_is_left_out() -> None:
    row = Source("/videos/a.mp4", "a.mp4", "a", start=1.0, end=2.0)
    result = cut(row, video(), (), ShardOptions(transcode="never"))
    assert (result.clips, result.left_out) == ([], "no key frame to begin or end it")
    inside = cut(row, video(keys=(0, 30)), (), ShardOptions(transcode="never"))
    assert inside.clips == [("", Clip(row, "a", 0.0, 1.2, (0, 30)))]
