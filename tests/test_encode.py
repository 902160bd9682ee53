"""Encoding clips: exactly their frames, at their times, in their colours, and the same bytes each time."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import SampleError
from framestream.pipeline.probe import probe_video
from framestream.tools.encode import encode
from framestream.tools.shard_options import Codec, Encoding

import colour_reference
from clips_setup import beeping, clip, onsets, opened, shown
from synthetic import make_video, read_indices, vfr_ticks
from video_kinds import KINDS

CODECS: tuple[Codec, ...] = ("h264", "hevc", "vp9", "av1")


def types_of(data: bytes) -> str:
    with av.open(io.BytesIO(data)) as container:
        return "".join(av.video.frame.PictureType(frame.pict_type).name for frame in container.decode(video=0))


# --- the shape of pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixel", "short_side", "rotation", "size"),
    [
        ("2/1", None, 0, (160, 96)),  # stored 80 x 96
        ("2/1", 48, 0, (80, 48)),
        ("1/2", None, 0, (40, 96)),
        ("2/1", None, 90, (80, 192)),  # stored 96 x 80
    ],
)
def test_pixels_become_square(
    tmp_path: Path, pixel: str, short_side: int | None, rotation: int, size: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=12, size=(80, 96), rotation=rotation, extra=f":sar={pixel}")
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(pixel)
    data = clip(path, (0, 12), Encoding(short_side=short_side, gop=8))
    info = probe_video(data)
    assert (info.width, info.height) == size
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].sample_aspect_ratio in (None, 0, 1)
    if pixel == "2/1" and short_side is None:  # squeezed again, they are the pictures that were stored
        with open_decoder(data, backend="pyav", info=info) as decoder:
            pictures = decoder.frames_at(range(12))
        assert read_indices(pictures[:, :, ::2] if rotation else pictures[..., ::2]) == list(range(12))


# --- which frames, and when --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_a_stretch_of_a_long_gop_is_exactly_its_frames(tmp_path: Path, codec: Codec) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=90, gop=250, b_frames=3)
    info, indices = shown(clip(path, (37, 78), Encoding(gop=8, codec=codec)))
    assert indices == list(range(37, 78))
    assert (info.fps, info.timestamps, info.codec) == (24.0, None, codec)
    assert info.key_frames == tuple(range(0, 41, 8))
    assert info.packets is not None
    assert info.packets.closed_keys
    assert (np.diff(info.packets.order) == 1).all()  # no B-frames


def test_there_are_no_b_frames_even_where_the_source_has_them(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=24, gop=12, b_frames=3)
    assert types_of(path.read_bytes()).count("B") > 5
    assert types_of(clip(path, (0, 24), Encoding(gop=10))) == "IPPPPPPPPPIPPPPPPPPPIPPP"


def test_consecutive_clips_look_at_the_file_once(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=96, gop=12, b_frames=0)
    with opened(path) as video:
        for first in range(0, 96, 24):
            data = encode(video, (first, first + 24), Encoding(gop=8), "v", sound=False)
            assert shown(data)[1] == list(range(first, first + 24))
        assert video.decoder.stats.packets == 96


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_keeps_its_times_and_the_length_of_its_last_frame(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"v{suffix}", num_frames=40, vfr=True)
    info, indices = shown(clip(path, (7, 29)))
    assert indices == list(range(7, 29))
    ticks = np.array(vfr_ticks(40)) / 4 / 24
    tick = 1e-3 if suffix == ".mkv" else 1e-5
    assert info.times() == pytest.approx(ticks[7:29] - ticks[7], abs=tick)
    assert info.duration == pytest.approx(ticks[29] - ticks[7], abs=tick)


@pytest.mark.parametrize(("source_fps", "fps"), [(24, 12.0), (24, 30.0), (Fraction(30000, 1001), 10.0)])
def test_another_rate_shows_the_newest_frame_at_each_tick(tmp_path: Path, source_fps: Any, fps: float) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=60, fps=source_fps)
    info, indices = shown(clip(path, (10, 50), Encoding(gop=8, fps=fps)))
    seconds = 40 / float(source_fps)
    assert info.num_frames == round(seconds * fps)
    assert info.fps == fps
    assert indices == [10 + int(tick / fps * float(source_fps) + 1e-4) for tick in range(info.num_frames)]


def test_a_variable_rate_is_evened_out(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=40, vfr=True)
    info, indices = shown(clip(path, (0, 40), Encoding(gop=8, fps=24.0)))
    ticks = vfr_ticks(40)
    assert info.timestamps is None
    assert indices == [max(i for i, tick in enumerate(ticks) if tick <= 4 * k) for k in range(info.num_frames)]


SOME_KINDS = [
    "h264 open gop", "h264 gradual refresh", "h264 ts open gop", "h264 avi", "h264 edit list two parts exchanged",
    "h264 10 bit", "h264 4:4:4", "h264 rgb", "h264 grey", "h264 interlaced", "h264 begins in a gop",
    "hevc of a phone mov", "hevc open gop", "vp9 hidden frames webm", "vp8 hidden frames webm", "av1 10 bit webm",
    "mpeg4 b-frames mkv", "mpeg2 ts", "mjpeg avi", "prores mov",
]  # fmt: skip


@pytest.mark.parametrize("name", SOME_KINDS)
def test_every_kind_of_source_gives_its_frames(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    path = kind.make(tmp_path)
    count = len(kind.shown)
    info, indices = shown(clip(path, (3, count - 2)))
    assert indices == list(kind.shown)[3 : count - 2]
    assert info.pix_fmt == "yuv420p"


def test_damage_in_the_stretch_is_an_error_and_elsewhere_is_none(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=72, gop=12, size=(320, 192))
    data = path.read_bytes()
    info = probe_video(data, packets=True)
    assert info.packets is not None
    broken = bytearray(data)
    at = int(info.packets.offset[30])
    broken[at + 4 : at + int(info.packets.size[30])] = b"\xff" * (int(info.packets.size[30]) - 4)
    path.write_bytes(broken)
    assert shown(clip(path, (48, 70)))[1] == list(range(48, 70))
    with pytest.raises(SampleError, match=r"v\.mp4"):
        clip(path, (20, 40))


# --- what they look like ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in KINDS if "rotated" in n or n == "h264 mirrored"])
def test_turned_pictures_are_upright(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    source = probe_video(path)
    info, indices = shown(clip(path, (0, 10), Encoding(gop=8, short_side=64)))
    assert indices == list(KINDS[name].shown)[:10]  # an index that is turned or mirrored cannot be read
    assert info.rotation == 0
    assert (info.width < info.height) == (source.width < source.height)
    assert min(info.width, info.height) == 64


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((160, 96), None, (160, 96)),
        ((160, 96), 64, (106, 64)),  # 106.7
        ((160, 96), 200, (160, 96)),  # never enlarged
        ((161, 97), None, (160, 96)),
        ((161, 97), 200, (160, 96)),
        ((97, 161), 64, (64, 106)),
        ((96, 96), 48, (48, 48)),
    ],
)
def test_sizes_are_even_and_never_larger(
    tmp_path: Path, size: tuple[int, int], short_side: int | None, expected: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=4, size=size, pix_fmt="yuv444p")
    info, indices = shown(clip(path, (0, 4), Encoding(short_side=short_side)))
    assert (info.width, info.height) == expected
    assert indices == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [(1, 64), (64, 1)])
def test_a_picture_one_pixel_wide_or_high_is_refused_with_its_size(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
        picture = av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(picture), *stream.encode(None)])
    with pytest.raises(SampleError, match=rf"v\.mkv.* {size[0]} x {size[1]} pixels"):
        clip(path, (0, 1))


def test_an_odd_size_is_cropped_not_squeezed(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=1, size=(161, 97), pix_fmt="yuv444p", extra=":qp=0")
    data = clip(path, (0, 1), Encoding(crf=1))
    with open_decoder(path.read_bytes(), backend="pyav") as source, open_decoder(data, backend="pyav") as made:
        apart = (source.frames_at([0])[..., :96, :160].short() - made.frames_at([0]).short()).abs().float()
    assert apart.mean() < 3  # chroma at half the resolution


COLOURS = [case for case in colour_reference.CASES.values() if case.codec == "libx264"]


@pytest.mark.parametrize("case", COLOURS, ids=lambda case: case.name)
def test_colours_are_those_of_the_source(tmp_path: Path, case: colour_reference.ColourCase) -> None:
    """Against the standards' own formulas: 1.2 of 255 on average and 6 at most, of which the source's own rounding
    and that to limited range are about half."""
    path = colour_reference.write(case, tmp_path / f"v{case.suffix}")
    data = clip(path, (0, 3), Encoding(crf=1))
    mean, worst = colour_reference.deviation(frame_of(data), case)
    assert mean < 1.2
    assert worst < 6
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        assert (frame.color_range, frame.colorspace) == (1, {"bt601": 6, "bt709": 1, "bt2020": 9}[case.matrix])


@pytest.mark.parametrize("codec", CODECS)
def test_colours_survive_every_codec_and_a_resize(tmp_path: Path, codec: Codec) -> None:
    case = colour_reference.ColourCase("bt709", True)
    path = colour_reference.write(case, tmp_path / "v.mp4")
    data = clip(path, (0, 3), Encoding(crf=1, codec=codec, short_side=case.lines // 2))
    assert colour_reference.deviation(frame_of(data), case, reduced=2)[0] < 1.2


def frame_of(data: bytes) -> np.ndarray:
    with open_decoder(data, backend="pyav") as decoder:
        return decoder.frames_at([1])[0].numpy()


def test_colours_that_cannot_be_converted_are_an_error(tmp_path: Path) -> None:
    path = colour_reference.write(colour_reference.ColourCase("bt2020", False), tmp_path / "v.mp4", tag=14)
    with pytest.raises(SampleError, match="matrix number 14"):
        clip(path, (0, 3))


# --- the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_five_runs_give_the_same_bytes(tmp_path: Path, codec: Codec) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=40, size=(320, 192), audio=True)
    encoding = Encoding(gop=8, short_side=128, codec=codec)
    assert len({clip(path, (5, 38), encoding, sound=True) for _ in range(5)}) == 1


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=30)
    code = f"""
