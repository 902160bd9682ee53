"""The kinds of video that people have, each as a small clip whose frames carry their index: rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from remux import HELD, Track, mark_all_as_key, remux, set_edits, set_matrix
from synthetic import make_video, trim_by_copy

FRAMES = 48
Make = Callable[[Path], Path]


class Kind(NamedTuple):
    """One row of the matrix. Its name tells the container, where that is not mp4.

    Attributes:
        make: writes the clip into a folder and returns its path.
        shown: the index that each frame carries, in the order in which players show them.
    """

    make: Make
    shown: Sequence[int] = range(FRAMES)


def _made(suffix: str, **options: Any) -> Make:
    return lambda folder: make_video(folder / f"clip{suffix}", **options)


def _cut(suffix: str, source: str = ".mp4", **options: Any) -> Make:
    """Frames from 17 on, cut without coding anew. Only mp4 and mov can hide what comes from frame 12 on."""

    def make(folder: Path) -> Path:
        whole = make_video(folder / f"whole{source}", **options)
        return trim_by_copy(whole, folder / f"clip{suffix}", start=17)

    return make


def _all_marked(codec: str) -> Make:
    return lambda folder: mark_all_as_key(make_video(folder / "clip.mp4", codec=codec))


def _edited(*edits: tuple[int, int]) -> Make:
    return lambda folder: set_edits(make_video(folder / "clip.mp4"), list(edits))


def _put(
    suffix: str,
    tracks: Callable[[Path], list[Track]],
    source: dict[str, Any] | None = None,
    whole: str = ".mp4",
    **how: Any,
) -> Make:
    """Tracks of a clip put together anew; `source` and `whole` say how the clip is made, `how` is for `remux`."""

    def make(folder: Path) -> Path:
        clip = make_video(folder / f"whole{whole}", **{"audio": whole == ".mp4", **(source or {})})
        return remux(folder / f"clip{suffix}", *tracks(clip), **how)

    return make


def _video(clip: Path, **how: Any) -> list[Track]:
    return [Track(clip, **how)]


def _two_videos(clip: Path, first: bool, other: bool) -> list[Track]:
    """The clip and a larger one whose indices begin at 1000; `first`, `other`: which is marked as the default."""
    larger = make_video(clip.parent / "other.mp4", size=(320, 192), first_index=1000)
    return [Track(clip, default=first), Track(larger, default=other)]


def _mirrored(folder: Path) -> Path:
    """The stored picture is mirrored, and players are told to mirror it back."""
    clip = make_video(folder / "clip.mp4", mirrored=True)
    return set_matrix(clip, (-(1 << 16), 0, 0, 0, 1 << 16, 0, 160 << 16, 0, 1 << 30))


def _without(*indices: int) -> list[int]:
    return [index for index in range(FRAMES) if index not in indices]


def _flags(movflags: str) -> dict[str, dict[str, str]]:
    return {"container_options": {"movflags": movflags}}


_LONG: dict[str, Any] = {"gop": 250, "num_frames": 520, "size": (96, 64)}
_OTHER = range(1000, 1000 + FRAMES)
_HDR = ":colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc"
_NTSC = Fraction(60000, 1001)
_WRAP = Fraction(2**33, 90000) - 1  # a second before the clock of a transport stream begins anew

SECTIONS: dict[str, dict[str, Kind]] = {
    "H.264: groups of pictures": {
        "h264 b-frames": Kind(_made(".mp4", b_frames=3)),
        "h264 no b-frames": Kind(_made(".mp4", b_frames=0)),
        "h264 gop 16 mkv": Kind(_made(".mkv", gop=16)),
        "h264 gop 250": Kind(_made(".mp4", **_LONG), range(520)),
        "h264 gop 250 scene cuts mkv": Kind(_made(".mkv", extra=":scenecut=40", **_LONG), range(520)),
        "h264 key frames only mov": Kind(_made(".mov", gop=1, b_frames=0)),
        "h264 open gop": Kind(_made(".mp4", open_gop=True, b_frames=3)),
        "h264 open gop mkv": Kind(_made(".mkv", open_gop=True, b_frames=3)),
        "h264 gradual refresh": Kind(_made(".mp4", extra=":intra-refresh=1")),
        "h264 headers repeated": Kind(_made(".mp4", extra=":repeat-headers=1:aud=1:slices=4")),
        "h264 every frame marked as key": Kind(_all_marked("h264")),
        "h264 interlaced": Kind(_made(".mp4", extra=":interlaced=1")),
        "h264 one frame": Kind(_made(".mp4", num_frames=1), range(1)),
        "h264 two frames": Kind(_made(".mp4", num_frames=2), range(2)),
        "h264 one frame ts": Kind(_made(".ts", num_frames=1), range(1)),
    },
    "H.264: pixels and sizes": {
        "h264 10 bit": Kind(_made(".mp4", pix_fmt="yuv420p10le")),
        "h264 4:2:2 10 bit mov": Kind(_made(".mov", pix_fmt="yuv422p10le")),
        "h264 4:4:4": Kind(_made(".mp4", pix_fmt="yuv444p")),
        "h264 rgb": Kind(_made(".mp4", codec="libx264rgb", pix_fmt="rgb24")),
        "h264 grey": Kind(_made(".mp4", pix_fmt="gray")),
        "h264 full range": Kind(_made(".mp4", pix_fmt="yuvj420p")),
        "h264 lossless mkv": Kind(_made(".mkv", extra=":qp=0")),
        "h264 odd size": Kind(_made(".mp4", size=(161, 97), pix_fmt="yuv444p")),
        "h264 cropped size": Kind(_made(".mp4", size=(154, 90))),
    },
    "H.264: containers": {
        "h264 faststart": Kind(_made(".mp4", container_options={"movflags": "faststart"})),
        "h264 fragmented": Kind(_made(".mp4", fragmented=True)),
        "h264 fragmented late head": Kind(_put(".mp4", _video, **_flags("frag_keyframe+delay_moov"))),
        "h264 a fragment a frame": Kind(_put(".mp4", _video, **_flags("frag_every_frame+empty_moov"))),
        "h264 no edit list": Kind(_put(".mp4", _video, container_options={"use_editlist": "0"})),
        "h264 mov": Kind(_made(".mov")),
        "h264 no index mkv": Kind(_put(".mkv", _video, piped="matroska", container_options={"live": "1"})),
        "h264 ts": Kind(_made(".ts", audio=True)),
        "h264 ts open gop": Kind(_made(".ts", open_gop=True, b_frames=3)),
        "h264 ts of 192 bytes": Kind(_put(".ts", _video, container_options={"mpegts_m2ts_mode": "1"})),
        "h264 avi": Kind(_made(".avi")),
        "h264 avi no b-frames": Kind(_made(".avi", b_frames=0)),
    },
    "H.264: times": {
        "h264 variable rate": Kind(_made(".mp4", vfr=True)),
        "h264 variable rate mkv": Kind(_made(".mkv", vfr=True)),
        "h264 variable rate avi": Kind(_made(".avi", b_frames=0, vfr=True)),
        "h264 59.94 Hz in ms mkv": Kind(_made(".mkv", fps=_NTSC)),
        "h264 59.94 Hz ts": Kind(_made(".ts", fps=_NTSC)),
        "h264 times before zero": Kind(_put(".mp4", _video, **_flags("negative_cts_offsets"))),
        "h264 times from 100 s mkv": Kind(_put(".mkv", lambda clip: _video(clip, shift=100))),
        "h264 every time twice mkv": Kind(_put(".mkv", lambda clip: _video(clip, clock=Fraction(1, 12)))),
        "h264 every time twice no b-frames mkv": Kind(
            _put(".mkv", lambda clip: _video(clip, clock=Fraction(1, 12)), {"b_frames": 0})
        ),
        "h264 clock begins anew ts": Kind(
            _put(".ts", lambda clip: _video(clip, shift=_WRAP), container_options={"mpegts_copyts": "1"})
        ),
    },
    "H.264: cut and edited": {
        "h264 edit list": Kind(_cut(".mp4"), range(17, FRAMES)),
        "h264 edit list sound": Kind(_cut(".mp4", audio=True), range(17, FRAMES)),
        "h264 edit list open gop": Kind(_cut(".mp4", open_gop=True, b_frames=3), range(17, FRAMES)),
        "h264 edit list at a key frame": Kind(_edited((24, 24)), range(24, FRAMES)),
        "h264 edit list cuts the end": Kind(_edited((0, 30)), range(30)),
        "h264 edit list waits": Kind(_edited((-1, 12), (0, FRAMES))),
        "h264 edit list two parts": Kind(_edited((5, 10), (30, 12)), [*range(5, 15), *range(30, 42)]),
        "h264 edit list two parts exchanged": Kind(_edited((30, 12), (5, 10)), [*range(30, 42), *range(5, 15)]),
        "h264 edit list two whole gops": Kind(_edited((0, 12), (24, 12)), [*range(12), *range(24, 36)]),
        "h264 edit list a part twice": Kind(_edited((0, 24), (0, 24)), [*range(24), *range(24)]),
        "h264 edit list parts overlap": Kind(_edited((0, 24), (13, 24)), [*range(24), *range(13, 37)]),
        # FFmpeg, and what is built on it, plays on for as long as the picture is to be held.
        "h264 edit list holds": Kind(_edited((0, 12), (HELD, 12), (12, 36)), [*range(24), *range(12, FRAMES)]),
        "h264 cut mkv": Kind(_cut(".mkv"), range(12, FRAMES)),
        "h264 cut open gop mkv": Kind(_cut(".mkv", open_gop=True, b_frames=3), range(12, FRAMES)),
        "h264 cut ts": Kind(_cut(".ts"), range(12, FRAMES)),
        "h264 begins in a gop": Kind(_put(".mp4", lambda clip: _video(clip, skip=5)), range(12, FRAMES)),
        "h264 begins in a gop mkv": Kind(_put(".mkv", lambda clip: _video(clip, skip=5)), range(12, FRAMES)),
        "h264 begins in a gop ts": Kind(_put(".ts", lambda clip: _video(clip, skip=5)), range(12, FRAMES)),
    },
    "H.264: several streams": {
        "h264 sound": Kind(_made(".mp4", audio=True)),
        "h264 sound first": Kind(_put(".mp4", lambda clip: [Track(clip, "audio"), Track(clip)])),
        "h264 two sounds mkv": Kind(
            _put(".mkv", lambda clip: [Track(clip, "audio"), Track(clip), Track(clip, "audio")])
        ),
        "h264 sound begins later": Kind(_put(".mp4", lambda clip: [Track(clip), Track(clip, "audio", shift=0.5)])),
        "h264 picture begins later": Kind(_put(".mp4", lambda clip: [Track(clip, shift=0.5), Track(clip, "audio")])),
        "h264 cover picture": Kind(_put(".mp4", _video, cover=True)),
        "h264 cover picture mkv": Kind(_put(".mkv", _video, cover=True)),
        "h264 chapters": Kind(_put(".mp4", _video, chapters=True)),
        "h264 time code mov": Kind(_put(".mov", _video, metadata={"timecode": "01:00:00:00"})),
        "h264 two videos default first": Kind(_put(".mp4", lambda clip: _two_videos(clip, True, False))),
        "h264 two videos default second": Kind(_put(".mp4", lambda clip: _two_videos(clip, False, True)), _OTHER),
        "h264 two videos no default mkv": Kind(_put(".mkv", lambda clip: _two_videos(clip, False, False))),
        "h264 two videos ts": Kind(_put(".ts", lambda clip: _two_videos(clip, True, False))),
    },
    "Turned pictures": {
        "h264 rotated 90": Kind(_made(".mp4", rotation=90)),
        "h264 rotated 180": Kind(_made(".mp4", rotation=180)),
        "h264 rotated 270": Kind(_made(".mp4", rotation=270, size=(96, 160))),
        "h264 rotated 90 square": Kind(_made(".mp4", rotation=90, size=(96, 96))),
        "h264 rotated 90 edit list": Kind(_cut(".mp4", rotation=90), range(17, FRAMES)),
        "h264 rotated 180 mkv": Kind(_made(".mkv", rotation=180)),
        "h264 mirrored": Kind(_mirrored),
    },
    "HEVC": {
        "hevc": Kind(_made(".mp4", codec="hevc")),
        "hevc mkv": Kind(_made(".mkv", codec="hevc")),
        "hevc ts": Kind(_made(".ts", codec="hevc")),
        "hevc open gop": Kind(_made(".mp4", codec="hevc", open_gop=True, b_frames=4)),
        "hevc every frame marked as key": Kind(_all_marked("hevc")),
        "hevc 10 bit mkv": Kind(_made(".mkv", codec="hevc", pix_fmt="yuv420p10le", open_gop=True)),
        "hevc 12 bit": Kind(_made(".mp4", codec="hevc", pix_fmt="yuv420p12le")),
        "hevc 4:4:4 odd size": Kind(_made(".mp4", codec="hevc", pix_fmt="yuv444p", size=(161, 97))),
        "hevc edit list": Kind(_cut(".mp4", codec="hevc"), range(17, FRAMES)),
        "hevc cut open gop ts": Kind(_cut(".ts", codec="hevc", open_gop=True, b_frames=3), range(12, FRAMES)),
        "hevc of a phone mov": Kind(_made(".mov", codec="hevc", pix_fmt="yuv420p10le", rotation=90, extra=_HDR)),
    },
    "VP8, VP9, AV1": {
        "vp9 webm": Kind(_made(".webm", codec="vp9")),
        "vp9 mp4": Kind(_made(".mp4", codec="vp9")),
        "vp9 hidden frames webm": Kind(
            _put(".webm", lambda clip: _video(clip, hide=(12, 24)), {"codec": "vp9"}, ".mkv"), _without(12, 24)
        ),
        "vp9 cut webm": Kind(_cut(".webm", ".webm", codec="vp9"), range(12, FRAMES)),
        "vp9 4:4:4 webm": Kind(_made(".webm", codec="vp9", pix_fmt="yuv444p")),
        "vp9 odd size": Kind(_made(".mp4", codec="vp9", size=(161, 97))),
        "vp9 rotated 180 webm": Kind(_made(".webm", codec="vp9", rotation=180)),
        "vp9 one frame webm": Kind(_made(".webm", codec="vp9", num_frames=1), range(1)),
        "vp8 webm": Kind(_made(".webm", codec="vp8")),
        "vp8 hidden frames webm": Kind(
            _put(".webm", lambda clip: _video(clip, hide=(5, 17, 40)), {"codec": "vp8"}, ".mkv"), _without(5, 17, 40)
        ),
        "vp8 variable rate webm": Kind(_made(".webm", codec="vp8", vfr=True)),
        "vp8 no index webm": Kind(
            _put(".webm", _video, {"codec": "vp8"}, ".mkv", piped="webm", container_options={"live": "1"})
        ),
        "av1": Kind(_made(".mp4", codec="av1")),
        "av1 mkv": Kind(_made(".mkv", codec="av1", gop=30)),
        "av1 10 bit webm": Kind(_made(".webm", codec="av1", pix_fmt="yuv420p10le")),
        "av1 odd size": Kind(_made(".mp4", codec="av1", size=(161, 97))),
    },
    "MPEG-4, MPEG-2, Motion JPEG, and codecs of editors": {
        "mpeg4 mp4": Kind(_made(".mp4", codec="mpeg4", b_frames=0)),
        "mpeg4 b-frames mp4": Kind(_made(".mp4", codec="mpeg4")),
        "mpeg4 b-frames mkv": Kind(_made(".mkv", codec="mpeg4")),
        "mpeg4 every frame marked as key": Kind(_all_marked("mpeg4")),
        "mpeg4 odd size": Kind(_made(".mp4", codec="mpeg4", b_frames=0, size=(161, 97))),
        "mpeg4 avi": Kind(_made(".avi", codec="mpeg4")),
        "mpeg4 avi no b-frames": Kind(_made(".avi", codec="mpeg4", b_frames=0)),
        "mpeg4 avi frames dropped": Kind(_made(".avi", codec="mpeg4", b_frames=0, vfr=True)),
        "mpeg2 ts": Kind(_made(".ts", codec="mpeg2video")),
        "mpeg2 mkv": Kind(_made(".mkv", codec="mpeg2video")),
        "mjpeg avi": Kind(_made(".avi", codec="mjpeg", pix_fmt="yuvj420p")),
        "mjpeg odd size mov": Kind(_made(".mov", codec="mjpeg", pix_fmt="yuvj420p", size=(161, 97))),
        "prores mov": Kind(_made(".mov", codec="prores_ks", pix_fmt="yuv422p10le")),
        "dnxhr mov": Kind(_made(".mov", codec="dnxhd", pix_fmt="yuv422p", size=(256, 144), num_frames=12), range(12)),
        "ffv1 mkv": Kind(_made(".mkv", codec="ffv1")),
    },
}
KINDS: dict[str, Kind] = {name: kind for section in SECTIONS.values() for name, kind in section.items()}
