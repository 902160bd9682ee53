"""Files as cutters, editors, recorders and phones write them: coded streams put together anew, nothing coded again."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from synthetic import draw_frame

_SHOW_BIT = {"vp8": 0x10, "vp9": 0x02}  # in the first byte: RFC 6386 section 9.1, VP9 bitstream section 6.2
HELD = -2  # an edit that holds one picture, see `set_edits`


@dataclass(frozen=True)
class Track:
    """One stream of one file, to be copied.

    Attributes:
        kind: "video" or "audio"; the first such stream of `source` is taken.
        shift: seconds by which it is shown later.
        skip: packets left out at its beginning.
        default: whether players are told to choose it; None leaves its marks alone.
        hide: packets of VP8, and key packets of VP9, whose frames are only there for others to refer to.
        clock: the times of its packets are rounded down to whole multiples of so many seconds.
    """

    source: Path
    kind: str = "video"
    shift: Fraction | float = 0
    skip: int = 0
    default: bool | None = None
    hide: tuple[int, ...] = ()
    clock: Fraction | float = 0


class _Pipe:
    """A file that can only be appended to, as a pipe or a socket."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def remux(
    path: Path,
    *tracks: Track,
    container_options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    chapters: bool = False,
    cover: bool = False,
    piped: str = "",
) -> Path:
    """Copy `tracks` into one file, in the order given. The container follows the suffix.

    Args:
        chapters: two chapters, which become a stream of their own in mp4.
        cover: a picture with the index 999 in it, as music and film players show one.
        piped: the name of the format, written as to a pipe: nothing that was written is corrected afterwards.
    """
    options = dict(container_options or {})
    target: Any = _Pipe(path) if piped else str(path)
    readers = [av.open(str(track.source)) for track in tracks]
    with av.open(target, "w", format=piped or None, container_options=options) as writer:
        writer.metadata.update(metadata or {})
        if chapters:
            writer.set_chapters([_chapter(number) for number in range(2)])
        copied = [_copied(reader, writer, track) for reader, track in zip(readers, tracks, strict=True)]
        if cover:
            _add_cover(writer, path.suffix, copied)
        for packet in sorted((packet for packets in copied for packet in packets), key=lambda p: p.dts * p.time_base):
            writer.mux(packet)
    for reader in readers:
        reader.close()
    if piped:
        target.close()
    return path


def _chapter(number: int) -> Any:
    start = number * 500  # ms
    title = {"title": f"part {number}"}
    return {"id": number + 1, "start": start, "end": start + 500, "time_base": Fraction(1, 1000), "metadata": title}


def _copied(reader: Any, writer: Any, track: Track) -> list[Any]:
    """The packets of one track, with the times and the stream under which they are to be written."""
    stream = getattr(reader.streams, track.kind)[0]
    packets = [packet for packet in reader.demux(stream) if packet.size]
    for index in track.hide:
        packets[index] = _hidden(packets[index], _SHOW_BIT[stream.codec_context.name])
    copy = writer.add_stream_from_template(stream)
    if track.default is not None:
        copy.disposition = Disposition.default if track.default else Disposition(0)
    shift = round(track.shift / stream.time_base)
    clock = max(1, round(track.clock / stream.time_base))
    for packet in packets:
        packet.pts = (packet.pts + shift) // clock * clock
        packet.dts = (packet.dts + shift) // clock * clock
        packet.stream = copy
    return packets[track.skip :]


def _hidden(packet: Any, bit: int) -> Any:
    data = bytearray(bytes(packet))
    data[0] &= ~bit
    hidden = av.Packet(bytes(data))
    hidden.pts, hidden.dts, hidden.duration = packet.pts, packet.dts, packet.duration
    hidden.time_base, hidden.is_keyframe = packet.time_base, packet.is_keyframe
    return hidden