import hashlib, pathlib, clips_setup
print(hashlib.sha256(clips_setup.clip(pathlib.Path({str(path)!r}), (2, 25))).hexdigest())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.stdout.strip() == hashlib.sha256(clip(path, (2, 25))).hexdigest(), ran.stderr


@pytest.mark.parametrize("codec", ["hevc", *(pytest.param(c, marks=pytest.mark.slow) for c in ("h264", "vp9", "av1"))])
def test_what_memory_held_before_does_not_reach_the_bytes(tmp_path: Path, codec: Codec) -> None:
    """Encoders that read what they have not written give other bytes now and then: glibc fills fresh memory here."""
    path = make_video(tmp_path / "v.mp4", num_frames=30, size=(128, 96))
    code = f"""
import hashlib, pathlib, clips_setup
encoding = clips_setup.Encoding(gop=16, short_side=64, codec={codec!r})
print(hashlib.sha256(clips_setup.clip(pathlib.Path({str(path)!r}), (0, 30), encoding)).hexdigest())
"""
    found = set()
    for fill in ("85", "170"):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env={**os.environ, "MALLOC_PERTURB_": fill},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(ran.stdout.strip().splitlines()[-1])
    assert len(found) == 1


@pytest.mark.parametrize("codec", ["aac", "libmp3lame", "ac3"])
def test_sound_is_the_same_whatever_was_read_before(tmp_path: Path, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = beeping(tmp_path / "v.mkv", codec)
    alone = clip(path, (72, 96), sound=True)
    with opened(path) as video:
        after = [encode(video, part, Encoding(gop=8), "v.mkv", sound=True) for part in ((0, 24), (24, 48), (72, 96))]
    assert after[-1] == alone


def test_nothing_of_the_run_is_in_the_file(tmp_path: Path) -> None:
    data = clip(make_video(tmp_path / "v.mp4", num_frames=4), (0, 4))
    assert b"Lavf" not in data
    with av.open(io.BytesIO(data)) as container:
        assert "creation_time" not in container.metadata


# --- sound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "suffix", "becomes"),
    [
        ("aac", ".mp4", "aac"), ("aac", ".ts", "aac"), ("libmp3lame", ".mp4", "mp3float"), ("ac3", ".mkv", "ac3"),
        ("libopus", ".mkv", "opus"), ("flac", ".mkv", "flac"), ("mp2", ".mkv", "aac"), ("pcm_s16le", ".mkv", "aac"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frames", [(0, 60), (60, 132)])
def test_sound_goes_along_in_sync(
    tmp_path: Path, codec: str, suffix: str, becomes: str, frames: tuple[int, int]
) -> None:
    """Within 10 ms: less than half a frame of sound."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = beeping(tmp_path / f"v{suffix}", codec)
    data = clip(path, frames, sound=True)
    name, found = onsets(data)
    assert name == becomes
    expected = [k - frames[0] / 24 for k in range(6) if frames[0] / 24 + 0.4 <= k < frames[1] / 24 - 0.1]
    assert [at for at in found if at > 0.4] == pytest.approx(expected, abs=0.01)
    assert probe_video(data).num_frames == frames[1] - frames[0]
    assert data == clip(path, frames, sound=True)


def test_sound_is_left_out_where_it_is_not_asked_for_and_not_missed_where_there_is_none(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=30, audio=True)
    assert probe_video(clip(path, (0, 20), sound=True)).has_audio
    assert not probe_video(clip(path, (0, 20), sound=False)).has_audio
    silent = make_video(tmp_path / "s.mp4", num_frames=30)
    assert not probe_video(clip(silent, (0, 20), sound=True)).has_audio
