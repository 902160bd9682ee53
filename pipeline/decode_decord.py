"""Decord, on the CPU in a process of its own, and on the GPU where a build with CUDA is installed.

Decord returns wrong frames without saying so on some kinds of video, and bad data can end its process. So what
kind a video is is looked up first (one pass over its packets), the kinds that it gets wrong are refused by name,
and what comes back is compared with what the container says.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .checked import CheckedDecoder, tiny_clip
from .decode import check_indices, fit_short_side, resize_short_side
from .errors import DecodeError
from .fresh_python import fresh_python
from .isolation import HelperDied, helper
from .packet_table import PacketTable, Picture, label
from .reader_limits import BT470BG, SMPTE170M, UNTAGGED, is_full_range, key_frames_untold, matrix, shared_refusal

_CODECS = ("h264", "vp9", "vp8", "mpeg4")
_INSTALL = "pip install decord (x86-64 Linux), or build it with CUDA"


def why_not() -> str:
    """ "" where Decord can be started here, or the reason why it cannot."""
    if importlib.util.find_spec("decord") is None:
        return f"Decord is not installed; {_INSTALL}."
    return ""


@functools.lru_cache(maxsize=1)
def why_not_gpu() -> str:
    """ "" where the installed Decord decodes on the GPU of this machine, or the reason why it does not."""
    if why_not():
        return why_not()
    if not torch.cuda.is_available():
        return "there is no CUDA device."
    # In a process of its own: a driver that does not fit may end it.
    command, environment = fresh_python(
        "import decord, io, sys\n"
        "reader = decord.VideoReader(io.BytesIO(sys.stdin.buffer.read()), ctx=decord.gpu(0))\n"
        "assert reader.get_batch([0, 1]).shape[0] == 2\n"
    )
    try:
        done = subprocess.run(command, env=environment, input=tiny_clip(), capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "Decord's GPU reader does not answer."
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace")
    if "CUDA not enabled" in said:
        return "the installed Decord was built without CUDA, as all registry wheels are; build it with CUDA."
    last = (said.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"Decord's GPU reader fails ({last[:200]})."


def refusal(data: bytes, table: PacketTable, picture: Picture) -> str:
    """Why Decord would get this video wrong, "" where it is known to get its kind right.

    Wider than it would have to be: some clips in AVI, in the codecs that are not listed, and HEVC with closed groups of
    pictures come out right, but one release gets wrong what another gets right.
    """
    if table.hidden_by_edits:
        return "an edit list hides some of its packets"
    if table.format in ("avi", "mpegts"):
        return f"its container is {table.format}"
    if table.codec not in _CODECS:
        return f"its codec is {table.codec}"
    shared = shared_refusal(table, picture)
    if shared:
        return shared
    if key_frames_untold(data, table):
        return "it does not say which of its frames are key frames"
    if table.open_gop or not table.closed_keys:
        return "not all of its key frames begin afresh, as in open GOPs"
    if table.num_packets != table.num_frames:
        return "some of its packets show no frame"
    if table.format == "matroska" and picture.rotation:
        return "it is to be shown turned, as said by mkv or webm"
    return ""


class DecordDecoder(CheckedDecoder):
    """Decord on the CPU, see `Decoder`. Each call of `frames_at` hands the whole file to the helper process.

    Raises:
        DecodeError: as `PyAVDecoder`; also for videos that Decord gets wrong, and where its process died.
    """

    backend, reader = "decord", "Decord"

    def __init__(self, data: bytes, **options: Any) -> None:
        super().__init__(data, refusal=functools.partial(refusal, data), **options)

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Decoder.frames_at`; on the CPU."""
        wanted = check_indices(indices, self.num_frames, self.name)
        width, height = fit_short_side(*self.size, self.short_side)
        fields = {
            "indices": wanted.tolist(),
            "size": None if self.short_side is None else [width, height],
        }
        try:
            answer, data = helper().request(fields, self.data, self.timeout_s)
        except HelperDied as err:
            raise DecodeError(f"{label(self.name)}: Decord's process {err} while decoding it.") from err
        if "error" in answer:
            raise DecodeError(f"{label(self.name)}: Decord cannot decode it ({answer['error']}); use the decoder pyav.")
        self.check(answer["num_frames"], answer["shape"], (len(wanted), height, width, 3))
        self.check_times(wanted, np.asarray(answer["times"]))
        frames = torch.frombuffer(data, dtype=torch.uint8).reshape(len(wanted), height, width, 3)
        return frames.permute(0, 3, 1, 2).contiguous()


def refusal_on_gpu(data: bytes, table: PacketTable, picture: Picture) -> str:
    """As `refusal`, for the GPU: 8 bits and 4:2:0 alone, and always converted as BT.601 of limited range."""
    if picture.pix_fmt not in ("yuv420p", "yuvj420p", "nv12"):
        return f"its pixels are {picture.pix_fmt}"
    if is_full_range(table, picture) or matrix(table) not in (UNTAGGED, BT470BG, SMPTE170M):
        return "its colours are not those of BT.601, limited range"
    return refusal(data, table, picture)


class DecordGPUDecoder(CheckedDecoder):
    """Decord with CUDA, see `Decoder`: for the process that trains, never for its workers.

    Cannot be interrupted, and does not notice damage that the hardware conceals.
    """

    backend, reader = "decord-gpu", "Decord"

    def __init__(self, data: bytes, **options: Any) -> None:
        import decord

        super().__init__(data, refusal=functools.partial(refusal_on_gpu, data), **options)
        try:
            self._reader: Any = decord.VideoReader(io.BytesIO(data), ctx=decord.gpu(torch.cuda.current_device()))
        except (decord.DECORDError, RuntimeError, AssertionError) as err:
            raise DecodeError(f"{label(self.name)}: Decord cannot open it on the GPU ({err}).") from err

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Decoder.frames_at`; on the GPU."""
        import decord

        wanted, gather = np.unique(check_indices(indices, self.num_frames, self.name), return_inverse=True)
        try:
            batch = self._reader.get_batch(wanted.tolist())
            frames = torch.utils.dlpack.from_dlpack(batch.to_dlpack())
            torch.cuda.synchronize()  # Decord fills them on streams of its own, and does not wait
        except (decord.DECORDError, RuntimeError, IndexError) as err:
            raise DecodeError(f"{label(self.name)}: Decord cannot decode it on the GPU ({err}).") from err
        self.check(len(self._reader), frames.shape, (len(wanted), self.size[1], self.size[0], 3))
        frames = resize_short_side(frames.permute(0, 3, 1, 2), self.short_side)
        return frames.index_select(0, torch.from_numpy(gather).to(frames.device))

    def close(self) -> None:
        super().close()
        self._reader = None
