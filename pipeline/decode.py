"""Decoders behind one protocol, and which of them serves.

    with open_decoder(data, short_side=224) as decoder:
        frames = decoder.frames_at([0, 8, 16])      # uint8 [3, 3, H, 224]

Backends: `pyav` (exact on everything that FFmpeg reads; the default without a GPU), `decord` (CPU, in a process
of its own, refuses what it is known to get wrong), `torchcodec` (CPU), and on a GPU `decord-gpu` (a Decord built
with CUDA) and `torchcodec-cuda`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .errors import ConfigError, DecodeError
from .file_parts import FileParts
from .frame_reader import check_indices as check_indices
from .picture import fit_short_side as fit_short_side
from .probe import VideoInfo

GPU_BACKENDS = ("decord-gpu", "torchcodec-cuda")
BACKENDS = ("pyav", "decord", "torchcodec", *GPU_BACKENDS)

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()


class Refused(DecodeError):
    """The video may be sound, but this backend is known to get its kind wrong."""


class Decoder(Protocol):
    """An open video."""

    @property
    def backend(self) -> str:
        """Which reader this is."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames that are shown."""
        ...

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        ...

    @property
    def timestamps(self) -> np.ndarray:
        """float64 [T], seconds from the first frame."""
        ...

    @property
    def key_frames(self) -> np.ndarray:
        """int64 [K], frames that decode on their own."""
        ...

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 [n, 3, H, W] RGB in the order asked, repeats allowed; DecodeError where a frame is not to be had."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Decoder: ...

    def __exit__(self, *_: object) -> None: ...


def open_decoder(
    data: bytes | FileParts,
    *,
    backend: str = "auto",
    short_side: int | None = None,
    info: VideoInfo | None = None,
    name: str = "",
    timeout_s: float = 30.0,
    fallback: str | None = None,
) -> Decoder:
    """Open a video that lies in memory.

    Args:
        data: the whole file; for `pyav` and a video whose index `info` carries, the parts that will be needed do.
        backend: one of `BACKENDS`, or "auto" (see `choose_backend`).
        short_side: length of the shorter side of the frames returned; the aspect is kept. None: as stored.
        info: what `probe_video` said about the same bytes, where that is at hand; it is checked against them.
        name: how errors call the video.
        timeout_s: for opening, and again for each call of `frames_at`. GPU readers cannot be interrupted.
        fallback: the backend that takes over where `backend` refuses a video or fails at it, at opening or later. Its
            frames come to the GPU, where `backend` is a GPU's, and `decoder.fallback` says why it is at work. "auto"
            has `pyav`; without one, a backend that was asked for by name raises.
    Raises:
        DecodeError: this video cannot be decoded exactly (by this backend; the message names one that can).
        ConfigError: the backend is unknown or not usable here.
    """
    if short_side is not None and short_side < 1:
        raise ConfigError(f"short_side is {short_side}, expected at least 1 or None.")
    chosen, _ = choose_backend(backend)
    if not data:
        raise DecodeError(f"{name or 'the video'}: there is nothing in it (0 bytes).")
    options: dict[str, Any] = {"short_side": short_side, "info": info, "name": name, "timeout_s": timeout_s}
    first = functools.partial(_reader(chosen), data, **options)
    second = "pyav" if fallback is None and backend == "auto" else fallback
    if second is None or second == chosen:
        return first()
    from .fallback import FallbackDecoder

    reader = _reader(choose_backend(second)[0])
    on_gpu = chosen in GPU_BACKENDS
    return FallbackDecoder(
        first,
        functools.partial(reader, data, **options),
        name=name,
        device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )


def load_reader(backend: str) -> None:
    """Import what a backend needs. Done before threads or worker processes start: a fork in the middle of an import
    in another thread would leave that module locked in the child, and workers need not import what is there."""
    _reader(backend)


def _reader(backend: str) -> Callable[..., Decoder]:
    if backend == "pyav":
        from .decode_pyav import PyAVDecoder

        return PyAVDecoder
    if backend == "decord":
        from .decode_decord import DecordDecoder

        return DecordDecoder
    if backend == "decord-gpu":
        from .decode_decord import DecordGPUDecoder

        return DecordGPUDecoder
    from .decode_torchcodec import TorchCodecDecoder

    return functools.partial(TorchCodecDecoder, device="cuda" if backend == "torchcodec-cuda" else "cpu")


def available_backends() -> dict[str, str]:
    """Every backend with "" where it is usable here, or the reason why it is not and what to install."""
    return {backend: _why_not(backend) for backend in BACKENDS}


def choose_backend(name: str = "auto", device: str | None = None) -> tuple[str, str]:
    """Decide which reader serves, and why: (backend, reason). Says it once per process in the log.

    "auto" takes `decord-gpu`, then `torchcodec-cuda`, where a GPU is and they work, else `pyav`. In the workers of
    a DataLoader it is always `pyav`: GPU readers belong on the side that trains.

    Args:
        device: "cpu" rules the GPU readers out; None or "cuda" do not.
    Raises:
        ConfigError: the name is unknown, or the backend named cannot be used here.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ConfigError(f"decoder {name!r} is unknown; expected one of auto, {', '.join(BACKENDS)}.")
        reason = _why_not(name)
        if reason:
            raise ConfigError(f"decoder {name!r} cannot be used here: {reason}")
        return name, "asked for by name"
    choice = _choose(device)
    if choice not in _told:
        _told.add(choice)
        _log.info("decoder: %s (%s)", *choice)
    return choice


def _choose(device: str | None) -> tuple[str, str]:
    if device is not None and torch.device(device).type == "cpu":
        return "pyav", "decoding for the CPU"
    if torch.utils.data.get_worker_info() is not None:
        return "pyav", "workers decode on the CPU"
    if not torch.cuda.is_available():
        return "pyav", "no GPU here"
    reasons = []
    for backend in GPU_BACKENDS:
        reason = _why_not(backend)
        if not reason:
            return backend, "a GPU is here, and this reader works on it"
        reasons.append(f"{backend}: {reason}")
    return "pyav", "a GPU is here, but no reader for it: " + " ".join(reasons)


def _why_not(backend: str) -> str:
    if backend == "pyav":
        try:
            import av
        except ImportError as err:
            return f"PyAV does not import ({err}); pip install av."
        old = int(av.__version__.split(".")[0]) < 17
        return f"PyAV {av.__version__} is too old; pip install 'av>=17.1'." if old else ""
    if backend in ("decord", "decord-gpu"):
        from . import decode_decord

        return decode_decord.why_not_gpu() if backend == "decord-gpu" else decode_decord.why_not()
    from . import decode_torchcodec

    return decode_torchcodec.why_not("cuda" if backend == "torchcodec-cuda" else "cpu")


def resize_short_side(frames: torch.Tensor, short_side: int | None) -> torch.Tensor:
    """uint8 [n, 3, H, W] with the shorter side resized to `short_side`, antialiased, on the frames' own device."""
    height, width = frames.shape[-2:]
    width, height = fit_short_side(width, height, short_side)
    if (height, width) == tuple(frames.shape[-2:]):
        return frames.contiguous()
    resized = torch.nn.functional.interpolate(
        frames.float(), size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)
