"""Parts of files without encoding: exactly their frames and times, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.tools.stream_copy import stream_copy

from clips_setup import beeping, onsets, opened
from synthetic import make_video, read_indices, vfr_ticks
from video_kinds import KINDS

OPEN = [
    *(name for name in KINDS if "open gop" in name or "mpeg4 b-frames" in name),
    *("h264 gradual refresh", "hevc 10 bit mkv", "mpeg4 every frame marked as key", "mpeg4 avi"),
]
UNTOLD = ("h264 every time twice mkv", "h264 every time twice no b-frames mkv")
HIDDEN = [
    n for n in KINDS if any(w in n for w in ("two parts", "two whole", "a part twice", "overlap", "holds", "the end"))
]


def pictures(data: bytes, frames: tuple[int, int] | None = None) -> tuple[VideoInfo, np.ndarray]:
    """What is in a file, and its frames (or those of a range) as they are decoded."""
    info = probe_video(data, packets=True)
    with open_decoder(data, backend="pyav", info=info) as decoder:
        return info, decoder.frames_at(range(*(frames or (0, info.num_frames)))).numpy()


def parts(info: VideoInfo) -> list[tuple[int, int]]:
    """From one key frame to the next but one; a part in the midst, the beginning, the end."""
    ends = [key for key in info.key_frames if key] + [info.num_frames]
    starts = [0, *ends[:-1]]
    return sorted({(starts[0], ends[0]), (starts[len(starts) // 2], ends[len(starts) // 2]), (starts[-1], ends[-1])})


CLEAN = [n for n in KINDS if n not in (*OPEN, *HIDDEN, *UNTOLD, "dnxhr mov")]
SOME = (
    "h264 b-frames", "h264 gop 16 mkv", "h264 every frame marked as key", "h264 rgb", "h264 fragmented", "h264 ts",
    "h264 variable rate", "h264 edit list", "h264 begins in a gop ts", "h264 two sounds mkv", "h264 rotated 90",
    "h264 mirrored", "hevc", "hevc ts", "vp9 webm", "vp8 hidden frames webm", "av1", "mpeg4 avi no b-frames",
    "mpeg2 ts", "prores mov",
)  # fmt: skip


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in CLEAN])
def test_a_part_decodes_to_exactly_its_frames_and_times(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    source = probe_video(path)
    with opened(path) as video:
        for first, stop in parts(source):
            data, ext = stream_copy(video, (first, stop), name, sound=False)
            info, found = pictures(data)
            _, wanted = pictures(path.read_bytes(), (first, stop))
            assert np.array_equal(found, wanted)
            assert ext == ("mp4" if source.codec in ("h264", "hevc", "vp9", "av1", "mpeg4") else "mkv")
            assert (info.codec, info.rotation, info.has_audio) == (source.codec, source.rotation, False)
            times = source.times()[first:stop] - source.times()[first]
            assert info.times() == pytest.approx(times, abs=2e-3 if path.suffix in (".mkv", ".webm") else 1e-3)
            assert data == stream_copy(video, (first, stop), name, sound=False)[0]


@pytest.mark.parametrize("name", [n for n in OPEN if "cut" not in n and "edit" not in n])
def test_groups_that_lean_on_others_are_refused(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    info = probe_video(path)
    with opened(path) as video:
        for part in parts(info):
            with pytest.raises(SampleError, match=r"clip 7: .*cannot be cut there.*encoded anew"):
                stream_copy(video, part, "clip 7", sound=False)


@pytest.mark.parametrize("name", ["h264 open gop", "h264 ts open gop", "hevc open gop", "mpeg4 b-frames mkv"])
def test_all_of_a_file_can_be_copied_with_open_groups(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    with opened(path) as video:
        data, _ = stream_copy(video, (0, video.info.num_frames), name, sound=False)
    assert np.array_equal(pictures(data)[1], pictures(path.read_bytes())[1])


@pytest.mark.parametrize(("name", "words"), [(UNTOLD[0], "order of its frames"), ("h264 edit list holds", "edit list")])
def test_what_a_copy_could_not_show_is_refused(tmp_path: Path, name: str, words: str) -> None:
    path = KINDS[name].make(tmp_path)
    with opened(path) as video, pytest.raises(SampleError, match=f"clip 7: .*{words}.*encoded anew"):
        stream_copy(video, (0, video.info.num_frames), "clip 7", sound=False)


def test_frames_that_are_no_key_frames_are_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=48, gop=12)
    with opened(path) as video:
        for frames in ((5, 24), (12, 30)):
            with pytest.raises(SampleError, match=r"clip 7: frame (5|30) is no key frame"):
                stream_copy(video, frames, "clip 7", sound=False)


def test_a_variable_rate_keeps_its_times_to_the_tick(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=48, gop=12, vfr=True)
    with opened(path) as video:
        info = probe_video(stream_copy(video, (12, 36), "v", sound=False)[0])
    ticks = np.array(vfr_ticks(48)) / 4 / 24
    assert info.times() == pytest.approx(ticks[12:36] - ticks[12], abs=1e-6)
    assert info.duration == pytest.approx(ticks[36] - ticks[12], abs=1e-6)


@pytest.mark.parametrize(
    ("codec", "suffix"), [("aac", ".mp4"), ("aac", ".ts"), ("libopus", ".mkv"), ("pcm_s16le", ".mkv")]
)
@pytest.mark.parametrize("frames", [(0, 48), (48, 120)])
def test_sound_goes_along_in_sync(tmp_path: Path, codec: str, suffix: str, frames: tuple[int, int]) -> None:
    path = beeping(tmp_path / f"v{suffix}", codec)
    with opened(path) as video:
        data, _ = stream_copy(video, frames, "v", sound=True)
    info, found = pictures(data)
    assert read_indices(torch.from_numpy(found)) == list(range(*frames))
    expected = [k - frames[0] / 24 for k in range(6) if frames[0] / 24 + 0.4 <= k < frames[1] / 24 - 0.1]
    length = (frames[1] - frames[0]) / 24  # the last frame of sound may last longer
    assert [at for at in onsets(data)[1] if 0.4 < at < length - 0.1] == pytest.approx(expected, abs=0.01)
    assert info.duration == pytest.approx(length, abs=2e-3)
