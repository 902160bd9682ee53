"""The check of one video: what its metadata says of it, and whether it decodes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from framestream.pipeline.errors import SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.raw_sample import RawSample

Decode = Literal["none", "sample", "all"]
CHUNK_BYTES = 64 << 20  # of pictures that are in memory at a time
_CHECKED = ("num_frames", "key_frames", "width", "height", "codec", "rotation")
_CHECKED_WHERE_SAID = ("has_audio", "pix_fmt")  # by nobody but us
_NEAR = 1e-6  # seconds, and frames per second


def compare(sample: RawSample, described: bool, problems: list[str]) -> VideoInfo | None:
    """What the video is, None where it cannot be read; `problems` gets what its metadata says otherwise.

    Args:
        described: whether there is metadata that should describe the video.
    """
    recorded = sample.meta.get("sha256")
    if recorded is not None and recorded != hashlib.sha256(sample.video).hexdigest():
        problems.append(f"has a .{sample.video_ext} whose sha256 is not the one in its .json: its bytes have changed.")
    try:
        info = probe_video(sample.video, name=sample.key, packets=True)
    except SampleError as err:
        problems.append(f"has no readable video: {err}")
        return None
    claimed = sample.info
    if claimed is None:
        if described:
            problems.append("has metadata that does not describe its video (num_frames, fps, width, …).")
        return info
    for name in (*_CHECKED, *(name for name in _CHECKED_WHERE_SAID if name in sample.meta)):
        if getattr(claimed, name) != getattr(info, name):
            problems.append(f"has {name} {getattr(info, name)}, its .json says {getattr(claimed, name)}.")
    for name in ("fps", "duration"):
        actual, said = getattr(info, name), getattr(claimed, name)
        if not math.isclose(actual, said, rel_tol=_NEAR, abs_tol=_NEAR):
            problems.append(f"has {name} {actual:g}, its .json says {said:g}.")
    if claimed.num_frames == info.num_frames and not np.allclose(claimed.times(), info.times(), rtol=_NEAR, atol=_NEAR):
        problems.append("has frames at other times than its .json says.")
    problems += _claims(sample)
    if "packets" in sample.meta and (claimed.packets is None or not claimed.packets.same_packets(info.packets)):
        problems.append("has packets other than its .json says: its bytes have changed, or its .json is damaged there.")
    return info


def _claims(sample: RawSample) -> Iterator[str]:
    """What the metadata that `framestream shard` writes says of the clip otherwise than its other members."""
    meta = sample.meta
    start, end = meta.get("clip_start"), meta.get("clip_end")
    if start is None and end is None:
        return
    numbers = [value for value in (start, end) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < 2 or not 0 <= numbers[0] < numbers[1] < math.inf:
        yield f"has clip_start {start!r} and clip_end {end!r} in its .json, which are no stretch of a video."
    if isinstance(meta.get("text"), str) and meta["text"] != (sample.text if "txt" in sample.members else ""):
        yield "has a .txt that is not the text in its .json."


def decode_problems(sample: RawSample, info: VideoInfo, decode: Decode) -> list[str]:
    """Decode the first and last frame, or all: what is wrong with that, in sentences."""
    from framestream.pipeline.decode import open_decoder

    wanted = sorted({0, info.num_frames - 1}) if decode == "sample" else range(info.num_frames)
    chunk = max(1, CHUNK_BYTES // max(1, 3 * info.width * info.height))
    try:
        with open_decoder(sample.video, backend="pyav", info=info, name=sample.key, timeout_s=600.0) as decoder:
            for begin in range(0, len(wanted), chunk):
                decoder.frames_at(wanted[begin : begin + chunk])
    except SampleError as err:
        return [f"does not decode: {err}"]
    return []
