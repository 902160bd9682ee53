from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.decode import (
    BACKENDS,
    available_backends,
    choose_backend,
    fit_short_side,
    open_decoder,
)
from framestream.pipeline.decode_pyav import PyAVDecoder
from framestream.pipeline.errors import ConfigError, DecodeError
from framestream.pipeline.probe import probe_video

from synthetic import make_video, read_index, read_indices, vfr_ticks, video_bytes


def usable(backend: str) -> str:
    reason = available_backends()[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return backend


@pytest.mark.parametrize(
    ("wanted", "packets", "runs"),
    [
        ([0], 1, 1),  # a key frame takes its own packet
        ([12, 24, 36], 3, 3),
        ([0, 12, 24, 36], 4, 4),
        (range(48), 48, 1),  # nothing is spared by starting afresh
        ([47], 12, 1),  # the last frame takes its GOP
        ([40, 41, 42, 43, 44, 45, 46, 47], 12, 1),
        ([0, 47], 13, 2),
    ],
)
def test_only_the_packets_needed_are_decoded(clip: bytes, wanted: list[int], packets: int, runs: int) -> None:
    with PyAVDecoder(clip) as decoder:
        decoder.frames_at(wanted)
        assert decoder.stats.runs == runs
        assert decoder.stats.packets <= packets
        assert decoder.stats.pictures == len(wanted)


@settings(max_examples=40, deadline=None)
@given(wanted=st.lists(st.integers(0, 47), min_size=1, max_size=20))
def test_any_indices_in_any_order(clip: bytes, wanted: list[int]) -> None:
    with PyAVDecoder(clip, short_side=48) as decoder:
        assert read_indices(decoder.frames_at(wanted)) == wanted
        assert decoder.stats.pictures == len(set(wanted))
        assert decoder.stats.packets <= 12 * len({index // 12 for index in wanted})


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("size", "rotation", "short_side", "expected"),
    [
        ((160, 96), 0, None, (96, 160)),
        ((160, 96), 0, 96, (96, 160)),
        ((160, 96), 0, 48, (48, 80)),
        ((160, 96), 0, 224, (224, 373)),
        ((96, 160), 90, 64, (107, 64)),
        ((160, 96), 270, 64, (64, 107)),
        ((128, 128), 0, 57, (57, 57)),
        ((258, 66), 0, 32, (32, 125)),
    ],
)
def test_sizes(backend: str, size: tuple, rotation: int, short_side: int | None, expected: tuple) -> None:
    data = video_bytes(size=size, rotation=rotation, num_frames=3)
    with open_decoder(data, backend=usable(backend), short_side=short_side) as decoder:
        frames = decoder.frames_at([2, 0])
    assert frames.shape == (2, 3, *expected)
    assert frames.is_contiguous()
    assert read_indices(frames) == [2, 0]


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 1024))
def test_fit_short_side_keeps_the_aspect(width: int, height: int, short: int) -> None:
    new_width, new_height = fit_short_side(width, height, short)
    assert min(new_width, new_height) == short
    assert abs(max(new_width, new_height) - max(width, height) * short / min(width, height)) <= 0.5
    assert fit_short_side(width, height, None) == (width, height)


@pytest.mark.parametrize(("flips", "shown"), [((True, False), (0, 1)), ((False, True), (1, 0)), ((True, True), (1, 1))])
def test_mirrored_pictures_are_shown_as_players_show_them(tmp_path: Path, flips: tuple, shown: tuple) -> None:
    """`shown`: row and column of the quarter in which the bright corner at the top left is shown."""
    path = tmp_path / "mirrored.mp4"
    write_picture(path, bright_corner(), flips=flips)
    with open_decoder(path.read_bytes(), backend="pyav") as decoder:
        quarters = decoder.frames_at([0])[0].float().mean(0).reshape(2, 32, 2, 32).mean((1, 3))
    assert divmod(int(quarters.argmax()), 2) == shown


def test_a_slanted_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slanted.mp4"
    write_picture(path, bright_corner(), degrees=30)
    with pytest.raises(DecodeError, match="no quarter turn"):
        probe_video(path)
    with (
        open_decoder(path.read_bytes(), backend="pyav") as decoder,
        pytest.raises(DecodeError, match="no quarter turn"),
    ):
        decoder.frames_at([0])


