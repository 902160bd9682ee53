"""What the head of a picture tells without the picture: its size, pixel format, colours, and how it is to be turned.

FFmpeg says that of a frame only. Of H.264, whose intra pictures take long to decode (80 microseconds for each kB), it
gives one for the first bytes of its first slice, too: everything asked for is in the slice's header and in the
parameter sets before it. What its pixels are then is of no meaning.
"""

from __future__ import annotations

from typing import Any

from .bitstream import up_to_slice
from .errors import DecodeError
from .packet_source import packet_of
from .packet_table import PacketTable, check_size, label, reason_of

_SLICE_HEAD = 256  # bytes; a slice header takes 20 or so


def head_frame(table: PacketTable) -> Any | None:
    """The first frame that is shown, as a PyAV frame without its picture.

    None where only the picture tells: in other codecs than H.264, in H.264 with start codes in place of lengths, and
    where the first key frame is not the first that is shown. Otherwise this table's decoder takes nothing but heads
    from then on.

    Raises:
        DecodeError: no frame comes of it; the picture may be whole.
    """
    import av

    first = int(table.order.keys[0])
    if table.codec != "h264" or table.order.rank[first] != 0:
        return None
    head = up_to_slice(table.source.extradata, bytes(table.source.packet(first)), _SLICE_HEAD)
    if head is None:
        return None
    context = table.source.codec(heads=True)
    try:
        frames = [*context.decode(packet_of(head, 0)), *context.decode(None)]
    except (av.error.FFmpegError, ValueError) as err:
        raise DecodeError(f"{label(table.name)}: the head of its first frame is damaged ({reason_of(err)}).") from err
    if not frames:
        raise DecodeError(f"{label(table.name)}: its first frame does not come out of the decoder.")
    check_size(frames[0].width, frames[0].height, table.name)
    return frames[0]
