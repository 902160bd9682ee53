"""Exact decoding on the CPU with PyAV: the frames asked for, and no packet more than they need."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .decode import check_indices, fit_short_side
from .errors import DecodeError
from .packet_table import Deadline, PacketTable, check_size, label, open_codec
from .packets import read_packets
from .picture import orientation, to_rgb
from .probe import VideoInfo

# Codecs whose decoders leave out pictures that no other picture refers to, when told to, and stay exact.
_SKIPS = ("h264", "mpeg4")


@dataclass
class DecodeStats:
    """Work that a decoder has done so far: packets fed to it, runs begun at a key frame, pictures converted."""

    packets: int = 0
    runs: int = 0
    pictures: int = 0


class PyAVDecoder:
    """See `Decoder`. Holds the file's packets; one thread; not to be shared between threads.

    Args:
        data: the video file.
        short_side: resize so that the shorter side has this length; None keeps the size.
        info: what is known about the video. A file that no longer has as many frames is refused.
        name: how errors call it.
        timeout_s: for opening, and again for every `frames_at`.
    Raises:
        DecodeError: nothing can be decoded from `data`, or not what `info` promises.
    """

    backend = "pyav"

    def __init__(
        self,
        data: bytes,
        *,
        short_side: int | None = None,
        info: VideoInfo | None = None,
        name: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        self.name, self.short_side, self.timeout_s = name, short_side, timeout_s
        self.stats = DecodeStats()
        self.table: PacketTable = read_packets(io.BytesIO(data), name=name, deadline=Deadline(timeout_s, name))
        try:
            self.table.expect(info)
        except DecodeError:
            self.close()
            raise
        self.num_frames = self.table.num_frames
        self.fps = self.table.fps
        self.timestamps = self.table.times()
        self.key_frames = self.table.key_frames
        self._stored: tuple[int, int] | None = None

    def frames_at(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames at `indices`: uint8 [n, 3, H, W] RGB, in the order asked, repeats allowed.

        Raises:
            DecodeError: an index is outside the video, a packet on the way is damaged, a frame does not come out
                of the decoder, or the time is up. Never returns another frame in place of a missing one.
        """
        wanted, gather = np.unique(check_indices(indices, self.num_frames, self.name), return_inverse=True)
        deadline = Deadline(self.timeout_s, self.name)
        pictures: dict[int, np.ndarray] = {}
        for start, group in self._runs(wanted.tolist()):
            self._collect(start, group, pictures, deadline)
        return torch.from_numpy(np.stack([pictures[int(index)] for index in wanted[gather]]))

    def _runs(self, wanted: list[int]) -> list[tuple[int, list[int]]]:
        """Groups of frames that are decoded in one go, each with the packet to begin at."""
        if not self.table.ordered:
            return [(0, wanted)]
        runs: list[tuple[int, list[int]]] = []
        end = -1
        for start, index in sorted((int(self.table.start[index]), index) for index in wanted):
            position = int(self.table.position[index])
            if runs and (start == runs[-1][0] or start <= end):
                runs[-1][1].append(index)
                end = max(end, position)
            else:
                runs.append((start, [index]))
                end = position
        return runs

    def _collect(self, start: int, group: list[int], pictures: dict[int, np.ndarray], deadline: Deadline) -> None:
        """Decode `group` from packet `start` on, and from an earlier key packet where that was not enough.

        Some streams mark packets as key that only begin a gradual refresh, after which pictures are complete.
        """
        key = int(np.searchsorted(self.table.keys, start))
        for earlier in (0, 1, 4):
            begin = int(self.table.keys[max(0, key - earlier)]) if self.table.ordered else start
            try:
                pictures.update(self._decode(begin, group, deadline))
                return
            except DecodeError:
                deadline.check()
                if self.table.closed_keys or not self.table.ordered or key - earlier <= 0 or earlier == 4:
                    raise

    def _decode(self, start: int, group: list[int], deadline: Deadline) -> dict[int, np.ndarray]:
        """Decode one run. Damage anywhere in it is an error: frames after it may build on it without a sign of it."""
        import av

        table, wanted = self.table, set(group)
        context = open_codec(table.stream)
        self.stats.runs += 1
        found: dict[int, np.ndarray] = {}
        expected: set[int] = set(group)
        came: dict[int, None] = {}  # in the order in which they came
        try:
            for position in self._positions(start, group):
                deadline.check()
                index = int(table.rank[position])
                if table.codec in _SKIPS:
                    context.skip_frame = "DEFAULT" if index in wanted or not table.ordered else "NONREF"
                elif index >= 0 and table.ordered:
                    expected.add(index)
                self.stats.packets += 1
                self._keep(context.decode(table.packets[position]), came, wanted, found)
                if not table.ordered and len(found) == len(wanted):
                    break
            self._keep(context.decode(None), came, wanted, found)
        except (av.error.FFmpegError, ValueError) as err:
            raise DecodeError(
                f"{label(self.name)}: damaged between frames {max(0, int(table.rank[start]))} and {max(group)} "
                f"({getattr(err, 'strerror', None) or err})."
            ) from err
        finally:
            context.flush_buffers()
        missing = sorted(expected - came.keys())
        if missing:
            raise DecodeError(
                f"{label(self.name)}: {len(missing)} frames did not come out of the decoder, "
                f"frame {missing[0]} first; the packets on the way to it are damaged."
            )
        return found

    def _positions(self, start: int, group: list[int]) -> list[int]:
        """The packets of one run. Leading ones of its first key packet refer to what is not decoded: left out."""
        table = self.table
        if not table.ordered:
            return list(range(len(table.rank)))
        positions = np.arange(start, int(table.position[group].max()) + 1)
        later_keys = table.keys[table.keys > start]
        first = positions < (later_keys[0] if len(later_keys) else len(table.rank))
        left_out = first & table.leading[positions]
        if np.isin(table.rank[positions[left_out]], group).any():  # decodable ones, at the very start
            return positions.tolist()
        return positions[~left_out].tolist()

    def _keep(
        self, frames: Iterable[Any], came: dict[int, None], wanted: set[int], found: dict[int, np.ndarray]
    ) -> None:
        """Convert those of `frames` that are wanted, and note which ones came. They come as they are to be shown."""
        for frame in frames:
            # Where the container does not order its frames, the order in which they come does.
            index = frame.pts if self.table.ordered else len(came)
            if frame.is_corrupt:
                raise DecodeError(f"{label(self.name)}: the decoder says that frame {index} is damaged.")
            if index is None:
                continue  # hidden, by an edit list
            last = next(reversed(came), -1)
            if index <= last:
                raise DecodeError(
                    f"{label(self.name)}: the decoder shows frame {index} after frame {last}, so the times in the "
                    "container, or the pictures, are damaged."
                )
            came[index] = None
            if index in wanted and index not in found:
                found[index] = self._convert(frame, index)

    def _convert(self, frame: Any, index: int) -> np.ndarray:
        """uint8 [3, H, W] RGB, resized and turned as a player shows it."""
        size = (frame.width, frame.height)
        if self._stored not in (None, size):
            raise DecodeError(
                f"{label(self.name)}: frame {index} is {size[0]} x {size[1]}, others are "
                f"{self._stored[0]} x {self._stored[1]}; split the video where its size changes."  # type: ignore[index]
            )
        check_size(*size, self.name)
        self._stored = size
        self.stats.pictures += 1
        return orientation(frame, self.name).apply(to_rgb(frame, fit_short_side(*size, self.short_side)))

    def close(self) -> None:
        self.table.close()

    def __enter__(self) -> PyAVDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
