"""The process in which Decord runs, so that a crash or a hang in it costs one sample and not the training run.

Started by `framestream.pipeline.isolation`. It reads requests from its standard input and answers on
its standard output, both as `message` packs them: lengths, a JSON object, bytes. Nothing else crosses.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
from typing import Any, BinaryIO

from .parent_watch import leave_with_parent

_HEAD = struct.Struct("<IQ")  # length of the JSON object, length of the bytes after it
_CLOCK = re.compile(r"^\[\d\d:\d\d:\d\d\]\s*")  # in front of Decord's messages; the same fault should read the same
_LIMIT = 1 << 26  # of a JSON object


def send(pipe: BinaryIO, fields: dict[str, Any], body: bytes | memoryview = b"") -> None:
    """Write one message."""
    text = json.dumps(fields).encode()
    for part in (_HEAD.pack(len(text), len(body)), text, body):
        rest = memoryview(part)
        while len(rest):
            rest = rest[pipe.write(rest) :]
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[dict[str, Any], bytearray]:
    """Read one message. Raises EOFError where the other side has gone, ValueError where it speaks nonsense."""
    text_length, body_length = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    if text_length > _LIMIT:
        raise ValueError(f"a message of {text_length} bytes was announced")
    fields = json.loads(bytes(_exactly(pipe, text_length)))
    return fields, _exactly(pipe, body_length)


def _exactly(pipe: Any, length: int) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while len(rest):
        count = pipe.readinto(rest)
        if not count:
            raise EOFError("the pipe was closed")
        rest = rest[count:]
    return data


def _decode(decord: Any, fields: dict[str, Any], data: bytearray) -> tuple[dict[str, Any], Any]:
    # fault_tol: the smallest share of replaced frames that Decord can be told not to put up with.
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
    frames = reader.get_batch(fields["indices"]).asnumpy()
    times = reader.get_frame_timestamp(fields["indices"])[:, 0].tolist()
    if fields.get("size"):
        frames = _resized(frames, fields["size"])
    return {"num_frames": len(reader), "shape": list(frames.shape), "times": times}, frames


def _resized(frames: Any, size: tuple[int, int]) -> Any:
    """uint8 [n, H, W, 3] at another (width, height). Decord's own resizing aliases on strong reduction."""
    import av
    import numpy as np

    from .picture import to_rgb

    pictures = [to_rgb(av.VideoFrame.from_ndarray(frame, format="rgb24"), size) for frame in frames]
    return np.stack(pictures).transpose(0, 2, 3, 1)


def main() -> None:
    """Serve until the standard input is closed."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # libraries may print; the pipes are for messages alone
        os.dup2(nothing, stream)
    leave_with_parent()
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    while True:
        try:
            fields, data = receive(requests)
        except EOFError:
            sys.exit(0)
        try:
            answer, frames = _decode(decord, fields, data)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError) as err:
            line = (str(err).strip().splitlines() or [type(err).__name__])[-1]
            send(replies, {"error": _CLOCK.sub("", line)[:300]})
        except (IndexError, MemoryError, ValueError, TypeError) as err:
            send(replies, {"error": f"{type(err).__name__}: {str(err)[:300]}"})
        else:
            send(replies, answer, memoryview(frames.reshape(-1)))
