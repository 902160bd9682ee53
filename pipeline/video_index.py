"""Where the packets of a video lie and what each of them shows, so that decoding needs no look at its container.

Made once, when a shard is written, and carried in the sample's JSON under `packets`. With it a decoder gets the bytes
of exactly the packets that some frames need; without it the container has to be opened and walked through first.
Every packet has a CRC-32, compared before it is decoded: an index is never believed about bytes that it was not made
for, and damage in what is used is found without reading the rest.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cached import cached_property
from .errors import SampleError
from .packet_order import PacketOrder
from .picture import Orientation

VERSION = 1
MAX_EXTRADATA = 1 << 20  # bytes; real ones have less than a thousand
MAX_PACKETS = 1 << 20  # ten hours
MAX_REORDER = 16  # frames; FFmpeg ends the process beyond
#: FFmpeg's decoder for each codec whose packets say everything that it needs to know.
DECODERS = {"h264": "h264", "hevc": "hevc", "vp8": "vp8", "vp9": "vp9", "av1": "libdav1d"}
_KEY, _HIDDEN = 1, 2
_COLUMNS = ("<i4", "<u4", "<i4", "<u4", "u1")  # gap to the packet before, size, order against position, CRC, flags
_ROW = sum(np.dtype(column).itemsize for column in _COLUMNS)


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """The packets of a video in decoding order; P of them.

    Attributes:
        num_bytes: length of the video file that it was made of.
        facts: checksum of what else is known of the video, see `VideoInfo.checksum`.
        format: FFmpeg's name of the container, "mov".
        extradata: the codec's header, as the container keeps it.
        reorder: frames by which showing may lag behind decoding.
        colour: range, primaries, transfer and matrix as the container tags them, in FFmpeg's numbers.
        turn: how the container wants pictures laid.
        closed_keys: every key packet is one at which a decoder forgets all that was before.
        hidden_by_edits: packets that an edit list hides.
        offset, size: int64 [P], bytes, in the file.
        crc: uint32 [P], CRC-32 of the packet's bytes.
        order: int64 [P], a permutation: when each packet's frame is shown, hidden ones counted.
        hidden: bool [P], packets whose frame is not shown (edit lists, hidden references).
        key: bool [P], packets that decode on their own.
    """

    num_bytes: int
    facts: int
    format: str
    extradata: bytes
    reorder: int
    colour: tuple[int, ...]
    turn: Orientation
    closed_keys: bool
    hidden_by_edits: int
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    order: np.ndarray
    hidden: np.ndarray
    key: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoIndex) and self._head() == other._head() and self._table() == other._table()

    def same_packets(self, other: VideoIndex | None) -> bool:
        """Whether both say the same of every packet; how the codec is set up may differ between versions of FFmpeg."""
        return other is not None and self._table() == other._table()

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def packet_order(self) -> PacketOrder:
        """Which packet shows which frame."""
        return PacketOrder.of(self.order, ~self.hidden, np.flatnonzero(self.key))

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold of it: about ten bytes a packet."""
        head, table = self._head(), self._table()
        return {**head, "table": _text(zlib.compress(table, 9)), "crc": _checksum(head, table)}

    def _head(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "bytes": self.num_bytes,
            "facts": self.facts,
            "count": len(self),
            "format": self.format,
            "extradata": _text(self.extradata),
            "reorder": self.reorder,
            "colour": list(self.colour),
            "turn": [self.turn.swap, self.turn.mirror_x, self.turn.mirror_y],
            "closed_keys": self.closed_keys,
            "hidden_by_edits": self.hidden_by_edits,
        }

    def _table(self) -> bytes:
        ends = np.concatenate([[0], self.offset[:-1] + self.size[:-1]])
        flags = self.key * _KEY + self.hidden * _HIDDEN
        columns = (self.offset - ends, self.size, self.order - np.arange(len(self)), self.crc, flags)
        return b"".join(column.astype(kind).tobytes() for column, kind in zip(columns, _COLUMNS, strict=True))

    @classmethod
    def from_json(cls, record: Any) -> VideoIndex:
        """Read what `to_json` wrote.

        Raises:
            SampleError: it is damaged, impossible, or of a version that is not known.
        """
        try:
            return cls._parsed(record)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, zlib.error, binascii.Error) as err:
            raise SampleError(
                f"video metadata: its list of packets is damaged ({type(err).__name__}: {str(err)[:80]}); "
                "write the shard again."
            ) from err

    @classmethod
    def _parsed(cls, record: Any) -> VideoIndex:
        if not isinstance(record, dict):
            raise TypeError(f"it is {type(record).__name__}, not a mapping")
        head = {name: record[name] for name in record if name not in ("table", "crc")}
        count, num_bytes = head["count"], head["bytes"]
        if head["version"] != VERSION:
            raise ValueError(f"its version is {head['version']!r}, expected {VERSION}")
        if not (_is_count(num_bytes, 1 << 48) and _is_count(count, min(num_bytes, MAX_PACKETS)) and count):
            raise ValueError(f"{count!r} packets in {num_bytes!r} bytes")
        unpack = zlib.decompressobj()
        table = unpack.decompress(base64.b64decode(record["table"], validate=True), _ROW * count)
        if len(table) != _ROW * count or unpack.unconsumed_tail or _checksum(head, table) != record["crc"]:
            raise ValueError("its checksum does not match")
        columns, at = [], 0
        for kind in map(np.dtype, _COLUMNS):
            columns.append(np.frombuffer(table, kind, count, at))
            at += kind.itemsize * count
        size = columns[1].astype(np.int64)
        offset = np.cumsum(columns[0].astype(np.int64) + np.concatenate([[0], size[:-1]]))
        order = columns[2].astype(np.int64) + np.arange(count)
        key, hidden = (columns[4] & _KEY).astype(bool), (columns[4] & _HIDDEN).astype(bool)
        if (offset < 0).any() or (size < 1).any() or (offset + size > num_bytes).any():
            raise ValueError("packets lie outside the file")
        if not np.array_equal(np.sort(order), np.arange(count)) or not key.any() or hidden.all():
            raise ValueError("its order is none")
        if not hidden[: key.argmax()].all():
            raise ValueError("frames come before the first key packet")
        if not _is_count(head["reorder"], MAX_REORDER):
            raise ValueError(f"frames are {head['reorder']!r} behind")
        extradata = base64.b64decode(head["extradata"], validate=True)
        colour = tuple(head["colour"])
        if len(extradata) > MAX_EXTRADATA or len(colour) != 4 or not all(_is_count(part, 255) for part in colour):
            raise ValueError("its codec settings are none")
        return cls(
            num_bytes=num_bytes,
            facts=head["facts"],
            format=str(head["format"]),
            extradata=extradata,
            reorder=head["reorder"],
            colour=colour,
            turn=Orientation(*(bool(part) for part in head["turn"])),
            closed_keys=bool(head["closed_keys"]),
            hidden_by_edits=int(head["hidden_by_edits"]),
            offset=offset,
            size=size,
            crc=columns[3].astype(np.uint32),
            order=order,
            hidden=hidden,
            key=key,
        )


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _checksum(head: dict[str, Any], table: bytes) -> int:
    """Over all of it, because a flipped digit in the order of the packets would silently show other frames."""
    return zlib.crc32(table, zlib.crc32(json.dumps(head, sort_keys=True).encode()))
