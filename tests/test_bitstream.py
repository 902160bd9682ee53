"""What single packets and codec headers say, against real encoders' bytes."""

from __future__ import annotations

import io

import av
import pytest
import torch

from framestream.pipeline.bitstream import leaves_out_safely
from framestream.pipeline.decode import open_decoder

from synthetic import video_bytes


def extradata(data: bytes) -> bytes:
    with av.open(io.BytesIO(data)) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_hevc_with_one_temporal_layer_may_leave_pictures_out(suffix: str) -> None:
    header = extradata(video_bytes(suffix, codec="hevc", num_frames=6))
    assert leaves_out_safely("hevc", header)
    sps = header.index(b"\x42\x01")  # the NAL unit header of a sequence parameter set
    two_layers = header[: sps + 2] + bytes([header[sps + 2] | 1 << 1]) + header[sps + 3 :]
    assert not leaves_out_safely("hevc", two_layers)


def test_what_does_not_tell_its_layers_may_not() -> None:
    header = extradata(video_bytes(codec="hevc", num_frames=6))
    assert not leaves_out_safely("hevc", b"")
    assert not leaves_out_safely("hevc", b"\0\0\0\1" + header)
    for length in range(len(header)):
        leaves_out_safely("hevc", header[:length])  # cut anywhere, it answers
    assert not leaves_out_safely("hevc", header[:30])
    assert leaves_out_safely("h264", b"")
    assert not leaves_out_safely("vp9", header)


@pytest.mark.parametrize("options", [{"b_frames": 4}, {"b_frames": 4, "open_gop": True}, {"b_frames": 3, "gop": 250}])
def test_pictures_left_out_change_no_pixel(options: dict) -> None:
    data = video_bytes(codec="hevc", num_frames=60, **options)
    with open_decoder(data, backend="pyav") as decoder:
        played = decoder.frames_at(range(60))
        for index in range(60):
            assert torch.equal(decoder.frames_at([index])[0], played[index])


def test_several_temporal_layers_are_told_and_decode_exactly() -> None:
    data = video_bytes(codec="hevc", num_frames=40, b_frames=4, extra=":temporal-layers=3")
    assert not leaves_out_safely("hevc", extradata(data))
    with open_decoder(data, backend="pyav") as decoder:
        played = decoder.frames_at(range(40))
        for index in range(40):
            assert torch.equal(decoder.frames_at([index])[0], played[index])
