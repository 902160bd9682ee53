"""In which order an H.264 stream shows its pictures, read from its own headers where the container does not say it.

Sections of ITU-T H.264 are named: 7.3.2.1 (sequence parameter sets), 7.3.3 (slice headers), 8.2.1 (picture order
count). Pure, on bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .bitstream import H264_SLICES, h264_length_width

_IDR, _SPS, _PPS = 5, 7, 8
_HEAD = 64  # bytes of a slice that hold what is looked at, emulation prevention included
_MOST_UNITS = 64  # before the first slice of a picture; real ones have less than ten
_LONGEST_SET = 4096  # bytes, with all scaling lists; the rest is not looked at
_MOST_SHOWN_EARLIER = 16  # pictures that a decoder may hold back (A.3.1)
# Profiles whose parameter sets say how chroma is coded (7.3.2.1.1).
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
_START = b"\x00\x00\x01"


@dataclass(frozen=True)
class _Sequence:
    """What a sequence parameter set says about the heads of slices."""

    separate_planes: bool
    frame_num_bits: int
    order_type: int
    order_bits: int
    frames_only: bool


class _Bits:
    """Reads a NAL unit bit by bit (7.2). Raises IndexError or ValueError behind its end."""

    def __init__(self, unit: bytes) -> None:
        plain = unit.replace(b"\x00\x00\x03", b"\x00\x00")  # without emulation prevention
        self._bits = "".join(f"{byte:08b}" for byte in plain)
        self._at = 8  # behind the head of the unit

    def u(self, count: int) -> int:
        self._at += count
        if self._at > len(self._bits):
            raise IndexError("the unit is cut")
        return int(self._bits[self._at - count : self._at] or "0", 2)

    def ue(self) -> int:
        zeros = self._bits.index("1", self._at) - self._at
        self._at += zeros
        return self.u(zeros + 1) - 1

    def se(self) -> int:
        value = self.ue()
        return (value + 1) // 2 if value % 2 else -(value // 2)


class PictureOrder:
    """Takes the packets of a stream one by one, a picture each, and says at the end in which order they are shown.

    Args:
        extradata: the stream's header, with start codes or as an `avcC`.
    """

    def __init__(self, extradata: bytes) -> None:
        self._sets: dict[int, _Sequence] = {}
        self._of_picture: dict[int, int] = {}  # picture parameter set -> sequence parameter set
        self._counts: list[tuple[int, int]] = []  # (IDR pictures so far, picture order count)
        self._readable = True
        self._period, self._high, self._low = 0, 0, 0  # the last two of the last picture that others refer to
        self._width = h264_length_width(extradata)
        try:
            for unit in _units_of_avcc(extradata) if self._width else _units(extradata, 0):
                self._keep(unit)
        except (IndexError, ValueError):
            self._readable = False

    def add(self, packet: bytes) -> None:
        if self._readable:
            try:
                self._counts.append(self._count(packet))
            except (IndexError, ValueError, KeyError):
                self._readable = False

    def places(self) -> np.ndarray | None:
        """int64 [P]: for each packet, its place in the order of showing.

        None where that is not read here: pictures coded as fields, the rare order of type 1, damaged headers, or counts
        that contradict themselves.
        """
        counts = self._counts
        if not self._readable or not counts or len(set(counts)) < len(counts):
            return None  # the last as behind a picture that resets the count on its way (memory management 5)
        places = np.empty(len(counts), dtype=np.int64)
        places[sorted(range(len(counts)), key=counts.__getitem__)] = np.arange(len(counts))
        return places if reordering(places) <= _MOST_SHOWN_EARLIER else None

    def _count(self, packet: bytes) -> tuple[int, int]:
        for unit in _units(packet, self._width):
            if unit[0] & 31 in H264_SLICES:
                break
            self._keep(unit)
        else:
            raise ValueError("there is no picture in it")
        bits, is_idr = _Bits(unit[:_HEAD]), unit[0] & 31 == _IDR
        bits.ue(), bits.ue()  # first macroblock, type
        sequence = self._sets[self._of_picture[bits.ue()]]
        if is_idr:
            self._period, self._high, self._low = self._period + 1, 0, 0
        if sequence.order_type == 2:  # shown as they are stored
            return self._period, len(self._counts)
        bits.u(2 * sequence.separate_planes + sequence.frame_num_bits)
        if not sequence.frames_only and bits.u(1):
            raise ValueError("it is coded as fields")
        if is_idr:
            bits.ue()
        low, half = bits.u(sequence.order_bits), 1 << (sequence.order_bits - 1)
        back = self._low - low  # the count goes round (8-3)
        high = self._high + 2 * half * ((back >= half) - (back < -half))
        if unit[0] >> 5 & 3:
            self._high, self._low = high, low
        return self._period, high + low

    def _keep(self, unit: bytes) -> None:
        kind = unit[0] & 31
        if kind == _SPS:
            number, sequence = _sequence(unit)
            self._sets[number] = sequence
        elif kind == _PPS:
            bits = _Bits(unit[:_HEAD])
            number = bits.ue()
            self._of_picture[number] = bits.ue()


def reordering(place: np.ndarray) -> int:
    """By how many frames showing lags behind decoding.

    Streams may leave that out (`bitstream_restriction_flag`, E.2.1), and decoders then find it out too late.

    Args:
        place: int64 [P], for each packet its place in the order of showing.
    """
    return int((np.arange(len(place)) - place).max(initial=0))


def in_rhythm(place: np.ndarray, decoded_at: np.ndarray, lag: int) -> np.ndarray:
    """int64 [P]: when each packet's frame is shown, where only the times of decoding are told.

    Encoders give the packets the times at which frames are shown, each `lag` frames later. So the steps between the
    last of them are told nowhere, and are taken to be usual ones.

    Args:
        place: int64 [P], for each packet its place in the order of showing.
        decoded_at: int64 [P], rising.
        lag: by how many frames the stream says that it reorders them.
    """
    steps = np.diff(decoded_at)
    lag = min(max(lag, reordering(place)), len(steps))
    last = np.full(lag, int(np.median(steps)) if len(steps) else 1, dtype=np.int64)
    return (decoded_at[0] + np.concatenate([[0], np.cumsum(np.concatenate([steps[lag:], last]))]))[place]


def _sequence(unit: bytes) -> tuple[int, _Sequence]:
    bits = _Bits(unit[:_LONGEST_SET])
    profile = bits.u(8)
    bits.u(16)
    number = bits.ue()
    separate = False
    if profile in _WITH_CHROMA:
        chroma = bits.ue()
        separate = chroma == 3 and bool(bits.u(1))
        bits.ue(), bits.ue(), bits.u(1)
        if bits.u(1):
            for matrix in range(12 if chroma == 3 else 8):
                if bits.u(1):
                    _skip_scaling(bits, 16 if matrix < 6 else 64)
    frame_num_bits = bits.ue() + 4
    order_type = bits.ue()
    if order_type not in (0, 2):
        raise ValueError("its order of pictures is of type 1")
    order_bits = bits.ue() + 4 if order_type == 0 else 0
    bits.ue(), bits.u(1), bits.ue(), bits.ue()  # references, gaps, width, height
    return number, _Sequence(separate, frame_num_bits, order_type, order_bits, bool(bits.u(1)))


def _skip_scaling(bits: _Bits, count: int) -> None:
    last = following = 8
    for _ in range(count):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def _units(data: bytes, width: int) -> Iterator[bytes]:
    """NAL units up to the first slice: behind lengths of `width` bytes, or behind start codes (0).

    Raises ValueError where there are so many that reading them would take long.
    """
    end = 0
    for _ in range(_MOST_UNITS):
        found = end if width else data.find(_START, end)
        begin = found + (width or len(_START))
        if found < 0 or begin >= len(data):
            return
        if data[begin] & 31 in H264_SLICES:
            yield data[begin : begin + _HEAD]
            return
        if width:
            end = begin + int.from_bytes(data[end:begin], "big")
        else:
            found = data.find(_START, begin)
            end = found if found >= 0 else len(data)
        yield data[begin:end]
    raise ValueError(f"there are more than {_MOST_UNITS} units before its picture")


def _units_of_avcc(extradata: bytes) -> Iterator[bytes]:
    """The parameter sets in an `avcC` (ISO/IEC 14496-15, 5.3.3.1)."""
    at = 5
    for mask in (31, 255):
        count = extradata[at] & mask
        at += 1
        for _ in range(count):
            begin = at + 2
            at = begin + int.from_bytes(extradata[at:begin], "big")
            yield extradata[begin:at]
