"""How long the last frame of a video with a variable rate is shown, where its codec makes FFmpeg's packets lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from framestream.pipeline.probe import probe_video

from synthetic import make_video


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_the_last_frame_of_vp9_lasts_to_the_end_of_the_file(tmp_path: Path, suffix: str) -> None:
    """`make_video` shows each frame but the last for a time of its own, and the last for a 24th of a second."""
    info = probe_video(make_video(tmp_path / f"v{suffix}", codec="vp9", vfr=True))
    assert info.timestamps is not None
    assert info.duration - info.timestamps[-1] == pytest.approx(1 / 24, abs=0.001)
