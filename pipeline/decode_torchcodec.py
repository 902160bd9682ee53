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

_INSTALL = "pip install 'framestream[torchcodec]'"


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


def refusal(table: PacketTable, picture: Picture) -> str:
    """Why TorchCodec would get this video wrong, "" where it is known to get its kind right."""
    if table.format in ("avi", "mpegts"):
        return f"its container is {table.format}"
    if not table.ordered or len(table.rank) != table.num_frames + table.hidden_by_edits:
        return "some of its packets show no frame"
    if not table.closed_keys:
        return "not all of its key frames begin afresh"
    if picture.mirrored:
        return "it is to be shown mirrored"
    return ""


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
        super().__init__(data, refusal=refusal, **options)
        try:
            self._decoder: Any = VideoDecoder(data, device=device, seek_mode="exact", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as err:
            raise DecodeError(f"{label(self.name)}: TorchCodec cannot open it ({_last(err)}).") from err

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Decoder.frames_at`; on the decoder's device."""
        wanted, gather = np.unique(check_indices(indices, self.num_frames, self.name), return_inverse=True)
        try:
            batch = self._decoder.get_frames_at(wanted.tolist())
        except (RuntimeError, ValueError, IndexError) as err:
            raise DecodeError(f"{label(self.name)}: TorchCodec cannot decode it ({_last(err)}).") from err
        width, height = self.size
        self.check(len(self._decoder), batch.data.shape, (len(wanted), 3, height, width))
        self.check_times(wanted, batch.pts_seconds.cpu().numpy())
        frames = resize_short_side(batch.data, self.short_side)
        return frames[torch.from_numpy(gather).to(frames.device)]

    def close(self) -> None:
        super().close()
        self._decoder = None


def _last(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[-1][:300]
