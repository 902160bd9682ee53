"""What the tests of the decoders share: the table of kinds of video, and a dataset that decodes in workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import DecodeError

from synthetic import make_video, read_indices, trim_by_copy

FRAMES = 48


def _made(suffix: str, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: make_video(folder / f"clip{suffix}", **options)


def _cut(suffix: str, source: str = ".mp4", **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        whole = make_video(folder / f"whole{source}", **options)
        return trim_by_copy(whole, folder / f"clip{suffix}", start=17)

    return make


# name -> (how to make it, index of its first frame, number of frames)
KINDS: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    "h264 b-frames": (_made(".mp4", b_frames=3), 0, FRAMES),
    "h264 gop 16 mkv": (_made(".mkv", gop=16), 0, FRAMES),
    "h264 gop 250": (_made(".mp4", gop=250, num_frames=90), 0, 90),
    "h264 open gop": (_made(".mp4", open_gop=True, b_frames=3), 0, FRAMES),
    "h264 open gop mkv": (_made(".mkv", open_gop=True, b_frames=3), 0, FRAMES),
    "h264 10 bit": (_made(".mp4", pix_fmt="yuv420p10le"), 0, FRAMES),
    "h264 4:4:4": (_made(".mp4", pix_fmt="yuv444p"), 0, FRAMES),
    "h264 odd size": (_made(".mp4", size=(161, 97), pix_fmt="yuv444p"), 0, FRAMES),
    "h264 interlaced": (_made(".mp4", extra=":interlaced=1"), 0, FRAMES),
    "h264 gradual refresh": (_made(".mp4", extra=":intra-refresh=1"), 0, FRAMES),
    "h264 fragmented": (_made(".mp4", fragmented=True), 0, FRAMES),
    "h264 variable rate": (_made(".mp4", vfr=True), 0, FRAMES),
    "h264 variable rate mkv": (_made(".mkv", vfr=True), 0, FRAMES),
    "h264 sound": (_made(".mp4", audio=True), 0, FRAMES),
    "h264 mov": (_made(".mov"), 0, FRAMES),
    "h264 ts": (_made(".ts", audio=True), 0, FRAMES),
    "h264 ts open gop": (_made(".ts", open_gop=True, b_frames=3), 0, FRAMES),
    "h264 avi": (_made(".avi"), 0, FRAMES),
    "h264 one frame": (_made(".mp4", num_frames=1), 0, 1),
    "h264 edit list": (_cut(".mp4"), 17, FRAMES - 17),
    "h264 edit list sound": (_cut(".mp4", audio=True), 17, FRAMES - 17),
    "h264 edit list open gop": (_cut(".mp4", open_gop=True, b_frames=3), 17, FRAMES - 17),
    "h264 cut mkv": (_cut(".mkv"), 12, FRAMES - 12),
    "h264 cut open gop mkv": (_cut(".mkv", open_gop=True, b_frames=3), 12, FRAMES - 12),
    "h264 cut ts": (_cut(".ts"), 12, FRAMES - 12),
    "h264 rotated 90": (_made(".mp4", rotation=90), 0, FRAMES),
    "h264 rotated 180": (_made(".mov", rotation=180), 0, FRAMES),
    "h264 rotated 270": (_made(".mp4", rotation=270, size=(96, 160)), 0, FRAMES),
    "hevc": (_made(".mp4", codec="hevc"), 0, FRAMES),
    "hevc open gop": (_made(".mp4", codec="hevc", open_gop=True, b_frames=4), 0, FRAMES),
    "hevc 10 bit mkv": (_made(".mkv", codec="hevc", pix_fmt="yuv420p10le", open_gop=True), 0, FRAMES),
    "hevc cut open gop ts": (_cut(".ts", codec="hevc", open_gop=True, b_frames=3), 12, FRAMES - 12),
    "vp9 webm": (_made(".webm", codec="vp9"), 0, FRAMES),
    "vp9 odd size": (_made(".webm", codec="vp9", size=(161, 97)), 0, FRAMES),
    "vp8 webm": (_made(".webm", codec="vp8"), 0, FRAMES),
    "av1": (_made(".mp4", codec="av1"), 0, FRAMES),
    "av1 mkv": (_made(".mkv", codec="av1", gop=30), 0, FRAMES),
    "mpeg4 avi": (_made(".avi", codec="mpeg4"), 0, FRAMES),
    "mpeg4 mp4": (_made(".mp4", codec="mpeg4", b_frames=0), 0, FRAMES),
    "mpeg2 ts": (_made(".ts", codec="mpeg2video"), 0, FRAMES),
    "mjpeg avi": (_made(".avi", codec="mjpeg", pix_fmt="yuvj420p"), 0, FRAMES),
}


class DecodeInWorker(torch.utils.data.Dataset[str]):
    """Item i is what happened when frames i and 0 of a video were decoded: "ok", or the error."""

    def __init__(self, data: bytes, backend: str, length: int) -> None:
        self.data, self.backend, self.length = data, backend, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        try:
            with open_decoder(self.data, backend=self.backend, short_side=64) as decoder:
                return "ok" if read_indices(decoder.frames_at([index, 0])) == [index, 0] else "wrong frames"
        except DecodeError as err:
            return str(err)
