"""Videos with hardly a key frame, of which part after part is wanted: gone through once, and exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.decode_pyav import PyAVDecoder
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.frame_reader import LONG_LEAD, FrameReader
from framestream.pipeline.picture import to_rgb
from framestream.pipeline.probe import probe_video
from framestream.tools.shard_options import Cutting, Encoding, ShardOptions
from framestream.tools.shard_run import build_shards

from shard_setup import frames, samples
from synthetic import make_video, read_index, read_indices

NUM_FRAMES = 4 * LONG_LEAD
KINDS = {
    "one key frame": {"codec": "h264", "gop": NUM_FRAMES},
    "one key frame, B-frames in layers": {"codec": "h264", "gop": NUM_FRAMES, "b_frames": 5, "extra": ":b-pyramid=2"},
    "refreshed a stripe at a time": {"codec": "h264", "gop": 48, "b_frames": 0, "extra": ":intra-refresh=1"},
    "no picture left out": {"codec": "mpeg4", "gop": NUM_FRAMES, "b_frames": 0},
    "vp9": {"codec": "vp9", "gop": NUM_FRAMES},
    # The decoder drops the first frames shown, which lean on a group that is not there.
    "open group at the start": {"codec": "hevc", "gop": NUM_FRAMES // 2, "b_frames": 3, "open_gop": True},
}


@pytest.fixture(scope="module", params=KINDS)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pass") / "v.mp4"
    return make_video(path, num_frames=NUM_FRAMES, size=(64, 48), **KINDS[request.param])


def open_reader(path: Path) -> FrameReader:
    data = path.read_bytes()
    return FrameReader(data, info=probe_video(data, packets=True), name="v.mp4")


def shown(reader: FrameReader, wanted: range) -> Iterator[tuple[int, int]]:
    """Index, and the index that is drawn."""
    with closing(reader.pictures(wanted)) as pictures:
        for index, frame, _ in pictures:
            yield index, read_index(torch.from_numpy(np.array(to_rgb(frame, (frame.width, frame.height)))))


def test_part_after_part_is_decoded_once(video: Path) -> None:
    reader = open_reader(video)
    parts = [range(begin, begin + 100) for begin in range(0, NUM_FRAMES, 100)]
    for part in parts:
        assert list(shown(reader, part)) == [(index, index) for index in part]
    short = sum(part.stop for part in parts if part.start <= LONG_LEAD)  # each of these is begun anew
    assert reader.stats.packets < short + NUM_FRAMES + 50
    assert sum(part.stop for part in parts) > 3 * (short + NUM_FRAMES)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_parts_in_any_order_are_what_was_asked_for(video: Path, data: st.DataObject) -> None:
    """Also where one is given up in the middle, or single frames are read in between."""
    with PyAVDecoder(video.read_bytes(), info=probe_video(video, packets=True), name="v.mp4") as reader:
        for _ in range(data.draw(st.integers(2, 5))):
            first = data.draw(st.integers(0, NUM_FRAMES - 1))
            part = range(first, min(NUM_FRAMES, first + data.draw(st.integers(1, 60))), data.draw(st.integers(1, 7)))
            what = data.draw(st.sampled_from(["all", "some", "single"]))
            if what == "single":
                assert read_indices(reader.frames_at(list(part))) == list(part)
                continue
            pictures = shown(reader, part)
            taken = [next(pictures)] if what == "some" else list(pictures)
            pictures.close()  # type: ignore[attr-defined]
            assert taken == [(index, index) for index in part][: len(taken)]


def test_a_clip_with_its_own_key_frame_needs_nothing_before_it(tmp_path: Path) -> None:
    """Although the pass would get there: it costs more, and damage on the way would count."""
    path = make_video(tmp_path / "v.mp4", num_frames=NUM_FRAMES, gop=NUM_FRAMES // 3, b_frames=0, size=(64, 48))
    reader = open_reader(path)
    for first in (350, 2 * NUM_FRAMES // 3):
        before = reader.stats.packets
        assert list(shown(reader, range(first, first + 20))) == [(i, i) for i in range(first, first + 20)]
    assert reader.stats.packets - before == 20


@pytest.mark.parametrize("broken", [449, 450, 520])
def test_damage_before_and_behind_a_clip_costs_nothing(tmp_path: Path, broken: int) -> None:
    """Open groups are gone through where that helps, and not where it harms; what is behind a clip is not needed."""
    path = make_video(tmp_path / "v.mp4", num_frames=NUM_FRAMES, gop=500, b_frames=0, size=(64, 48))
    index = probe_video(path, packets=True).packets
    assert index is not None
    data = bytearray(path.read_bytes())
    at, size = int(index.offset[broken]), int(index.size[broken])
    data[at + 5 : at + size] = b"\xff" * (size - 5)
    reader = FrameReader(bytes(data), name="v.mp4")  # without an index, which would tell by a checksum
    for part in (range(400, 449), range(1000, 1020)):
        assert list(shown(reader, part)) == [(index, index) for index in part]


def test_the_last_frames_come_and_then_earlier_ones(video: Path) -> None:
    reader = open_reader(video)
    for part in (range(NUM_FRAMES - 30, NUM_FRAMES - 3), range(NUM_FRAMES - 3, NUM_FRAMES), range(400, 420)):
        assert list(shown(reader, part)) == [(index, index) for index in part]


def test_damage_on_the_way_is_an_error_of_what_comes_behind_it(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=NUM_FRAMES, gop=NUM_FRAMES, b_frames=0, size=(64, 48))
    info = probe_video(path, packets=True)
    assert info.packets is not None
    data = bytearray(path.read_bytes())
    broken = 2 * LONG_LEAD
    at, size = int(info.packets.offset[broken]), int(info.packets.size[broken])
    data[at + 5 : at + size] = b"\xff" * (size - 5)
    reader = FrameReader(bytes(data), name="v.mp4")  # without an index, which would tell by a checksum
    for first in (LONG_LEAD + 10, LONG_LEAD + 60):
        part = range(first, first + 40)
        assert list(shown(reader, part)) == [(index, index) for index in part]
    for first in (broken + 50, broken + 200):
        with pytest.raises(DecodeError, match=r"v\.mp4: damaged"):
            list(shown(reader, range(first, first + 20)))
    part = range(LONG_LEAD + 70, LONG_LEAD + 80)
    assert list(shown(reader, part)) == [(index, index) for index in part]


def test_clips_of_such_a_video_become_a_set(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=NUM_FRAMES, gop=NUM_FRAMES, size=(64, 48))
    options = ShardOptions(cutting=Cutting(clip_seconds=2.0), encoding=Encoding(gop=8))
    report = build_shards([str(path)], tmp_path / "out", options, workers=2)
    assert report.rejects == []
    clips = [frames(sample) for sample in samples(tmp_path / "out")]
    assert clips == [list(range(begin, begin + 48)) for begin in range(0, NUM_FRAMES, 48)]
