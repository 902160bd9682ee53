"""Where a decoder's packets come from: a container that was walked through, or a file whose index is known.

Both open the decoder alike: one thread, and an error rather than a concealed picture wherever it notices one.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

from .errors import DecodeError
from .file_parts import FileParts
from .picture import Orientation
from .video_index import DECODERS, VideoIndex

MAX_PIXELS = 1 << 26


class PacketSource(Protocol):
    """The packets of one video, by their place in decoding order.

    Attributes:
        turn: how the container wants pictures laid where the pictures themselves do not say it.
        extradata: the stream's header.
    """

    turn: Orientation

    @property
    def extradata(self) -> bytes: ...

    def packet(self, position: int) -> Any:
        """A PyAV packet whose `pts` is the frame that it shows, None for a hidden one. Raises DecodeError."""
        ...

    def codec(self, *, heads: bool = False) -> Any:
        """The decoder, open; the same one each time. With `heads`, one that takes the heads of pictures for them."""
        ...

    def close(self) -> None: ...


def set_up(context: Any, *, heads: bool = False) -> Any:
    """Open a codec context with our settings, once."""
    if not context.is_open:
        context.thread_count = 1
        context.thread_type = "NONE"
        lacking = {"enable_er": "0"} if heads else {"err_detect": "explode"}  # nothing is put for what lacks
        context.options = {**lacking, "max_pixels": str(MAX_PIXELS)}
    return context


def packet_of(body: bytes | memoryview, frame: int) -> Any:
    """A PyAV packet of these bytes; `frame` is the index of the frame that it shows, below 0 for none."""
    import av

    packet: Any = av.Packet(len(body))  # not of `body`: FFmpeg reads past the end, where only its own has padding
    packet.update(body)
    packet.pts = frame if frame >= 0 else None
    return packet


_BASELINE = 66  # H.264's profile without B-frames (ITU-T H.264, A.2.1)


def knows_its_order(container: str, context: Any) -> bool:
    """Whether a stream's headers say by how many frames showing lags behind decoding, so that nothing has to be decoded
    to find out. H.264 may leave it open; FFmpeg then has 0 before it has decoded some.

    Args:
        container: FFmpeg's name.
        context: the stream's codec context.
    """
    if context is None or not context.width or not container.startswith(("mov", "matroska")):
        return False
    codec = context.codec.canonical_name
    if codec != "h264":
        return codec in DECODERS
    extradata = bytes(context.extradata or b"")
    return context.reorder_depth > 0 or (extradata[:1] == b"\x01" and extradata[1:2] == bytes([_BASELINE]))


class ContainerPackets:
    """Packets kept from one pass over an open container; frames carry the container's display matrix themselves."""

    turn = Orientation()

    def __init__(self, container: Any, stream: Any, packets: list[Any]) -> None:
        self.container, self.stream, self.packets = container, stream, packets

    def packet(self, position: int) -> Any:
        return self.packets[position]

    @property
    def extradata(self) -> bytes:
        return bytes(self.stream.codec_context.extradata or b"")

    def codec(self, *, heads: bool = False) -> Any:
        return set_up(self.stream.codec_context, heads=heads)

    def close(self) -> None:
        self.packets = []
        self.container.close()


class IndexedPackets:
    """Packets cut out of a file by its index, each compared with its CRC-32 before it is used.

    Args:
        codec: FFmpeg's name of the codec, one of `DECODERS`.
    """

    def __init__(self, data: bytes | memoryview | FileParts, index: VideoIndex, codec: str, name: str) -> None:
        import av

        self.turn = index.turn
        self._data = data if isinstance(data, FileParts) else FileParts(len(data), [(0, data)])
        self._name = name
        self._rank = index.packet_order.rank.tolist()
        self._offset, self._size, self._crc = index.offset.tolist(), index.size.tolist(), index.crc.tolist()
        context: Any = av.CodecContext.create(DECODERS[codec], "r")
        context.extradata = index.extradata or None
        context.reorder_depth = index.reorder
        context.color_range, context.color_primaries, context.color_trc, context.colorspace = index.colour
        self._context = context

    def packet(self, position: int) -> Any:
        start = self._offset[position]
        try:
            body = self._data.cut(start, self._size[position])
        except KeyError as err:
            raise DecodeError(f"{self._name or 'the video'}: packet {position} was not read ({err.args[0]}).") from err
        if zlib.crc32(body) != self._crc[position]:
            raise DecodeError(
                f"{self._name or 'the video'}: packet {position} ({len(body)} bytes at {start}) is not what it was "
                "when the shard was written: the video was damaged or replaced since. Write the shard again."
            )
        return packet_of(body, self._rank[position])

    @property
    def extradata(self) -> bytes:
        return bytes(self._context.extradata or b"")

    def codec(self, *, heads: bool = False) -> Any:
        return set_up(self._context, heads=heads)

    def close(self) -> None:
        self._data = FileParts(0, [])
