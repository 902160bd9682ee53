"""Real encoded video whose frames carry their own index, so that tests can tell by pixels which frame they got.

The index is drawn as a 4 x 4 grid of bright and dark cells in the middle of the picture: 11 bits of index and
5 bits of check. It survives lossy coding, a resize of the short side down to 32 pixels and a centre square
crop, and cannot be read from a picture that is turned, mirrored or mixed of two frames.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

GRID = 4
MAX_FRAMES = 2048
_SHARE = 0.8  # of the short side that the grid covers
_DARK, _BRIGHT = 40, 215
_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "vp8": "libvpx", "av1": "libsvtav1"}


def index_bits(index: int) -> np.ndarray:
    """The grid of one index: bool [4, 4]."""
    if not 0 <= index < MAX_FRAMES:
        raise ValueError(f"index {index} does not fit into the picture: 0 to {MAX_FRAMES - 1} do")
    check = (index * 2654435761 >> 13) & 31
    word = index << 5 | check
    return np.array([word >> bit & 1 for bit in range(GRID * GRID)], dtype=bool).reshape(GRID, GRID)


def draw_frame(index: int, size: tuple[int, int]) -> np.ndarray:
    """One RGB picture, uint8 [height, width, 3], of `size` (width, height) with the index drawn in it."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack(  # something that moves, in colour, so that there is motion to code
        [
            96 + 60 * np.sin(x / 9 + index / 3),
            96 + 60 * np.sin(y / 7 - index / 4),
            96 + 60 * np.sin((x + y) / 11 + index / 5),
        ],
        axis=-1,
    )
    side = min(size) * _SHARE
    row = np.floor((y - height / 2 + side / 2) / side * GRID).astype(int)
    column = np.floor((x - width / 2 + side / 2) / side * GRID).astype(int)
    inside = (row >= 0) & (row < GRID) & (column >= 0) & (column < GRID)
    bits = index_bits(index)
    picture[inside] = np.where(bits[row[inside], column[inside]], _BRIGHT, _DARK)[:, None]
    return picture.clip(0, 255).astype(np.uint8)


def read_index(frame: torch.Tensor) -> int:
    """The index that is drawn in `frame`, uint8 [3, H, W]. Raises ValueError where it cannot be read."""
    if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != 3:
        raise ValueError(f"expected a uint8 [3, H, W] frame, got {frame.dtype} {tuple(frame.shape)}")
    grey = frame.float().mean(dim=0).cpu().numpy()
    height, width = grey.shape
    cell = min(height, width) * _SHARE / GRID
    word = 0
    for bit in range(GRID * GRID):
        row, column = divmod(bit, GRID)
        top = height / 2 + (row - GRID / 2) * cell
        left = width / 2 + (column - GRID / 2) * cell
        part = grey[
            round(top + cell * 0.3) : round(top + cell * 0.7) + 1,
            round(left + cell * 0.3) : round(left + cell * 0.7) + 1,
        ]
        level = float(part.mean())
        if 96 < level < 160 or float(part.std()) > 40:
            raise ValueError(f"cell {row},{column} is neither bright nor dark (mean {level:.0f})")
        word |= int(level >= 160) << bit
    index = word >> 5
    if not np.array_equal(index_bits(index), np.array([word >> b & 1 for b in range(16)]).reshape(4, 4) == 1):
        raise ValueError(f"the picture reads {index}, but its check bits do not match")
    return index


def read_indices(frames: torch.Tensor) -> list[int]:
    """The indices drawn in `frames`, uint8 [n, 3, H, W]."""
    return [read_index(frame) for frame in frames]


def vfr_ticks(num_frames: int) -> list[int]:
    """Presentation times of a variable-rate clip, in quarters of a nominal frame: durations 4, 2, 7, 4, 11."""
    steps = [(4, 2, 7, 4, 11)[i % 5] for i in range(num_frames)]
    return [sum(steps[:i]) for i in range(num_frames)]


def _encoder_options(codec: str, gop: int, b_frames: int, open_gop: bool, extra: str) -> dict[str, str]:
    common = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:open-gop={int(open_gop)}{extra}"
    if codec == "h264":
        return {"preset": "veryfast", "crf": "20", "x264-params": f"threads=1:{common}"}
    if codec == "hevc":
        params = f"{common}:pools=none:frame-threads=1:log-level=none"
        return {"preset": "ultrafast", "crf": "22", "x265-params": params}
    if codec in ("vp9", "vp8"):
        return {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "1M", "g": str(gop)}
    if codec == "av1":
        return {"preset": "8", "crf": "12", "svtav1-params": f"keyint={gop}:lp=1"}
    if codec == "dnxhd":
        return {"profile": "dnxhr_lb"}
    options = {"g": str(gop), "q": "3", "flags": "+qscale"}
    return {**options, "bf": str(b_frames)} if codec == "mpeg4" else options