def bright_corner() -> np.ndarray:
    picture = np.full((64, 64, 3), 40, np.uint8)
    picture[:32, :32] = 220
    return picture


def write_picture(
    path: Path,
    picture: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    flips: tuple[bool, bool] = (False, False),
    degrees: float = 0,
    matrix: int = 0,
    levels: int = 0,
) -> None:
    """A video of one picture. `matrix` and `levels` are FFmpeg's numbers to convert by and to tag with."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "5"} if codec == "libx264" else {})
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = pix_fmt
        if any(flips) or degrees:
            stream.set_display_rotation(degrees, *flips)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        if matrix:
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, levels
            frame = frame.reformat(format=pix_fmt, dst_colorspace=1 if matrix == 1 else 5, dst_color_range=levels)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_reduction_does_not_alias(tmp_path: Path) -> None:
    path = tmp_path / "stripes.mkv"
    picture = np.zeros((320, 320, 3), np.uint8)
    picture[:, ::2] = 255  # stripes of one pixel: grey from far away
    write_picture(path, picture, codec="ffv1", pix_fmt="yuv444p")
    with open_decoder(path.read_bytes(), backend="pyav", short_side=48) as decoder:
        frame = decoder.frames_at([0])[0].float()[:, 4:-4, 4:-4]
    assert 115 < frame.mean() < 140
    assert frame.std() < 12


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("colour", [(200, 30, 40), (20, 180, 60), (30, 60, 220), (255, 255, 255), (0, 0, 0)])
def test_colours_come_back(tmp_path: Path, backend: str, colour: tuple[int, int, int]) -> None:
    path = tmp_path / "colour.mp4"
    write_picture(path, np.broadcast_to(np.array(colour, np.uint8), (64, 64, 3)).copy())
    with open_decoder(path.read_bytes(), backend=usable(backend), short_side=32) as decoder:
        frame = decoder.frames_at([0])[0]
    assert (frame.flatten(1).float().mean(1) - torch.tensor(colour)).abs().max() < 6


@pytest.mark.parametrize("matrix", [1, 6])  # BT.709, BT.601
@pytest.mark.parametrize("levels", [1, 2])  # limited, full
def test_matrix_and_range_that_the_stream_names_are_used(tmp_path: Path, matrix: int, levels: int) -> None:
    colour, path = (220, 60, 30), tmp_path / "colour.mp4"
    picture = np.broadcast_to(np.array(colour, np.uint8), (64, 64, 3)).copy()
    write_picture(path, picture, matrix=matrix, levels=levels)
    with open_decoder(path.read_bytes(), backend="pyav") as decoder:
        found = decoder.frames_at([0])[0].flatten(1).float().mean(1)
    assert (found - torch.tensor(colour)).abs().max() < 6


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_readers_show_the_same_picture(clip: bytes, backend: str) -> None:
    with open_decoder(clip, backend="pyav", short_side=64) as ours:
        expected = ours.frames_at([0, 20, 47]).float()
    with open_decoder(clip, backend=usable(backend), short_side=64) as theirs:
        assert (theirs.frames_at([0, 20, 47]).float() - expected).abs().mean() < 4


def test_times_and_key_frames_are_those_of_the_probe(clip: bytes) -> None:
    for data in (clip, video_bytes(vfr=True), video_bytes(".mkv", vfr=True)):
        info = probe_video(data)
        for backend in ("pyav", "decord"):
            with open_decoder(data, backend=usable(backend)) as decoder:
                np.testing.assert_array_equal(decoder.timestamps, info.times())
                assert tuple(decoder.key_frames) == info.key_frames
                assert decoder.fps == info.fps
    np.testing.assert_allclose(probe_video(video_bytes(vfr=True)).times(), np.array(vfr_ticks(48)) / 96)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_metadata_of_another_video_is_noticed(clip: bytes, backend: str) -> None:
    other = probe_video(video_bytes(num_frames=20))
    with pytest.raises(DecodeError, match="clip 3: has 48 frames, but its metadata says 20"):
        open_decoder(clip, backend=usable(backend), info=other, name="clip 3")


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("wanted", [[48], [-1], [0, 1000], []])
def test_frames_outside_the_video_are_an_error(clip: bytes, backend: str, wanted: list[int]) -> None:
    with (
        open_decoder(clip, backend=usable(backend), name="clip 3") as decoder,
        pytest.raises(DecodeError, match=r"clip 3: .*asked for"),
    ):
        decoder.frames_at(wanted)


def test_the_deadline_is_kept_between_packets(clip: bytes) -> None:
    with PyAVDecoder(clip, name="clip 3") as decoder:
        decoder.timeout_s = 0
        with pytest.raises(DecodeError, match=r"clip 3: .*longer than 0 s"):
            decoder.frames_at([47])
        decoder.timeout_s = 30
        assert read_index(decoder.frames_at([47])[0]) == 47


def test_a_size_that_changes_in_the_middle_is_refused(tmp_path: Path) -> None:
    first = make_video(tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p", num_frames=3)
    second = make_video(tmp_path / "b.avi", codec="mjpeg", pix_fmt="yuvj420p", num_frames=3, size=(128, 128))
    path = tmp_path / "both.avi"
    with av.open(str(first)) as a, av.open(str(second)) as b, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(a.streams.video[0])
        packets = [packet for source in (a, b) for packet in source.demux(video=0) if packet.size]
        for index, packet in enumerate(packets):
            packet.pts = packet.dts = index
            packet.stream = stream
            container.mux(packet)
    with open_decoder(path.read_bytes(), backend="pyav", name="clip 3") as decoder:
        assert read_indices(decoder.frames_at([0, 2])) == [0, 2]
        with pytest.raises(DecodeError, match="clip 3: frame 3 is 128 x 128, others are 160 x 96"):
            decoder.frames_at(range(6))


def test_unknown_and_unusable_backends_are_a_config_error(clip: bytes) -> None:
    with pytest.raises(ConfigError, match="'opencv' is unknown; expected one of auto, pyav, decord"):
        choose_backend("opencv")
    with pytest.raises(ConfigError, match="short_side is 0"):
        open_decoder(clip, short_side=0)
    for backend, reason in available_backends().items():
        if reason:
            with pytest.raises(ConfigError, match=f"'{backend}' cannot be used here: "):
                open_decoder(clip, backend=backend)
        else:
            assert choose_backend(backend)[0] == backend
    assert set(available_backends()) == set(BACKENDS)


def test_auto_says_once_what_it_chose(clip: bytes, caplog: pytest.LogCaptureFixture) -> None:
    from framestream.pipeline import decode

    decode._told.clear()
    with caplog.at_level(logging.INFO, logger="framestream.pipeline.decode"):
        for _ in range(3):
            choose_backend("auto", device="cpu")
            open_decoder(clip, backend="auto").close()
    chosen = [record.message for record in caplog.records]
    assert chosen[0] == "decoder: pyav (decoding for the CPU)"
    assert len(chosen) == 2
    assert choose_backend("auto", device="cpu")[0] == "pyav"


@pytest.mark.parametrize("degrees", [90, 180])
def test_pictures_that_are_turned_one_by_one_are_refused(tmp_path: Path, clip_path: Path, degrees: int) -> None:
    """A display orientation in the stream itself, on key frames only: the others would be laid differently."""
    path = tmp_path / "turned.ts"
    with av.open(str(clip_path)) as reader, av.open(str(path), "w") as writer:
        source = reader.streams.video[0]
        turn = f"h264_mp4toannexb,h264_metadata=rotate={degrees}:display_orientation=insert"
        insert = av.BitStreamFilterContext(turn, source)
        copy = writer.add_stream_from_template(source)
        packets = [packet for packet in reader.demux(source) if packet.size]
        for packet in (changed for one in [*packets, None] for changed in insert.filter(one)):
            packet.stream = copy
            writer.mux(packet)
    with open_decoder(path.read_bytes(), backend="pyav", name="clip 3") as decoder:
        assert len(decoder.frames_at([0])) == 1
        with pytest.raises(DecodeError, match="clip 3: frame 1 is turned otherwise than others"):
            decoder.frames_at([0, 1])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_open_groups_that_manage_references_from_before_them(suffix: str) -> None:
    """Beginning at any of their key frames is an error to FFmpeg, but at the first."""
    data = video_bytes(suffix, num_frames=96, open_gop=True, b_frames=4, extra=":b-adapt=0:b-pyramid=normal")
    with PyAVDecoder(data) as decoder:
        for first in (84, 60, 0, 36):
            wanted = list(range(first, first + 12))
            assert read_indices(decoder.frames_at(wanted)) == wanted
