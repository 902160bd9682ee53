"""Containers that contradict themselves: refused, where a reader that hides damage would lose or swap frames."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.truncation import broken_at

from synthetic import make_video, read_indices, trim_by_copy, video_bytes

FRAMES = 30


def encoded(suffix: str, **options: Any) -> bytes:
    return video_bytes(suffix, num_frames=FRAMES, size=(96, 64), gop=10, **options)


def frames_of(data: bytes, info: VideoInfo | None = None) -> list[int]:
    with open_decoder(data, backend="pyav", info=info, name="clip 3") as decoder:
        return read_indices(decoder.frames_at(range(decoder.num_frames)))


# -- Matroska --------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mkv": (".mkv", {}),
    "variable rate": (".mkv", {"vfr": True}),
    "sound": (".mkv", {"audio": True}),
    "many clusters": (".mkv", {"container_options": {"cluster_time_limit": "100"}}),
    "live": (".mkv", {"container_options": {"live": "1"}}),
    "live, many clusters": (".webm", {"codec": "vp9", "container_options": {"live": "1", "cluster_time_limit": "100"}}),
    "dash": (".webm", {"codec": "vp9", "container_options": {"dash": "1"}}),
    "index in front": (".mkv", {"container_options": {"cues_to_front": "1", "reserve_index_space": "4000"}}),
    "no checksums": (".mkv", {"container_options": {"write_crc32": "0", "fflags": "+bitexact"}}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_matroska_files_are_one_chain(kind: str) -> None:
    suffix, options = WHOLE[kind]
    data = encoded(suffix, **options)
    file = io.BytesIO(data)
    assert broken_at(file) is None
    assert file.tell() == 0
    assert frames_of(data) == list(range(FRAMES))


def test_other_containers_are_not_asked(tmp_path: Path) -> None:
    for suffix in (".mp4", ".avi", ".ts"):
        assert broken_at(io.BytesIO(encoded(suffix))) is None
    whole = make_video(tmp_path / "whole.mkv", num_frames=FRAMES)
    assert broken_at(io.BytesIO(trim_by_copy(whole, tmp_path / "cut.mkv", start=17).read_bytes())) is None
    for data in (b"", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3" + bytes(300), b"\x1a\x45\xdf\xa3\x80" + bytes(300)):
        assert broken_at(io.BytesIO(data)) is None or data


@pytest.mark.parametrize("kind", WHOLE)
def test_frames_lost_in_a_matroska_file_are_noticed(kind: str) -> None:
    """Every block that is no longer called one: readers pass it by, and play a video of a frame less."""
    suffix, options = WHOLE[kind]
    data = encoded(suffix, **options)
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size and packet.pos is not None]
    lost = 0
    for packet in packets:
        body = data.index(bytes(packet))
        # The element's name and length stand 4 bytes of a block's own header, and up to 9 more, before the picture.
        start = next((at for at in range(body - 6, body - 14, -1) if data[at] in (0xA3, 0xA1)), None)
        if start is None or data[start] != 0xA3:
            continue  # in a group with other elements
        damaged = bytearray(data)
        damaged[start] = 0xA4
        with pytest.raises(DecodeError, match="the container is damaged at byte"):
            frames_of(bytes(damaged))
        lost += 1
    assert lost > FRAMES // 2


def test_a_recording_without_a_length_that_breaks_off_is_noticed() -> None:
    data = encoded(".webm", codec="vp9", container_options={"live": "1"})
    for cut in range(len(data) // 2, len(data), 211):
        if broken_at(io.BytesIO(data[:cut])) is None:
            assert len(frames_of(data[:cut])) < FRAMES  # between two frames: a sound, shorter file
        else:
            with pytest.raises(DecodeError, match="damaged at byte"):
                frames_of(data[:cut])


# -- times -----------------------------------------------------------------------------------------------


def box(data: bytes, name: bytes) -> int:
    """Where the contents of a box begin."""
    return data.index(name) + 4


def test_times_that_swap_frames_are_noticed() -> None:
    """With B-frames the table `ctts` says which frame is shown when; with another they would be swapped."""
    data = encoded(".mp4")
    at = box(data, b"ctts")
    without = data[: at - 4] + b"free" + data[at:]
    with pytest.raises(DecodeError, match=r"clip 3: .*(times|shows frame)"):
        frames_of(without)
    (count,) = struct.unpack(">I", data[at + 4 : at + 8])
    noticed = 0
    for entry in range(count):
        place = at + 12 + 8 * entry
        (offset,) = struct.unpack(">I", data[place : place + 4])
        later = (
            data[:place] + struct.pack(">I", offset + 512 * 7 // 2) + data[place + 4 :]
        )  # by three frames and a half
        try:
            got = frames_of(later)
        except DecodeError:
            noticed += 1
        else:
            assert got == sorted(set(got))  # the last ones may end behind the edit list, which hides them
    assert noticed > 5


@pytest.mark.parametrize("codec", ["vp9", "vp8"])
def test_times_that_run_backwards_are_noticed(codec: str) -> None:
    data = encoded(".webm", codec=codec, container_options={"cluster_time_limit": "200", "write_crc32": "0"})
    first = data.index(b"\x1f\x43\xb6\x75")
    at = data.index(b"\xe7", data.index(b"\x1f\x43\xb6\x75", first + 4)) + 2  # the time of the second cluster
    width = data[at - 1] - 0x80
    earlier = int.from_bytes(data[at : at + width], "big") - 99  # milliseconds
    damaged = data[:at] + earlier.to_bytes(width, "big") + data[at + width :]
    with pytest.raises(DecodeError, match=r"clip 3: the times of its frames are damaged: the times run backwards"):
        frames_of(damaged)


def test_impossible_times_in_a_transport_stream_are_noticed() -> None:
    data = encoded(".ts")
    assert frames_of(data) == list(range(FRAMES))
    start = data.index(b"\x00\x00\x01\xe0")  # the first packet of the video, which carries both times
    assert data[start + 7] >> 6 == 3
    for byte, mask in ((9, 0x08), (10, 0x80), (14, 0x02)):
        damaged = bytearray(data)
        damaged[start + byte] ^= mask
        with pytest.raises(DecodeError, match=r"clip 3: .*impossible times"):
            frames_of(bytes(damaged))


def test_an_avi_without_its_index_is_not_taken_for_a_shorter_video() -> None:
    data = encoded(".avi", codec="mpeg4")
    at = data.rindex(b"idx1")
    with pytest.raises(DecodeError, match="clip 3"):
        frames_of(data[:at] + b"junk" + data[at + 4 :])


def test_metadata_of_other_times_is_noticed() -> None:
    for options in ({}, {"vfr": True}):
        data = encoded(".mp4", **options)
        info = probe_video(data).to_json()
        assert frames_of(data, VideoInfo.from_json(info)) == list(range(FRAMES))
        rounded = VideoInfo.from_json({**info, "fps": round(info["fps"] * 1.001, 2)})
        assert frames_of(data, rounded) == list(range(FRAMES))
        times = probe_video(data).times()
        others = [{"timestamps": (times * 1.1).tolist()}, {"timestamps": [0.0, *times[:-1].tolist()]}]
        if not options:
            others += [{"fps": info["fps"] / 2}, {"fps": info["fps"] * 1.1}]
        for other in others:
            with pytest.raises(DecodeError, match=r"clip 3: shows frame .* s from where its metadata says"):
                frames_of(data, VideoInfo.from_json(json.loads(json.dumps({**info, **other}))))


def test_hidden_frames_do_not_count_as_out_of_order(tmp_path: Path) -> None:
    """An edit list hides frames that still come out of the decoder."""
    whole = make_video(tmp_path / "whole.mp4", num_frames=48, b_frames=3)
    data = trim_by_copy(whole, tmp_path / "cut.mp4", start=17).read_bytes()
    with open_decoder(data, backend="pyav") as decoder:
        frames = decoder.frames_at([3, 0, 30])
    assert isinstance(frames, torch.Tensor)
    assert read_indices(frames) == [20, 17, 47]