def make_video(
    path: str | Path,
    *,
    num_frames: int = 48,
    first_index: int = 0,
    fps: Fraction | int = 24,
    size: tuple[int, int] = (160, 96),
    codec: str = "h264",
    gop: int = 12,
    b_frames: int = 2,
    pix_fmt: str = "yuv420p",
    vfr: bool = False,
    rotation: int = 0,
    mirrored: bool = False,
    audio: bool = False,
    open_gop: bool = False,
    fragmented: bool = False,
    extra: str = "",
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a video whose frame i carries the index i, and return its path. The container follows the suffix.

    Args:
        first_index: frame i carries the index `first_index + i`.
        size: (width, height) as displayed, that is after `rotation`.
        b_frames: at most so many B-frames in a row (h264, hevc, mpeg4).
        vfr: irregular presentation times, see `vfr_ticks`.
        rotation: degrees clockwise that a player has to turn the stored picture (mp4, mov, mkv, webm).
        mirrored: pictures are stored mirrored left to right, and nothing says so.
        extra: further x264/x265 parameters, with a leading colon.
    """
    path = Path(path)
    options = dict(container_options or {})
    if fragmented:
        options["movflags"] = "frag_keyframe+empty_moov"
    fps = Fraction(fps)
    times = vfr_ticks(num_frames) if vfr else [4 * i for i in range(num_frames)]
    turned = rotation % 180 != 0
    with av.open(str(path), "w", container_options=options) as container:
        settings = _encoder_options(codec, gop, b_frames, open_gop, extra)
        stream: Any = container.add_stream(_ENCODERS.get(codec, codec), rate=fps, options=settings)
        stream.width, stream.height = size[::-1] if turned else size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        # Containers that count frames (avi) or ticks of a fixed clock need the plain frame clock.
        ticks = 4 if vfr else 1
        stream.codec_context.time_base = 1 / (fps * ticks)
        if rotation:
            stream.set_display_rotation(-rotation)  # FFmpeg counts counter-clockwise
        sound: Any = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for index, time in enumerate(times):
            picture = np.rot90(draw_frame(first_index + index, size), k=rotation // 90)[:, :: -1 if mirrored else 1]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = time * ticks // 4
            frame.time_base = 1 / (fps * ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_sound(container, sound, seconds=float((times[-1] + 4) / 4 / fps))
    return path


def _add_sound(container: Any, stream: Any, seconds: float) -> None:
    samples = math.ceil(seconds * 16000 / 1024) * 1024
    wave = (np.sin(np.arange(samples) / 11) * 8000).astype(np.int16)
    for start in range(0, samples, 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="s16", layout="mono")
        frame.sample_rate = 16000
        frame.pts = start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def make_audio(path: str | Path, *, seconds: float = 1.0) -> Path:
    """Write a file with sound and no picture."""
    with av.open(str(path), "w") as container:
        _add_sound(container, container.add_stream("aac", rate=16000, layout="mono"), seconds)
    return Path(path)


def trim_by_copy(source: str | Path, path: str | Path, *, start: int) -> Path:
    """Copy the frames from `start` on without coding them again, as a lossless cutter does.

    The copy begins with the packets of the key frame before `start`; in mp4 and mov an edit list hides what
    comes before `start`, so frame 0 of the result carries the index `start`.
    """
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        packets: list[Any] = [packet for packet in reader.demux(stream) if packet.pts is not None]
        first = sorted(packet.pts for packet in packets)[start]
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= first]
        for packet in packets[keys[-1] :]:
            packet.pts -= first
            packet.dts -= first
            packet.stream = copy
            writer.mux(packet)
    return Path(path)


def video_bytes(suffix: str = ".mp4", **options: Any) -> bytes:
    """Like `make_video`, but the encoded bytes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make_video(Path(folder) / f"clip{suffix}", **options).read_bytes()


def damaged(data: bytes, kind: str, seed: int) -> bytes:
    """One damaged copy of `data`: "flip" some bits, "cut" the tail, "zero" a run, "header" bytes, "random" bytes."""
    rng = np.random.default_rng(seed)
    array = np.frombuffer(data, dtype=np.uint8).copy()
    size = len(array)
    if kind == "flip":
        where = rng.integers(0, size, size=int(rng.integers(1, 33)))
        array[where] ^= (1 << rng.integers(0, 8, size=len(where))).astype(np.uint8)
    elif kind == "cut":
        array = array[: int(rng.integers(0, size))]
    elif kind == "zero":
        start = int(rng.integers(0, size))
        array[start : start + int(rng.integers(16, 4096))] = 0
    elif kind == "header":
        where = np.concatenate([rng.integers(0, min(size, 512), 3), rng.integers(max(0, size - 2048), size, 3)])
        array[where] = rng.integers(0, 256, size=len(where))
    elif kind == "random":
        array = rng.integers(0, 256, size=size, dtype=np.uint8)
    else:
        raise ValueError(f"unknown damage {kind!r}")
    return array.tobytes()


def play_through(path: str | Path) -> list[int]:
    """Indices of all frames in the order in which a plain sequential read presents them: the reference."""
    source: Any = io.BytesIO(Path(path).read_bytes())
    with av.open(source) as container:
        frames: Sequence[av.VideoFrame] = list(container.decode(video=0))
    pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in frames]
    return read_indices(torch.stack(pictures))
