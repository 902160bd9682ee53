"""What the tests of the decoders share: the table of kinds of video, and a dataset that decodes in workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import DecodeError

import video_kinds
from synthetic import read_indices

# name -> (how to make it, index of its first frame, number of frames), of kinds whose frames follow one another
KINDS: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    name: (kind.make, kind.shown.start, len(kind.shown))
    for name, kind in video_kinds.KINDS.items()
    if isinstance(kind.shown, range)
}


class DecodeInWorker(torch.utils.data.Dataset[str]):
    """Item i is what happened when frames i and 0 of a video were decoded: "ok", or the error."""

    def __init__(self, data: bytes, backend: str, length: int) -> None:
        self.data, self.backend, self.length = data, backend, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        try:
            with open_decoder(self.data, backend=self.backend, short_side=64) as decoder:
                return "ok" if read_indices(decoder.frames_at([index, 0])) == [index, 0] else "wrong frames"
        except DecodeError as err:
            return str(err)
