"""H.264 whose order is told nowhere: AVI stores no times, and some streams do not say by how much they reorder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.frame_reader import FrameReader
from framestream.pipeline.h264_order import PictureOrder, in_rhythm
from framestream.pipeline.packet_table import Deadline, PacketTable
from framestream.pipeline.packets import read_packets
from framestream.pipeline.probe import probe_video

from remux import Track, remux
from synthetic import make_video, read_indices

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


def test_a_picture_with_very_many_parameter_sets_gives_no_order(tmp_path: Path) -> None:
    """Each set is read bit by bit; a packet of a megabyte may hold a hundred thousand of them."""
    with av.open(str(make_video(tmp_path / "v.mp4", num_frames=1))) as container:
        avcc = bytes(container.streams.video[0].codec_context.extradata or b"")
        (packet,) = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    sps = avcc[6 : 8 + int.from_bytes(avcc[6:8], "big")]
    unit = len(sps[2:]).to_bytes(4, "big") + sps[2:]
    for repeated, readable in ((20, True), (100, False)):
        order = PictureOrder(avcc)
        order.add(unit * repeated + packet)
        assert (order.places() is not None) == readable
    annex_b = b"\0\0\1" + sps[2:]
    order = PictureOrder(annex_b * 100)
    order.add(annex_b + packet)
    assert order.places() is None


class _Fields:
    """Reads fields of a parameter set, and gives back what was read."""

    def __init__(self, unit: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in unit.replace(b"\0\0\3", b"\0\0"))
        self._at = 0

    def u(self, count: int) -> int:
        self._at += count
        return int(self._bits[self._at - count : self._at], 2)

    def ue(self) -> int:
        zeros = self._bits.index("1", self._at) - self._at
        self._at += zeros
        return self.u(zeros + 1) - 1

    def read(self) -> str:
        return self._bits[: self._at]


def without_usage(avcc: bytes) -> bytes:
    """An `avcC` whose parameter set ends where the VUI would begin, which says how many pictures are reordered."""
    end = 8 + int.from_bytes(avcc[6:8], "big")
    fields = _Fields(avcc[8:end])
    fields.u(8)
    profile = fields.u(8)
    fields.u(16), fields.ue()
    assert profile == 100  # High
    assert [fields.ue(), fields.ue(), fields.ue(), fields.u(1), fields.u(1)] == [1, 0, 0, 0, 0]  # chroma, depths
    fields.ue()
    assert fields.ue() == 0  # type of the order
    fields.ue(), fields.ue(), fields.u(1), fields.ue(), fields.ue()
    assert fields.u(2) == 3  # frames only
    if fields.u(1):  # cropping
        fields.ue(), fields.ue(), fields.ue(), fields.ue()
    bits = fields.read() + "01"  # no VUI, and the end
    bits += "0" * (-len(bits) % 8)
    plain = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    assert b"\0\0" not in plain  # what would need emulation prevention
    return avcc[:6] + len(plain).to_bytes(2, "big") + plain + avcc[end:]


@pytest.mark.parametrize(("suffix", "options"), [(".mkv", {}), (".mp4", {"movflags": "frag_keyframe+empty_moov"})])
def test_a_stream_that_does_not_say_by_how_much_it_reorders_gives_all_its_frames(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    """A pyramid of B-frames: FFmpeg finds out by how much in the middle, when it has shown a frame too early."""
    told, untold = make_video(tmp_path / "told.mp4", b_frames=3), tmp_path / f"untold{suffix}"
    with av.open(str(told)) as reader, av.open(str(untold), "w", container_options=options) as writer:
        source = reader.streams.video[0]
        stream: Any = writer.add_stream_from_template(source, opaque=True)
        stream.codec_context.extradata = without_usage(bytes(source.codec_context.extradata or b""))
        for packet in [packet for packet in reader.demux(source) if packet.size]:
            packet.stream = stream
            writer.mux(packet)
    data = untold.read_bytes()
    indexed = probe_video(data, packets=True)
    assert indexed.packets is not None
    for info in (indexed, None):
        with open_decoder(data, backend="pyav", info=info) as decoder:
            assert read_indices(decoder.frames_at(range(FRAMES))) == list(range(FRAMES))
            assert read_indices(decoder.frames_at([41, 5])) == [41, 5]


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
