"""The conformance matrix: what every reader is expected to do with every kind of video, and how that is looked up.

Used by the tests, which hold the readers to it, and by `write_conformance.py`, which writes the page that it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import DecodeError

from colour_reference import ColourCase, deviation, picture
from synthetic import read_index, read_indices
from video_kinds import KINDS

#: short name -> a part of what the error says
REASONS = {
    "avi": "its container is avi",
    "ts": "its container is mpegts",
    "codec": "its codec is",
    "edit list": "an edit list hides some of its packets",
    "several parts": "an edit list plays several parts of it",
    "open GOPs": "not all of its key frames begin afresh",
    "key frames": "it does not say which of its frames are key frames",
    "order": "its container does not tell the order of its frames",
    "hidden": "some of its packets show no frame",
    "several videos": "there are several videos in it",
    "turned": "it is to be shown turned, as said by mkv or webm",
    "mirrored": "it is to be shown mirrored",
    "untagged": "it names no colour matrix",
    "fails": "cannot decode it",
}
_ALWAYS: dict[str, tuple[str, ...]] = {
    "avi": (
        *("h264 avi", "h264 avi no b-frames", "h264 variable rate avi"),
        *("mpeg4 avi", "mpeg4 avi no b-frames", "mpeg4 avi frames dropped", "mjpeg avi"),
    ),
    "ts": (
        *("h264 one frame ts", "h264 ts", "h264 ts open gop", "h264 ts of 192 bytes", "h264 59.94 Hz ts"),
        *("h264 clock begins anew ts", "h264 cut ts", "h264 begins in a gop ts", "h264 two videos ts"),
        *("hevc ts", "hevc cut open gop ts", "mpeg2 ts"),
    ),
    "order": ("h264 every time twice mkv", "h264 every time twice no b-frames mkv"),
    "hidden": ("h264 begins in a gop", "h264 begins in a gop mkv", "vp8 hidden frames webm"),
    "several videos": (
        *("h264 two videos default first", "h264 two videos default second"),
        "h264 two videos no default mkv",
    ),
    "mirrored": ("h264 mirrored",),
}
_PARTS = (
    *("h264 edit list two parts", "h264 edit list two parts exchanged", "h264 edit list two whole gops"),
    *("h264 edit list a part twice", "h264 edit list parts overlap", "h264 edit list holds"),
)
_OPEN = ("h264 open gop", "h264 open gop mkv", "h264 gradual refresh", "h264 cut open gop mkv")
#: reader -> reason -> kinds that it refuses; all others it has to get right
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "pyav": {},
    "decord": {
        **_ALWAYS,
        "edit list": (
            *("h264 edit list", "h264 edit list sound", "h264 edit list open gop", "h264 edit list cuts the end"),
            *("h264 rotated 90 edit list", "hevc edit list", *_PARTS),
        ),
        "open GOPs": (*_OPEN, "mpeg4 b-frames mp4", "mpeg4 b-frames mkv"),
        "key frames": ("h264 every frame marked as key", "mpeg4 every frame marked as key"),
        "turned": ("h264 rotated 180 mkv", "vp9 rotated 180 webm"),
        "codec": (
            *("hevc", "hevc mkv", "hevc open gop", "hevc every frame marked as key", "hevc 10 bit mkv", "hevc 12 bit"),
            *("hevc 4:4:4 odd size", "hevc of a phone mov", "av1", "av1 mkv", "av1 10 bit webm", "av1 odd size"),
            *("mpeg2 mkv", "mjpeg odd size mov", "prores mov", "dnxhr mov", "ffv1 mkv"),
        ),
        "fails": ("h264 no index mkv", "vp9 hidden frames webm", "vp8 no index webm"),
    },
    "torchcodec": {
        **_ALWAYS,
        "several parts": _PARTS,
        "open GOPs": (*_OPEN, "h264 edit list open gop"),
        "key frames": ("hevc every frame marked as key", "mpeg4 every frame marked as key"),
    },
}
_WHY = re.compile(r"gets such videos wrong \((.*)\); use the decoder pyav|(cannot (?:open|decode) it).*use the decoder")


def expected(kind: str, reader: str) -> str:
    """ "" where the reader, one of `REFUSED`, has to get the kind right, else the short name of why it refuses it."""
    return next((reason for reason, kinds in REFUSED[reader].items() if kind in kinds), "")


def check_refusal(data: bytes, reader: str, reason: str) -> None:
    """Raise AssertionError unless the reader refuses a video for this reason, and names the one that gets it right."""
    said = refusal_of(data, reader)
    assert REASONS[reason] in said, f"expected a refusal ({REASONS[reason]}), got {said or 'frames'!r}"


def refusal_of(data: bytes, reader: str) -> str:
    """Why the reader refuses a video, "" where it does not. Any other error is passed on."""
    try:
        with open_decoder(data, backend=reader, short_side=64) as decoder:
            decoder.frames_at([decoder.num_frames - 1, 0])
    except DecodeError as err:
        said = _WHY.search(str(err))
        if said is None:
            raise
        return said[1] or said[2]
    return ""


def check_frames(data: bytes, reader: str, shown: Sequence[int]) -> None:
    """Raise AssertionError unless the reader gives the frames that are asked for, whatever the order.

    Args:
        shown: the index that each frame carries.
    """
    count = len(shown)
    mixed = np.random.default_rng(0).integers(0, count, 16).tolist()
    for wanted in (mixed, sorted(mixed), [count - 1, 0, 0], [0], [count - 1], list(range(count))):
        with open_decoder(data, backend=reader, short_side=64) as decoder:
            assert decoder.backend == reader
            assert decoder.num_frames == count
            frames = decoder.frames_at(wanted)
            assert frames.dtype == torch.uint8
            assert min(frames.shape[2:]) == 64
            assert read_indices(frames) == [shown[index] for index in wanted]
    with open_decoder(data, backend=reader) as decoder:  # one decoder, one frame after the other, at full size
        for index in mixed[:8]:
            assert read_index(decoder.frames_at([index])[0]) == shown[index]


def check(data: bytes, kind: str, reader: str) -> None:
    """Raise AssertionError unless the reader does what the matrix says."""
    reason = expected(kind, reader)
    if reason:
        check_refusal(data, reader, reason)
    else:
        check_frames(data, reader, KINDS[kind].shown)


# By how much, of 255, a decoded picture may differ from what the standards say that it is, on average and at worst.
# Storing a value rounds it, by up to 1.5 of 255 for a colour of 8 bits; converting rounds it again. The other readers
# repeat chroma of 4:2:0 for four pixels, which here is worth up to 5. A wrong matrix shows as 3.7 and 31, a wrong range
# as more.
TOLERANCE = {"pyav": (0.6, 2.5), "decord": (2.5, 6.0), "torchcodec": (2.5, 6.0)}


def expected_colour(case: ColourCase, reader: str) -> str:
    """As `expected`, for a way to store colours."""
    if reader == "decord" and case.codec in ("libx265", "ffv1"):
        return "codec"
    return "untagged" if reader != "pyav" and case.lines > 576 and not case.tagged else ""


def colour_deviation(data: bytes, case: ColourCase, reader: str, *, reduced: int = 1) -> tuple[float, float]:
    """(mean, worst) of 255, see `colour_reference.deviation`; the picture made smaller by `reduced`."""
    side = None if reduced == 1 else min(picture(case)[2].shape) // reduced
    with open_decoder(data, backend=reader, short_side=side) as decoder:
        return deviation(decoder.frames_at([1])[0].numpy(), case, reduced)


def check_colour(data: bytes, case: ColourCase, reader: str) -> None:
    """Raise AssertionError unless colours come out within `TOLERANCE`, at full and at half size, or are refused."""
    reason = expected_colour(case, reader)
    if reason:
        check_refusal(data, reader, reason)
        return
    for reduced in (1, 2):
        mean, worst = colour_deviation(data, case, reader, reduced=reduced)
        assert mean <= TOLERANCE[reader][0]
        assert worst <= TOLERANCE[reader][1]
