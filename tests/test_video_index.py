"""The index of a video's packets: what it spares, what it refuses, and that it never shows another frame."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline import FastSlowSampling, ShardSet, ShardWriter, build_loader
from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.decode_pyav import PyAVDecoder
from framestream.pipeline.errors import DecodeError, RejectLimitError, SampleError
from framestream.pipeline.file_parts import FileParts, joined
from framestream.pipeline.packet_source import ContainerPackets, IndexedPackets
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.transforms import ClipTransform
from framestream.pipeline.video_index import VideoIndex
from framestream.tools.cli import main

from synthetic import make_video, read_indices, trim_by_copy, video_bytes


@pytest.fixture(scope="module")
def info(clip: bytes) -> VideoInfo:
    return probe_video(clip, packets=True)


def index_of(info: VideoInfo) -> VideoIndex:
    assert info.packets is not None
    return info.packets


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def test_it_says_where_every_packet_lies(clip: bytes, info: VideoInfo) -> None:
    index = index_of(info)
    assert len(index) == 48
    assert index.num_bytes == len(clip)
    assert index.packet_order.keys.tolist() == [0, 12, 24, 36]
    assert sorted(index.packet_order.rank.tolist()) == list(range(48))
    assert index.packet_order.rank.tolist() != list(range(48))  # there are B-frames
    for offset, size, crc in zip(index.offset, index.size, index.crc, strict=True):
        assert zlib.crc32(clip[offset : offset + size]) == crc


def test_decoding_by_it_opens_no_container(clip: bytes, info: VideoInfo) -> None:
    with PyAVDecoder(clip, info=info) as indexed, PyAVDecoder(clip) as scanned:
        assert isinstance(indexed.table.source, IndexedPackets)
        assert isinstance(scanned.table.source, ContainerPackets)
        for wanted in ([47], [5, 3, 40, 3], range(48)):
            assert torch.equal(indexed.frames_at(wanted), scanned.frames_at(wanted))
        assert indexed.stats == scanned.stats
        np.testing.assert_array_equal(indexed.timestamps, scanned.timestamps)
        np.testing.assert_array_equal(indexed.key_frames, scanned.key_frames)


def test_only_the_bytes_of_needed_packets_are_looked_at(clip: bytes, info: VideoInfo) -> None:
    index = index_of(info)
    needed = [(index.offset[i], index.offset[i] + index.size[i]) for i in range(12, 24)]
    hidden = bytearray(len(clip))  # a file with nothing in it but one GOP
    for start, stop in needed:
        hidden[start:stop] = clip[start:stop]
    with PyAVDecoder(bytes(hidden), info=info) as decoder, PyAVDecoder(clip) as whole:
        assert torch.equal(decoder.frames_at(range(12, 24)), whole.frames_at(range(12, 24)))
        with pytest.raises(DecodeError, match=r"packet 0 .* is not what it was when the shard was written"):
            decoder.frames_at([0])


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1 << 20), wanted=st.integers(0, 47))
def test_a_flipped_bit_is_refused_or_does_not_matter(clip: bytes, info: VideoInfo, at: int, wanted: int) -> None:
    with PyAVDecoder(clip) as whole:
        right = whole.frames_at([wanted])
    with PyAVDecoder(flipped(clip, at % len(clip)), info=info, name="clip 3") as decoder:
        try:
            frames, refusal = decoder.frames_at([wanted]), ""
        except DecodeError as err:
            frames, refusal = right, str(err)
    assert torch.equal(frames, right)
    assert not refusal or "clip 3: packet" in refusal


def test_an_index_of_another_file_is_not_believed(clip: bytes, info: VideoInfo) -> None:
    longer = clip + b"\0\0\0\x08free"
    with PyAVDecoder(longer, info=info) as decoder:  # another length: the container is read
        assert isinstance(decoder.table.source, ContainerPackets)
        assert read_indices(decoder.frames_at([47, 3])) == [47, 3]
    other = video_bytes(num_frames=48, b_frames=0).ljust(len(clip), b"\0")[: len(clip)]
    with PyAVDecoder(other, info=info) as decoder, pytest.raises(DecodeError, match="damaged or replaced"):
        decoder.frames_at([3])


def test_json_round_trip(clip: bytes, info: VideoInfo) -> None:
    again = VideoInfo.from_json(json.loads(json.dumps(info.to_json())))
    assert again == info == probe_video(clip)  # the index is not part of what a video is
    assert again.packets == info.packets
    assert "packets" not in probe_video(clip).to_json()
    assert VideoIndex.from_json(index_of(info).to_json()) == info.packets


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_list_is_refused_and_the_container_read(clip: bytes, info: VideoInfo, data: st.DataObject) -> None:
    record = index_of(info).to_json()
    text = json.dumps(record)
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from('09aZ"{[,:-+.etn /=')) + text[at + 1 :]
    try:
        packets = json.loads(damaged)
    except ValueError:
        return
    believed = VideoInfo.from_json({**info.to_json(), "packets": packets})
    assert believed == info
    if believed.packets is None:
        with pytest.raises(SampleError, match="its list of packets is damaged"):
            VideoIndex.from_json(packets)
    assert believed.packets in (None, info.packets)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"count": 0},
        {"count": 1 << 40},
        {"count": "48"},
        {"bytes": -1},
        {"table": "%%%"},
        {"table": base64.b64encode(zlib.compress(b"\0" * (1 << 24))).decode()},
        {"table": None},
        {"extradata": 7},
        {"colour": [1, 2]},
        {"turn": []},
        {"reorder": "x"},
        {"crc": 0},
        {"facts": 0},
    ],
)
def test_impossible_lists_are_refused(info: VideoInfo, change: dict) -> None:
    with pytest.raises(SampleError, match="its list of packets is damaged"):
        VideoIndex.from_json({**index_of(info).to_json(), **change})
    for nonsense in (None, [], 3, {}, "packets"):
        with pytest.raises(SampleError):
            VideoIndex.from_json(nonsense)


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 40},
        {"key_frames": [0]},
        {"fps": 48.0},
        {"duration": 3.0},
        {"timestamps": [i / 24 + (i > 20) for i in range(48)]},
        {"codec": "hevc"},
        {"rotation": 90},
        {"width": 96},
    ],
)
def test_an_index_of_other_facts_is_passed_over(info: VideoInfo, change: dict) -> None:
    changed = VideoInfo.from_json({**info.to_json(), **change})
    assert changed != info
    assert changed.packets is None
    assert VideoInfo.from_json({**info.to_json(), "user": 3}).packets == info.packets


@pytest.mark.parametrize(
    ("suffix", "options", "indexed"),
    [
        (".mp4", {"rotation": 90}, True),
        (".mp4", {"codec": "hevc", "pix_fmt": "yuv420p10le"}, True),
        (".mkv", {"open_gop": True, "vfr": True}, True),
        (".webm", {"codec": "vp9"}, True),
        (".ts", {}, False),
        (".avi", {}, True),
        (".avi", {"codec": "mpeg4"}, False),
    ],
)
def test_which_videos_have_one(suffix: str, options: dict, indexed: bool) -> None:
    data = video_bytes(suffix, num_frames=30, **options)
    info = probe_video(data, packets=True)
    assert (info.packets is not None) == indexed
    with open_decoder(data, backend="pyav", info=info) as one, open_decoder(data, backend="pyav") as other:
        assert torch.equal(one.frames_at(range(30)), other.frames_at(range(30)))


def test_frames_hidden_by_an_edit_list_stay_hidden(clip_path: Path, tmp_path: Path) -> None:
    path = trim_by_copy(clip_path, tmp_path / "cut.mp4", start=17)
    info = probe_video(path, packets=True)
    assert index_of(info).hidden.sum() == 5
    with PyAVDecoder(path.read_bytes(), info=info) as decoder:
        assert isinstance(decoder.table.source, IndexedPackets)
        assert read_indices(decoder.frames_at([0, 30, 1])) == [17, 47, 18]


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_readers_take_their_facts_from_it(backend: str, clip: bytes, info: VideoInfo) -> None:
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    with open_decoder(clip, backend=backend, info=info) as one, open_decoder(clip, backend=backend) as other:
        assert torch.equal(one.frames_at([3, 47]), other.frames_at([3, 47]))
        np.testing.assert_array_equal(one.key_frames, other.key_frames)
    gop = video_bytes(open_gop=True, b_frames=3)
    with pytest.raises(DecodeError, match="use the decoder pyav"):
        open_decoder(gop, backend=backend, info=probe_video(gop, packets=True))


def crafted(info: VideoInfo, **changes: Any) -> VideoInfo:
    """What reading gives of metadata with a changed index whose checksums are right."""
    index = replace(index_of(info), **{"facts": replace(info, packets=None).checksum(), **changes})
    return VideoInfo.from_json(replace(info, packets=index).to_json())


def test_an_index_that_is_consistent_and_impossible_is_passed_over(info: VideoInfo) -> None:
    assert crafted(info).packets is not None
    hidden, key = np.zeros(48, dtype=bool), np.zeros(48, dtype=bool)
    hidden[3] = key[47] = True
    assert crafted(info, hidden=hidden).packets is None  # fewer frames than the metadata says
    assert crafted(replace(info, num_frames=40)).packets is None
    assert crafted(info, key=key).packets is None  # frames before the first key packet
    assert crafted(info, reorder=17).packets is None  # FFmpeg would end the process
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(SampleError, match="damaged"):
        VideoIndex.from_json({**index_of(info).to_json(), "format": nested})


def test_packets_lie_in_memory_of_ffmpegs_own(clip: bytes, info: VideoInfo) -> None:
    """It reads some bytes past the end of a packet, so they must not be ours, which may end where memory ends."""
    body = bytearray(clip)
    parts = FileParts(len(clip), [(0, body)])  # type: ignore[list-item]
    packet = IndexedPackets(parts, index_of(info), "h264", "clip 3").packet(0)
    before, at = bytes(packet), int(index_of(info).offset[0])
    assert before == clip[at : at + len(before)]
    body[at : at + 16] = bytes(16)
    assert bytes(packet) == before


def write(folder: Path, video: bytes, info: VideoInfo) -> Path:
    with ShardWriter(folder) as writer:
        writer.write("clip", video, "mp4", {**info.to_json(), "sha256": "0" * 64})
    return folder


def test_a_loader_checks_the_packets_that_it_decodes(clip: bytes, info: VideoInfo, tmp_path: Path) -> None:
    """The wrong SHA-256 stands for damage somewhere: with the index only what is decoded counts."""
    options: dict = {"sampling": FastSlowSampling(2, 2), "patches_per_frame": 1, "image_size": 32, "batch_size": 1}
    (batch,) = build_loader(write(tmp_path / "a", clip, info), **options)
    assert read_indices(batch["video_frames"][0]) == [0, 24, 46, 47]
    assert "packets" not in batch["meta"][0]
    index = index_of(info)
    for name, video, facts in (
        ("b", clip, replace(info, packets=None)),  # without an index: the whole file is compared
        ("c", flipped(clip, int(index.offset[36]) + 9), info),
    ):
        with pytest.raises(RejectLimitError, match=r"sha256|packet 36"):
            next(iter(build_loader(write(tmp_path / name, video, facts), **options)))


def test_a_loader_reads_no_more_than_the_packets_that_it_decodes(tmp_path: Path) -> None:
    video = video_bytes(num_frames=480, gop=12, audio=True)
    info = probe_video(video, packets=True)
    folder = write(tmp_path, video, info)
    transform = ClipTransform(FastSlowSampling(4, 2), image_size=32)
    raw = ShardSet.open(folder).read(0, 0, defer_video=True)
    assert transform.reads_packets(raw)
    request = transform.request(raw, draw=1)
    with pytest.raises(TypeError, match="read it first"):
        pickle.dumps(request)
    request.read()
    assert isinstance(request.video, FileParts)
    assert len(request.video) == len(video)
    index = index_of(info)
    runs = index.packet_order.runs(request.plan.unique.tolist())
    needed = sum(int(index.size[run.packets].sum()) for run in runs)
    assert needed <= request.video.num_held < len(video)
    clip = transform.clip(pickle.loads(pickle.dumps(request)))
    assert read_indices(clip["frames"]) == [0, 240, 476, 477, 478, 479]
    with (
        pytest.raises(DecodeError, match=r"packet .* was not read"),
        open_decoder(request.video, backend="pyav", info=info) as decoder,
    ):
        decoder.frames_at([100])
    with pytest.raises(DecodeError, match="only parts of it were read"):
        open_decoder(request.video, backend="pyav")


def test_a_shard_that_is_cut_while_it_is_used_costs_the_sample(clip: bytes, info: VideoInfo, tmp_path: Path) -> None:
    shards = ShardSet.open(write(tmp_path, clip, info))
    raw = shards.read(0, 0, defer_video=True)
    (tar,) = tmp_path.glob("*.tar")
    with open(tar, "r+b") as file:
        file.truncate(4096)
    request = ClipTransform(FastSlowSampling(2, 2), image_size=32).request(raw, draw=1)
    with pytest.raises(SampleError, match=r"the shard ends inside its .mp4"):
        request.read()


def test_joined_ranges() -> None:
    assert joined([(0, 5), (5, 5), (12, 3), (40, 2)], 2) == [range(0, 15), range(40, 42)]
    assert joined([(8, 4), (0, 4), (2, 10)], 0) == [range(0, 12)]
    parts = FileParts(50, [(0, b"abcdef"), (40, b"xy")])
    assert (bytes(parts.cut(2, 3)), bytes(parts.cut(40, 2)), len(parts), parts.num_held) == (b"cde", b"xy", 50, 8)
    for start, size in ((5, 2), (6, 1), (39, 2), (41, 2)):
        with pytest.raises(KeyError):
            parts.cut(start, size)


def test_shard_writes_it_and_verify_compares_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = make_video(tmp_path / "in.mp4", num_frames=24)
    shards = tmp_path / "shards"
    assert main(["shard", str(source), "--output", str(shards), "--transcode", "never"]) == 0
    sample = ShardSet.open(shards).read(0, 0)
    assert sample.info is not None
    assert sample.info.packets is not None
    assert sample.info.packets == probe_video(sample.video, packets=True).packets
    assert main(["verify", str(shards)]) == 0
    packets = {**sample.meta["packets"], "crc": 1}
    with ShardWriter(tmp_path / "wrong") as writer:
        writer.write("clip", sample.video, "mp4", {**sample.meta, "packets": packets})
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "wrong")]) == 1
    assert "packets other than its .json says" in capsys.readouterr().out
