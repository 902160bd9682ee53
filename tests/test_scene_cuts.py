"""Scenes: cuts are found at the very frame, and what only moves or fades is none."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from framestream.pipeline.errors import SampleError
from framestream.pipeline.probe import probe_video
from framestream.pipeline.remote import Remote
from framestream.tools.inputs import Source
from framestream.tools.probing import ProbeTask, probe_source

from remux import Track, remux
from synthetic import make_video

SIZE = (192, 128)
Spans = list[tuple[str, int]]  # what is seen, and for how many frames


def texture(seed: int, level: int) -> np.ndarray:
    """uint8 [256, 384, 3], smooth noise around a level."""
    random = np.random.default_rng(seed)
    coarse = random.integers(-60, 60, (16, 24, 3))
    return (level + np.kron(coarse, np.ones((16, 16, 1)))).clip(0, 255).astype(np.uint8)


def pictures(spans: Spans) -> Iterator[np.ndarray]:
    """uint8 [128, 192, 3]; each span is another texture, which pans, fades to black, or is dissolved into the next."""
    width, height = SIZE
    for number, (kind, count) in enumerate(spans):
        own, following = texture(number, 70 + 100 * (number % 2)), texture(number + 1, 70 + 100 * ((number + 1) % 2))
        for k in range(count):
            share = k / count
            x = k if kind == "pan" else 0
            picture = own[:height, x : x + width].astype(float)
            if kind == "fade":
                picture *= 1 - share
            if kind == "dissolve":
                picture = picture * (1 - share) + following[:height, :width] * share
            yield picture.astype(np.uint8)


def write(path: Path, spans: Spans, *, vfr: bool = False, rotation: int = 0, gop: int = 250) -> Path:
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "20", "x264-params": f"keyint={gop}:scenecut=0:bframes=3:threads=1"}
        stream: Any = container.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 96)
        if rotation:
            stream.set_display_rotation(-rotation)
        at = 0
        for index, picture in enumerate(pictures(spans)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 96)
            at += (1, 9, 4)[index % 3] if vfr else 4
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def scenes(path: Path, threshold: float | None = 0.3) -> tuple[int, ...]:
    source = Source(str(path), path.name, "k", size=path.stat().st_size)
    return probe_source(ProbeTask(source, threshold, Remote())).scenes


CUTS: Spans = [("still", 20), ("pan", 31), ("still", 17), ("pan", 25)]


@pytest.mark.parametrize("how", [{}, {"vfr": True}, {"rotation": 90}, {"gop": 12}])
def test_hard_cuts_are_found_at_their_frames(tmp_path: Path, how: dict[str, Any]) -> None:
    path = write(tmp_path / "v.mp4", CUTS, **how)
    assert scenes(path) == (20, 51, 68)
    assert scenes(path) == scenes(path)


def test_pans_fades_and_dissolves_are_no_cuts(tmp_path: Path) -> None:
    assert scenes(write(tmp_path / "v.mp4", [("pan", 40), ("fade", 30)][:1])) == ()
    assert scenes(write(tmp_path / "f.mp4", [("fade", 40)])) == ()
    assert scenes(write(tmp_path / "d.mp4", [("dissolve", 30), ("still", 10)])) == ()


def test_a_higher_threshold_finds_fewer_and_none_is_asked_for_none(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", CUTS)
    assert len(scenes(path, 0.05)) >= 3
    assert scenes(path, 0.95) == ()
    assert scenes(path, None) == ()


def test_hidden_frames_do_not_count(tmp_path: Path) -> None:
    """Of a part of a recording, cut without encoding, frames count from the first that is shown."""
    whole = write(tmp_path / "w.mp4", CUTS, gop=12)
    part = tmp_path / "p.mkv"
    remux(part, Track(whole, skip=5))  # begins in a group of pictures: nothing is shown before the next key frame
    hidden = sum(span for _, span in CUTS) - probe_video(part).num_frames
    assert hidden > 0
    assert scenes(part) == (20 - hidden, 51 - hidden, 68 - hidden)


def test_damage_is_an_error_of_the_source(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=48, gop=12, size=(320, 192))
    info = probe_video(path, packets=True)
    assert info.packets is not None
    data = bytearray(path.read_bytes())
    at, size = int(info.packets.offset[30]), int(info.packets.size[30])
    data[at + 4 : at + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"v\.mp4"):
        scenes(path)
