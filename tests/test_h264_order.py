"""H.264 in AVI, which stores no times: the order, the rate and the length come from the stream itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.frame_reader import FrameReader
from framestream.pipeline.h264_order import PictureOrder, in_rhythm
from framestream.pipeline.packet_table import Deadline, PacketTable
from framestream.pipeline.packets import read_packets

from remux import Track, remux
from synthetic import make_video

FRAMES, FPS = 48, 25
WRITERS: dict[str, dict[str, Any]] = {
    "closed groups": {},
    "open groups": {"open_gop": True},
    "pyramid": {"b_frames": 7, "extra": ":b-pyramid=normal:ref=4"},
    "interlaced": {"extra": ":interlaced=1"},
    "4:4:4 with scaling lists": {"pix_fmt": "yuv444p", "extra": ":cqm=jvt"},
    "one group, counts that go round": {"gop": 250, "num_frames": 130},
    "no b-frames": {"b_frames": 0},
    "uneven times": {"vfr": True},
}


def table_of(path: Path) -> PacketTable:
    return read_packets(io.BytesIO(path.read_bytes()), name=path.name, deadline=Deadline(30, path.name))


@pytest.mark.parametrize("name", WRITERS)
def test_avi_without_encoding_says_the_same_as_the_file_with_times(tmp_path: Path, name: str) -> None:
    """As `ffmpeg -c copy` writes it: the clock of the AVI is finer than the frames are long."""
    told = make_video(tmp_path / "v.ts", **{"num_frames": FRAMES, "fps": FPS, **WRITERS[name]})
    untold = remux(tmp_path / "v.avi", Track(told))
    with av.open(str(untold)) as container:
        assert container.streams.video[0].average_rate > 100
    expected, found = table_of(told), table_of(untold)
    assert found.ordered
    assert found.order.rank.tolist() == expected.order.rank.tolist()
    assert found.key_frames.tolist() == expected.key_frames.tolist()
    if name != "uneven times":
        assert (found.fps, found.duration) == (FPS, expected.num_frames / FPS)
        assert found.timestamps is None
    else:  # but for the last ones, the steps between which are told nowhere
        assert found.times()[:-3] == pytest.approx(expected.times()[:-3], abs=2 / 600)
        assert found.duration == pytest.approx(expected.duration, rel=0.1)


def test_a_clip_late_in_an_avi_costs_its_own_group(tmp_path: Path) -> None:
    data = remux(tmp_path / "v.avi", Track(make_video(tmp_path / "v.ts", num_frames=96))).read_bytes()
    reader = FrameReader(data, name="v.avi")
    everything = [frame.to_ndarray() for _, frame, _ in reader.pictures(range(96))]
    shown = [frame.to_ndarray() for frame in av.open(io.BytesIO(data)).decode(video=0)]
    assert all(map(np.array_equal, everything, shown))
    before = reader.stats.packets
    (last,) = (frame.to_ndarray() for _, frame, _ in reader.pictures([95]))
    assert np.array_equal(last, shown[95])
    assert reader.stats.packets - before <= 12
    reader.close()


def test_steps_of_decoding_are_those_of_showing() -> None:
    place = np.array([0, 3, 1, 2, 6, 4, 5])
    shown_at = np.array([0, 4, 8, 10, 14, 18, 22])
    decoded_at = np.concatenate([[-8, -4], shown_at[:5]])
    assert in_rhythm(place, decoded_at, 2)[np.argsort(place)].tolist() == [each - 8 for each in shown_at]
    assert in_rhythm(np.array([0]), np.array([7]), 3).tolist() == [7]


@given(st.binary(max_size=80), st.lists(st.binary(max_size=80), max_size=4))
def test_any_bytes_give_an_order_or_none(extradata: bytes, packets: list[bytes]) -> None:
    order = PictureOrder(extradata)
    for packet in packets:
        order.add(b"\x00\x00\x01\x65" + packet)
    places = order.places()
    assert places is None or sorted(places) == list(range(len(packets)))


def test_damage_in_the_heads_of_pictures_gives_no_order(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.ts", num_frames=12)
    with av.open(str(path)) as container:
        extradata = bytes(container.streams.video[0].codec_context.extradata or b"")
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for damaged in ([*packets, packets[-1]], [packets[0], b"", *packets[1:]], packets[1:]):
        order = PictureOrder(b"" if damaged is not packets[1:] else b"\x01")
        for packet in damaged:
            order.add(packet)
        assert order.places() is None
    whole = PictureOrder(extradata)
    for packet in packets:
        whole.add(packet)
    assert whole.places() is not None
