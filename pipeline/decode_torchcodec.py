"""TorchCodec, on the CPU by name and on the GPU through NVDEC. Optional: `pip install framestream[torchcodec]`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .checked import CheckedDecoder, tiny_clip
from .decode import check_indices, resize_short_side
from .errors import DecodeError
from .packet_table import PacketTable, Picture, label
from .reader_limits import (
    BT470BG,
    BT709,
    SMPTE170M,
    UNTAGGED,
    is_full_range,
    key_frames_untold,
    matrix,
    plays_parts,
    shared_refusal,
)

_INSTALL = "pip install 'framestream[torchcodec]'"
_KEYS_IN_THE_PICTURE = ("h264", "vp8", "vp9", "av1")  # FFmpeg looks there where the container says nothing


@functools.lru_cache(maxsize=2)
def why_not(device: str) -> str:
    """ "" where TorchCodec decodes on `device` ("cpu" or "cuda") here, or the reason why it does not."""
    if importlib.util.find_spec("torchcodec") is None:
        return f"TorchCodec is not installed; {_INSTALL}."
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device."
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as err:
        first = (str(err).strip().splitlines() or [type(err).__name__])[0]
        return f"TorchCodec does not load ({first[:200]}); it wants FFmpeg's shared libraries on the system."
    try:
        frames = VideoDecoder(tiny_clip(), device=device).get_frames_at([0, 1]).data
    except (RuntimeError, ValueError) as err:
        return f"TorchCodec's {device} reader fails ({str(err)[-200:]})."
    return "" if frames.shape[0] == 2 else f"TorchCodec's {device} reader fails."


def refusal(data: bytes, table: PacketTable, picture: Picture) -> str:
    """Why TorchCodec would get this video wrong, "" where it is known to get its kind right.

    Wider than it would have to be: open GOPs and some clips in AVI and MPEG-TS come out right, but nothing tells them
    from a gradual refresh, and from those that do not.
    """
    if table.format in ("avi", "mpegts"):
        return f"its container is {table.format}"
    shared = shared_refusal(table, picture)
    if shared:
        return shared
    if table.num_packets != table.num_frames + table.hidden_by_edits:
        return "some of its packets show no frame"
    if table.codec not in _KEYS_IN_THE_PICTURE and key_frames_untold(data, table):
        return "it does not say which of its frames are key frames"
    if not table.closed_keys:
        return "not all of its key frames begin afresh"
    if plays_parts(table):
        return "an edit list plays several parts of it"
    return ""


def refusal_on_cuda(data: bytes, table: PacketTable, picture: Picture) -> str:
    """As `refusal`, for the GPU, which knows two matrices, and full range in BT.709 alone."""
    if matrix(table) not in (UNTAGGED, BT709, BT470BG, SMPTE170M):
        return f"its colour matrix is number {matrix(table)} of H.273"
    if is_full_range(table, picture) and matrix(table) != BT709:
        return "its colours are of full range"
    return refusal(data, table, picture)


class TorchCodecDecoder(CheckedDecoder):
    """TorchCodec, see `Decoder`. With `device="cuda"` frames stay on the GPU; for the process that trains.

    A call cannot be interrupted, so `timeout_s` bounds the look at the container alone.

    Raises:
        DecodeError: as `PyAVDecoder`; also for videos that TorchCodec gets wrong.
    """

    reader = "TorchCodec"

    def __init__(self, data: bytes, *, device: str = "cpu", **options: Any) -> None:
        from torchcodec.decoders import VideoDecoder

        self.backend = "torchcodec-cuda" if device == "cuda" else "torchcodec"
        why = refusal_on_cuda if device == "cuda" else refusal
        super().__init__(data, refusal=functools.partial(why, data), **options)
        try:
            self._decoder: Any = VideoDecoder(data, device=device, seek_mode="exact", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as err:
            raise DecodeError(self._failed("open", err)) from err

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Decoder.frames_at`; on the decoder's device."""
        wanted, gather = np.unique(check_indices(indices, self.num_frames, self.name), return_inverse=True)
        try:
            batch = self._decoder.get_frames_at(wanted.tolist())
        except (RuntimeError, ValueError, IndexError) as err:
            raise DecodeError(self._failed("decode", err)) from err
        if self.backend == "torchcodec-cuda" and getattr(self._decoder, "cpu_fallback", None):
            raise DecodeError(f"{label(self.name)}: the GPU does not decode its kind; use the decoder pyav.")
        width, height = self.size
        self.check(len(self._decoder), batch.data.shape, (len(wanted), 3, height, width))
        self.check_times(wanted, batch.pts_seconds.cpu().numpy())
        frames = resize_short_side(batch.data, self.short_side)
        return frames.index_select(0, torch.from_numpy(gather).to(frames.device))

    def _failed(self, what: str, err: Exception) -> str:
        last = (str(err).strip().splitlines() or [type(err).__name__])[-1][:300]
        return f"{label(self.name)}: TorchCodec cannot {what} it ({last}); use the decoder pyav."

    def close(self) -> None:
        super().close()
        self._decoder = None
