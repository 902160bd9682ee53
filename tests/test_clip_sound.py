"""Sound that cannot be read costs its clip, with a sentence that says that it is the sound, and what FFmpeg said."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import pytest

from framestream.pipeline.errors import SampleError
from framestream.tools.clip_sound import SoundReader

from clips_setup import beeping, clip


def damaged(path: Path) -> bytes:
    """The file with other bytes in every packet of sound behind the first second."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            if packet.size and packet.pts * packet.time_base > 1:
                at = data.find(bytes(packet))
                data[at : at + packet.size] = bytes(byte * 7 + 13 & 255 for byte in bytes(packet))
    return bytes(data)


def test_damaged_sound_is_said_to_be_the_sound(tmp_path: Path) -> None:
    data = damaged(beeping(tmp_path / "v.mkv", "mp2", seconds=3))
    told = r"clip 7: its sound cannot be read \(Invalid data found.*\); leave it out with --audio drop$"
    reader = SoundReader(memoryview(data), Fraction(0), "clip 7")
    with pytest.raises(SampleError, match=told):
        list(reader.frames(Fraction(0), Fraction(3)))
    reader.close()
    (tmp_path / "damaged.mkv").write_bytes(data)
    with pytest.raises(SampleError, match="its sound cannot be read"):
        clip(tmp_path / "damaged.mkv", (0, 60), sound=True)
    assert clip(tmp_path / "damaged.mkv", (0, 60), sound=False)


def test_what_is_no_video_has_no_sound() -> None:
    with pytest.raises(SampleError, match=r"clip 7: its sound cannot be read \([A-Z].*\); leave it out"):
        SoundReader(memoryview(b"no video"), Fraction(0), "clip 7")
