"""What readers do with a video when nobody keeps them from it: the measure of which refusals are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from framestream.pipeline.isolation import HelperDied, helper

from synthetic import read_index

_TIMEOUT_S = 20.0
_ALONE = 12  # frames that are asked for alone
# Reads frames: indices -> uint8 [n, 3, H, W]; without indices -> int, how many frames it sees. Raises ReaderFailed.
Reader = Callable[[Sequence[int] | None], Any]


class ReaderFailed(Exception):
    """The reader raised an error ("error"), or its process died ("crashes") or did not answer ("hangs")."""


def decord_reader(data: bytes) -> Reader:
    """Decord in its process, the file opened anew for each call: the one that is found first on the path."""

    def read(indices: Sequence[int] | None) -> Any:
        try:
            wanted = [0] if indices is None else list(indices)
            answer, body = helper().request({"indices": wanted, "size": None}, data, _TIMEOUT_S)
        except HelperDied as err:
            raise ReaderFailed("hangs" if "longer than" in str(err) else "crashes") from err
        if "error" in answer:
            raise ReaderFailed("error")
        if indices is None:
            return answer["num_frames"]
        return torch.frombuffer(body, dtype=torch.uint8).reshape(answer["shape"]).permute(0, 3, 1, 2)

    return read


def torchcodec_reader(data: bytes) -> Reader:
    """TorchCodec on the CPU, which looks through the whole file first, the file opened anew for each call."""

    def read(indices: Sequence[int] | None) -> Any:
        from torchcodec.decoders import VideoDecoder

        try:
            decoder: Any = VideoDecoder(data, seek_mode="exact", num_ffmpeg_threads=1)
            return len(decoder) if indices is None else decoder.get_frames_at(list(indices)).data
        except (RuntimeError, ValueError, IndexError) as err:
            raise ReaderFailed("error") from err

    return read


BARE_READERS: dict[str, Callable[[bytes], Reader]] = {"decord": decord_reader, "torchcodec": torchcodec_reader}


def verdict(read: Reader, shown: Sequence[int]) -> str:
    """ "right", or what is wrong, in a few words.

    Frames are asked for in order, in a random order, and one by one; one counts as wrong when any answer was.
    """
    rng = np.random.default_rng(0)
    wrong: set[int] = set()
    failed = 0
    try:
        count = read(None)
        common = min(count, len(shown))
        orders = [list(range(common)), rng.permutation(common).tolist()]
        orders += [[index] for index in sorted({0, common - 1, *rng.permutation(common)[:_ALONE].tolist()})]
        for indices in orders:
            try:
                frames = read(indices)
            except ReaderFailed as err:
                if str(err) != "error":
                    raise
                failed += 1
            else:
                wrong |= {i for i, frame in zip(indices, frames, strict=True) if _seen(frame) != shown[i]}
    except ReaderFailed as err:
        return str(err)
    words = []
    if count != len(shown):
        words.append(f"{count} frames instead of {len(shown)}")
    if wrong:
        words.append(f"{len(wrong)} of {len(shown)} wrong")
    if failed:
        words.append("error" if failed == len(orders) else "errors")
    return ", ".join(words) or "right"


def is_silent(words: str) -> bool:
    """Whether a verdict tells of wrong frames, or of another number of them, that came without an error."""
    return "wrong" in words or "instead" in words


def _seen(frame: torch.Tensor) -> int | None:
    try:
        return read_index(frame)
    except ValueError:
        return None
