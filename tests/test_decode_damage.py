"""Damaged videos: an error or the frames, never a crash, a hang, or an error of a library."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import av
import pytest
import torch

from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.probe import probe_video

from decode_helpers import KINDS
from synthetic import damaged, video_bytes

DAMAGES = ["flip", "cut", "zero", "header", "random"]
SOURCES = {
    "h264 mp4": (".mp4", {"audio": True}),
    "h264 open gop mkv": (".mkv", {"open_gop": True, "b_frames": 3}),
    "h264 ts": (".ts", {}),
    "hevc mp4": (".mp4", {"codec": "hevc"}),
    "vp9 webm": (".webm", {"codec": "vp9"}),
    "mpeg4 avi": (".avi", {"codec": "mpeg4"}),
}


def attempt(data: bytes, backend: str, count: int) -> torch.Tensor | None:
    """Frames of a damaged video, None where it is refused. Any other exception is the test's failure."""
    try:
        with open_decoder(data, backend=backend, name="clip 3", timeout_s=20) as decoder:
            frames = decoder.frames_at([0, decoder.num_frames // 2, decoder.num_frames - 1])
    except DecodeError:
        return None
    assert frames.shape[:2] == (3, 3)
    return frames


def check(source: str, damage: str, backend: str, seeds: range) -> None:
    suffix, options = SOURCES[source]
    whole = video_bytes(suffix, **options)
    with open_decoder(whole, backend="pyav") as decoder:
        frames = decoder.frames_at(range(decoder.num_frames))
    info = probe_video(whole)
    refused = 0
    for seed in seeds:
        data = damaged(whole, damage, seed)
        with contextlib.suppress(DecodeError):
            assert probe_video(data).num_frames > 0
        refused += attempt(data, backend, len(frames)) is None
        # With the metadata of the shard at hand the number of frames is beyond doubt.
        with contextlib.suppress(DecodeError), open_decoder(data, backend=backend, info=info) as decoder:
            assert decoder.num_frames == len(frames)
    if damage == "random":
        assert refused == len(seeds)
    if damage == "cut" and suffix != ".ts":  # other containers say how long they are
        assert refused == len(seeds)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("source", SOURCES)
def test_damage_is_refused_or_survived(source: str, damage: str) -> None:
    check(source, damage, "pyav", range(12))


def test_a_stream_that_appears_in_the_middle_is_damage() -> None:
    data = damaged(video_bytes(".ts"), "header", 1023)
    with pytest.raises(DecodeError, match="clip 3: a stream begins in it that its head does not name"):
        open_decoder(data, backend="pyav", name="clip 3")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_under_decord_costs_one_sample(damage: str) -> None:
    if available_backends()["decord"]:
        pytest.skip(available_backends()["decord"])
    check("h264 mp4", damage, "decord", range(6))


@pytest.mark.fuzz
@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("source", SOURCES)
def test_more_damage(source: str, damage: str, backend: str) -> None:
    if available_backends()[backend]:
        pytest.skip(available_backends()[backend])
    check(source, damage, backend, range(1000, 1200))


def test_a_damaged_gop_spares_the_others(clip: bytes) -> None:
    # Find where the second GOP lies by the sizes of its packets, and ruin a stretch of its first picture.
    # The pictures after it decode, but to what was never encoded.
    with av.open(io.BytesIO(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        at, size = packets[12].pos, packets[12].size
    data = clip[: at + size // 2] + b"\xff" * (size // 3) + clip[at + size // 2 + size // 3 :]
    with open_decoder(data, backend="pyav", name="clip 3") as decoder:
        assert decoder.frames_at([0, 11, 24, 47]).shape[0] == 4
        for index in (12, 13, 20, 23):
            with pytest.raises(DecodeError, match="clip 3"):
                decoder.frames_at([index])
        assert decoder.frames_at([47, 0]).shape[0] == 2


def test_missing_fragments_are_seen_with_the_metadata(tmp_path: Path) -> None:
    whole = KINDS["h264 fragmented"][0](tmp_path).read_bytes()
    info = probe_video(whole)
    last = whole.rindex(b"moof") - 4  # cut exactly between two fragments: a sound, shorter file
    assert probe_video(whole[:last]).num_frames < info.num_frames
    with pytest.raises(DecodeError, match="metadata says 48"):
        open_decoder(whole[:last], backend="pyav", info=info)
