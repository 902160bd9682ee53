"""Is the GPU's video engine (NVDEC) visible here, and what does it decode? The driver itself is asked.

It need not be: a container may be given a GPU without it (the NVIDIA runtime has to be told
`NVIDIA_DRIVER_CAPABILITIES=video`, or `all`), and then every GPU reader fails with a message of its own kind.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from .fresh_python import fresh_python

# Numbers of the driver's interface: cudaVideoCodec and cudaVideoChromaFormat.
_CODECS = {"mpeg2": 1, "mpeg4": 2, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}
_CHROMA = {"4:2:0": 1, "4:2:2": 2, "4:4:4": 3}
_DEPTHS = (8, 10, 12)
_TIMEOUT_S = 60.0


class _Capabilities(ctypes.Structure):
    """CUVIDDECODECAPS. Drivers before 2020 leave the number of engines 0."""

    _fields_ = [
        ("codec", ctypes.c_uint),
        ("chroma", ctypes.c_uint),
        ("bits_over_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("most_width", ctypes.c_uint),
        ("most_height", ctypes.c_uint),
        ("most_macroblocks", ctypes.c_uint),
        ("least_width", ctypes.c_ushort),
        ("least_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte * 4),
        ("reserved3", ctypes.c_uint * 10),
    ]


@dataclass(frozen=True)
class VideoEngine:
    """What a GPU's driver says of its video engine.

    Attributes:
        why_not: why it cannot be used here, "" where it can.
        engines: how many there are; 0 where an old driver does not say.
        formats: what they decode, e.g. "h264 4:2:0 8 bit".
    """

    why_not: str = ""
    engines: int = 0
    formats: tuple[str, ...] = ()


@functools.lru_cache(maxsize=8)
def video_engine(device: int = 0) -> VideoEngine:
    """Look at the video engine of a CUDA device, in a process of its own: a driver that does not fit may end it."""
    command, environment = fresh_python(f"from framestream.pipeline.video_engine import main; main({device:d})")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return VideoEngine(f"the driver does not answer within {_TIMEOUT_S:g} s.")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return VideoEngine(f"asking the driver failed ({last[:200]}).")
    return VideoEngine(found["why_not"], found["engines"], tuple(found["formats"]))


def main(device: int) -> None:
    """What runs in that process: prints the answer as JSON."""
    formats: list[str] = []
    engines, why_not = 0, ""
    try:
        engines, formats = _ask(device)
        if not formats:
            why_not = "the driver answers, and says that the GPU's engine decodes nothing."
    except _Failed as err:
        why_not = str(err)
    json.dump({"why_not": why_not, "engines": engines, "formats": formats}, sys.stdout)


class _Failed(Exception):
    pass


def _ask(device: int) -> tuple[int, list[str]]:
    cuda = _library("libcuda.so.1", "there is no NVIDIA driver")
    cuvid = _library(
        "libnvcuvid.so.1",
        "the driver's video part is missing; in a container it has to be asked for: NVIDIA_DRIVER_CAPABILITIES=video",
    )
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check("cuInit", cuda.cuInit(0))
    _check("cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(number), device))
    _check("cuDevicePrimaryCtxRetain", cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number))
    _check("cuCtxSetCurrent", cuda.cuCtxSetCurrent(context))
    engines, formats = 0, []
    for codec, codec_number in _CODECS.items():
        for chroma, chroma_number in _CHROMA.items():
            for depth in _DEPTHS:
                found = _Capabilities(codec=codec_number, chroma=chroma_number, bits_over_8=depth - 8)
                if cuvid.cuvidGetDecoderCaps(ctypes.byref(found)) == 0 and found.supported:
                    engines = max(engines, found.engines)
                    formats.append(f"{codec} {chroma} {depth} bit")
    return engines, formats


def _library(name: str, without: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError as err:
        raise _Failed(f"{name} does not load ({err}): {without}.") from err


def _check(call: str, status: int) -> None:
    if status:
        raise _Failed(f"{call} of the driver fails with error {status}.")
