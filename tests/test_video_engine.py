"""What the driver says of the GPU's video engine, and what is said where there is no driver."""

from __future__ import annotations

import ctypes
import io

import pytest
import torch
from rich.console import Console

from framestream.pipeline.video_engine import _Capabilities, video_engine
from framestream.tools.doctor import doctor


def test_the_driver_is_asked_in_its_own_words() -> None:
    """The layout of CUVIDDECODECAPS as its header has it: where the driver writes, and how much."""
    assert ctypes.sizeof(_Capabilities) == 88
    places = {name: getattr(_Capabilities, name).offset for name in ("supported", "engines", "most_width")}
    assert places == {"supported": 24, "engines": 25, "most_width": 28}


def test_without_a_driver_there_is_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    found = video_engine()
    assert (found.engines, found.formats) == (0, ())
    assert "libcuda.so.1 does not load" in found.why_not or "fails with error" in found.why_not


def test_doctor_says_whether_the_engine_is_visible() -> None:
    said = io.StringIO()
    assert doctor(Console(file=said, soft_wrap=True)) == 0
    line = next(line for line in said.getvalue().splitlines() if line.startswith("Video engine: "))
    assert (f"not visible: {video_engine().why_not}" in line) != ("NVDEC; decodes" in line)
