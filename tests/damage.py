"""Ways to damage a video file, each a pure function of (bytes, seed), so that a failing input can be made again.

`damage(data, suffix, kind, seed)` knows what stands in a container: `table` damages what one box, element or chunk
holds, `length` the number that says how long one is, and `name` what it is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from synthetic import damaged

_ISO = (
    *("ftyp", "moov", "mvhd", "trak", "tkhd", "edts", "elst", "mdia", "mdhd", "hdlr", "minf", "stbl", "stsd", "stts"),
    *("ctts", "stss", "stsc", "stsz", "stco", "avc1", "avcC", "hev1", "hvcC", "mp4v", "esds", "av01", "av1C", "mdat"),
    *("moof", "mfhd", "traf", "tfhd", "tfdt", "trun", "mfra"),
)
_AVI = ("RIFF", "hdrl", "avih", "strl", "strh", "strf", "vprp", "movi", "idx1", "00dc")
_MATROSKA = (  # EBML, Segment, SeekHead, Info, Tracks, CodecPrivate, Video, Cluster, Timecode, blocks, Cues
    *("1a45dfa3", "18538067", "114d9b74", "1549a966", "1654ae6b", "ae", "63a2", "e0", "1f43b675", "e7", "a3", "a0"),
    *("1c53bb6b", "23e383", "2ad7b1", "86"),
)
TS_PACKET = 188

Damage = Callable[[np.ndarray, str, np.random.Generator], np.ndarray]


def _structures(data: np.ndarray, suffix: str) -> list[tuple[int, int, int]]:
    """(start of the name, its length, start of the content) of what a container is made of."""
    raw = data.tobytes()
    if suffix == ".ts":
        return [(at, 1, at + 4) for at in range(0, len(raw), TS_PACKET)]
    if suffix in (".mkv", ".webm"):
        found = []
        for name in map(bytes.fromhex, _MATROSKA):
            # Short names also occur by chance; all of the long ones are there.
            places = [m.start() for m in re.finditer(re.escape(name), raw)][: 4 if len(name) < 3 else 8]
            found += [(at, len(name), at + len(name)) for at in places]
        return found
    names = _AVI if suffix == ".avi" else _ISO
    return [
        (m.start(), 4, m.end() + (4 if suffix == ".avi" else 0))
        for name in names
        for m in list(re.finditer(name.encode(), raw))[:4]
    ]


def _table(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    places = _structures(data, suffix)
    _, _, content = places[int(rng.integers(len(places)))]
    where = content + rng.integers(0, 24, size=int(rng.integers(1, 6)))
    where = where[where < len(data)]
    if rng.integers(2):
        data[where] = rng.integers(0, 256, size=len(where))
    else:  # near misses: numbers that are off by little
        data[where] += rng.integers(1, 4, size=len(where)).astype(np.uint8)
    return data


def _length(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    places = _structures(data, suffix)
    name, width, _ = places[int(rng.integers(len(places)))]
    at = name - 4 if suffix not in (".mkv", ".webm", ".avi", ".ts") else name + width
    at = min(max(at, 0), len(data) - 1) + int(rng.integers(0, 4 if suffix != ".mkv" else 2))
    if at < len(data):
        data[at] ^= 1 << int(rng.integers(0, 8))
    return data


def _name(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    places = _structures(data, suffix)
    at, width, _ = places[int(rng.integers(len(places)))]
    if suffix not in (".mkv", ".webm", ".avi", ".ts") and rng.integers(2):
        data[at : at + 4] = np.frombuffer(b"free", dtype=np.uint8)  # a table that readers pass by
    else:
        data[at + int(rng.integers(width))] ^= 1 << int(rng.integers(0, 8))
    return data


def _bit(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(0, 8))
    return data


def _run(data: np.ndarray, suffix: str, rng: np.random.Generator) -> slice:
    """A stretch of the file; of a transport stream, whole packets half of the time."""
    start, length = int(rng.integers(len(data))), int(rng.integers(1, max(2, len(data) // 8)))
    if suffix == ".ts" and rng.integers(2):
        start, length = start // TS_PACKET * TS_PACKET, -(-length // TS_PACKET) * TS_PACKET
    return slice(start, start + length)


def _lost(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    run = _run(data, suffix, rng)
    return np.concatenate([data[: run.start], data[run.stop :]])


def _added(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    run, at = _run(data, suffix, rng), int(rng.integers(len(data)))
    piece = data[run] if rng.integers(2) else rng.integers(0, 256, size=64, dtype=np.uint8)
    return np.concatenate([data[:at], piece, data[at:]])


def _swapped(data: np.ndarray, suffix: str, rng: np.random.Generator) -> np.ndarray:
    size = int(rng.integers(16, 512))
    one, two = sorted(int(at) for at in rng.integers(0, max(1, len(data) - size), size=2))
    two = max(two, one + size)
    return np.concatenate(
        [data[:one], data[two : two + size], data[one + size : two], data[one : one + size], data[two + size :]]
    )


_OURS: dict[str, Damage] = {
    "one bit": _bit,
    "table": _table,
    "length": _length,
    "name": _name,
    "lost run": _lost,
    "added run": _added,
    "swapped runs": _swapped,
}
_SHARED = {"bits": "flip", "cut": "cut", "zeroed run": "zero", "head and tail": "header", "random bytes": "random"}

#: Every way that keeps something of the file, and "random bytes".
KINDS = (*_OURS, *_SHARED)


def damage(data: bytes, suffix: str, kind: str, seed: int) -> bytes:
    """A damaged copy of `data`, other than `data` itself. `suffix` says which container it is, with the dot."""
    for attempt in range(100):
        if kind in _SHARED:
            result = damaged(data, _SHARED[kind], 1000 * attempt + seed)
        else:
            rng = np.random.default_rng([seed, attempt, KINDS.index(kind)])
            result = _OURS[kind](np.frombuffer(data, dtype=np.uint8).copy(), suffix, rng).tobytes()
        if result != data:
            return result
    raise ValueError(f"{kind!r} with seed {seed} leaves these {len(data)} bytes as they are")
