from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from framestream.pipeline.errors import DecodeError, SampleError
from framestream.pipeline.probe import VideoInfo, probe_video

from synthetic import make_audio, make_video, trim_by_copy, vfr_ticks, video_bytes


def test_probe_tells_what_was_encoded(clip: bytes, clip_path: Path) -> None:
    info = probe_video(clip)
    assert info == VideoInfo(
        num_frames=48,
        fps=24.0,
        duration=2.0,
        width=160,
        height=96,
        codec="h264",
        rotation=0,
        key_frames=(0, 12, 24, 36),
        timestamps=None,
        has_audio=False,
        pix_fmt="yuv420p",
    )
    assert probe_video(clip_path) == info
    assert probe_video(str(clip_path)) == info
    np.testing.assert_allclose(info.times(), np.arange(48) / 24)


@pytest.mark.parametrize(
    ("suffix", "options", "expected"),
    [
        (".mkv", {"fps": 30}, {"fps": 30.0, "codec": "h264"}),
        (".webm", {"codec": "vp9", "fps": 25}, {"fps": 25.0, "codec": "vp9"}),
        (".avi", {"codec": "mpeg4"}, {"codec": "mpeg4"}),
        (".ts", {"audio": True}, {"has_audio": True, "fps": 24.0}),
        (".mp4", {"codec": "hevc", "pix_fmt": "yuv420p10le"}, {"codec": "hevc", "pix_fmt": "yuv420p10le"}),
        (".mp4", {"codec": "av1", "num_frames": 8}, {"codec": "av1", "num_frames": 8}),
        (".mp4", {"rotation": 90}, {"rotation": 90, "width": 160, "height": 96}),
        (".mp4", {"rotation": 270, "size": (96, 160)}, {"rotation": 270, "width": 96, "height": 160}),
        (".mov", {"rotation": 180}, {"rotation": 180}),
        (".mp4", {"num_frames": 1}, {"num_frames": 1, "key_frames": (0,), "duration": 1 / 24}),
        (".mp4", {"audio": True, "fragmented": True}, {"has_audio": True, "num_frames": 48}),
        (".mp4", {"open_gop": True, "b_frames": 3}, {"key_frames": (0, 12, 24, 36)}),
        (".mp4", {"gop": 250}, {"key_frames": (0,)}),
        (".mkv", {"gop": 100, "num_frames": 300}, {"num_frames": 300, "key_frames": (0, 100, 200)}),
    ],
)
def test_probe_facts(suffix: str, options: dict, expected: dict) -> None:
    info = probe_video(video_bytes(suffix, **options))
    for key, value in expected.items():
        assert getattr(info, key) == (pytest.approx(value) if isinstance(value, float) else value)
    assert info.timestamps is None


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_timestamps_of_a_variable_rate_come_from_the_file(suffix: str) -> None:
    info = probe_video(video_bytes(suffix, vfr=True))
    expected = np.array(vfr_ticks(48)) / 4 / 24
    assert info.timestamps is not None
    np.testing.assert_allclose(info.timestamps, expected, atol=0.001)
    assert info.fps == pytest.approx(47 / expected[-1], rel=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".webm"])
def test_rates_that_no_clock_divides_are_constant(suffix: str) -> None:
    codec = "vp9" if suffix == ".webm" else "h264"
    info = probe_video(video_bytes(suffix, codec=codec, fps=Fraction(30000, 1001)))
    assert info.fps == pytest.approx(30000 / 1001, rel=1e-5)
    assert info.timestamps is None


def test_frames_hidden_by_an_edit_list_do_not_count(clip_path: Path, tmp_path: Path) -> None:
    info = probe_video(trim_by_copy(clip_path, tmp_path / "cut.mp4", start=17))
    assert info.num_frames == 31
    assert info.key_frames == (7, 19)
    assert info.duration == pytest.approx(31 / 24)