def cover_picture() -> bytes:
    """A JPEG picture of 128 x 128 that carries the index 999."""
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width = encoder.height = 128
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 24)
    picture = av.VideoFrame.from_ndarray(draw_frame(999, (128, 128)), format="rgb24")
    return bytes(encoder.encode(picture.reformat(format="yuvj420p"))[0])


def _add_cover(writer: Any, suffix: str, copied: list[list[Any]]) -> None:
    if suffix == ".mkv":
        writer.add_attachment("cover.jpg", "image/jpeg", cover_picture())
        return
    stream = writer.add_stream("mjpeg", rate=1)
    stream.width = stream.height = 128
    stream.pix_fmt, stream.disposition = "yuvj420p", Disposition.attached_pic
    packet = av.Packet(cover_picture())
    packet.pts = packet.dts = 0
    packet.time_base, packet.stream = Fraction(1, 1000), stream
    copied.append([packet])


def mark_all_as_key(path: Path) -> Path:
    """Make an mp4 say that each of its frames is a key frame, as some recorders do, by hiding the list of those."""
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    return path


def set_edits(path: Path, edits: list[tuple[int, int]], *, fps: int = 24) -> Path:
    """Give the only video track of an mp4 another edit list. Its index has to stand behind its data.

    Args:
        edits: what is shown, one after the other: (first frame, number of frames); first frame -1 shows nothing,
            `HELD` holds the picture that was reached before.
    """
    data = path.read_bytes()
    movie = _scale(data, _find(data, b"mvhd"))
    media = _scale(data, _find(data, b"mdhd"))
    start = _composition_start(data)
    entries, at = b"", 0
    for first, count in edits:
        held = first == HELD
        first = at if held else first
        time = -1 if first < 0 else start + first * media // fps
        entries += struct.pack(">Iihh", count * movie // fps, time, 0 if held else 1, 0)
        at = first + (0 if held else count)
    elst = struct.pack(">II", 0, len(edits)) + entries
    edts = _box(b"edts", _box(b"elst", elst))
    moov = _find(data, b"moov")
    if data.find(b"mdat", moov) >= 0:
        raise ValueError(f"{path}: its index stands before its data")
    body = _replaced(data[moov + 4 :], edts)
    path.write_bytes(data[: moov - 4] + _box(b"moov", body))
    return path


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def _boxes(body: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        found.append((body[at + 4 : at + 8], body[at + 8 : at + size]))
        at += size
    return found


def _replaced(moov: bytes, edts: bytes) -> bytes:
    """The body of a moov box whose tracks have `edts` for an edit list."""
    out = b""
    for kind, body in _boxes(moov):
        if kind == b"trak":
            parts = [(k, b) for k, b in _boxes(body) if k != b"edts"]
            body = _box(*parts[0]) + edts + b"".join(_box(*part) for part in parts[1:])
        out += _box(kind, body)
    return out


def _find(data: bytes, kind: bytes) -> int:
    """Where the four letters of the last box of this kind stand."""
    return data.rindex(kind)


def _scale(data: bytes, at: int) -> int:
    """Ticks per second, of an mvhd or mdhd box of version 0."""
    if data[at + 4]:
        raise ValueError("expected a header of version 0")
    return int.from_bytes(data[at + 16 : at + 20], "big")


def _composition_start(data: bytes) -> int:
    """By how many ticks the first frame is shown after it is decoded, from the ctts box; 0 where there is none."""
    at = data.rfind(b"ctts")
    return int.from_bytes(data[at + 16 : at + 20], "big", signed=True) if at >= 0 else 0


def set_matrix(path: Path, matrix: tuple[int, ...]) -> Path:
    """Give the only track of an mp4 another display matrix: nine numbers, 16.16 (and 2.30 in every third)."""
    data = bytearray(path.read_bytes())
    at = _find(bytes(data), b"tkhd") + 44
    data[at : at + 36] = np.array(matrix, dtype=">i4").tobytes()
    path.write_bytes(bytes(data))
    return path