def test_json_round_trip(clip: bytes) -> None:
    for data in (clip, video_bytes(vfr=True), video_bytes(".webm", codec="vp9", num_frames=3)):
        info = probe_video(data)
        record = json.loads(json.dumps({**info.to_json(), "sha256": "…", "user": {}}))
        assert VideoInfo.from_json(record) == info
    assert "timestamps" not in probe_video(clip).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": "48"}, "num_frames is '48'"),
        ({"num_frames": True}, "num_frames is True"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 0}, "fps is 0"),
        ({"duration": -1}, "duration is -1"),
        ({"duration": 10**400}, "duration is 1000"),
        ({"timestamps": [0] * 47 + [10**400]}, "timestamps"),
        ({"width": 1 << 20}, "width is"),
        ({"rotation": 45}, "rotation is 45"),
        ({"key_frames": [0, 99]}, "key_frames"),
        ({"key_frames": [12, 0]}, "key_frames"),
        ({"key_frames": [-1]}, "key_frames"),
        ({"timestamps": [0.0, 1.0]}, "timestamps"),
        ({"timestamps": [1.0] + [0.0] * 47}, "timestamps"),
        ({"timestamps": ["x"] * 48}, "timestamps"),
        ({"codec": None}, "codec is None"),
        ({"has_audio": "yes"}, "has_audio is 'yes'"),
    ],
)
def test_absurd_metadata_is_refused_by_name(clip: bytes, change: dict, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        VideoInfo.from_json({**probe_video(clip).to_json(), **change})


def test_missing_metadata_is_refused_by_name(clip: bytes) -> None:
    record = probe_video(clip).to_json()
    del record["fps"], record["codec"]
    with pytest.raises(SampleError, match="fps, codec missing"):
        VideoInfo.from_json(record)
    with pytest.raises(SampleError, match="expected a JSON object"):
        VideoInfo.from_json([1])  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted(VideoInfo.__dataclass_fields__)),
        st.none() | st.integers() | st.text() | st.floats() | st.lists(st.integers() | st.floats() | st.none()),
    )
)
@example({"packets": [1]})
def test_any_metadata_is_read_or_refused(change: dict) -> None:
    record = {
        "num_frames": 2,
        "fps": 24.0,
        "duration": 1.0,
        "width": 8,
        "height": 8,
        "codec": "h264",
        **change,
    }
    try:
        info = VideoInfo.from_json(record)
    except SampleError:
        return
    assert len(info.times()) == info.num_frames or info.num_frames > 1 << 20
    assert VideoInfo.from_json(info.to_json()) == info


def test_what_is_no_video_is_refused_with_the_reason(tmp_path: Path, clip: bytes) -> None:
    moov = clip.index(b"moov")
    cases = {
        b"": "not a readable video",
        b"\0" * 5000: "not a readable video",
        b"once upon a time there was a text\n" * 200: "not a readable video",
        make_audio(tmp_path / "sound.m4a").read_bytes(): "no video in it, only audio",
        clip[: moov - 4]: "not a readable video",
        clip[: moov + 100]: "bytes are missing at its end",
        b"GIF89a" + b"\0" * 500: "not a readable video",
        os.urandom(20000): "clip 7",
    }
    for data, message in cases.items():
        with pytest.raises(DecodeError, match=message) as caught:
            probe_video(data, name="clip 7")
        assert str(caught.value).startswith("clip 7: ")


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        packets = cover.encode(frame) + cover.encode(None)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        silence.sample_rate = 16000
        packets += sound.encode(silence) + sound.encode(None)
        for packet in packets:
            container.mux(packet)
    with pytest.raises(DecodeError, match="no video in it, only audio"):
        probe_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".mov"])
def test_a_file_cut_anywhere_is_refused(suffix: str) -> None:
    codec = "vp9" if suffix == ".webm" else "h264"
    data = video_bytes(suffix, codec=codec, fragmented=suffix == ".mov")
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        with pytest.raises(DecodeError):
            probe_video(data[: int(len(data) * share)])


@pytest.mark.parametrize("head", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"])
def test_play_lists_that_name_other_files_are_not_followed(head: str, clip_path: Path) -> None:
    with pytest.raises(DecodeError, match="not a readable video"):
        probe_video(head.format(clip_path).encode())


def test_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"nothing\.mp4: cannot be read"):
        probe_video(tmp_path / "nothing.mp4")
    with pytest.raises(DecodeError, match="cannot be read"):
        probe_video(tmp_path)


def test_absurd_picture_size_is_refused(tmp_path: Path) -> None:
    data = bytearray(make_video(tmp_path / "clip.avi", codec="rawvideo", num_frames=2).read_bytes())
    for at in (data.index(b"strf") + 12, data.index(b"avih") + 8 + 32):
        data[at : at + 8] = (20000).to_bytes(4, "little") + (3000).to_bytes(4, "little")
    with pytest.raises(DecodeError, match="20000 x 3000"):
        probe_video(bytes(data))


def test_packed_b_frames_are_refused(tmp_path: Path) -> None:
    data = make_video(tmp_path / "clip.avi", codec="mpeg4").read_bytes()
    mark = data.index(b"Lavc", data.index(b"\0\0\1\xb2"))
    end = data.index(b"\0\0\1", mark)
    packed = data[:mark] + b"DivX503b1393p"[: end - mark].ljust(end - mark, b"p") + data[end:]
    with pytest.raises(DecodeError, match="packed B-frames"):
        probe_video(packed)


def test_too_little_time_is_an_error_and_not_a_hang(clip: bytes) -> None:
    with pytest.raises(DecodeError, match=r"took longer than 0 s"):
        probe_video(clip, timeout_s=0)
