"""The inputs of the fuzz test: real clips of many kinds, each damaged in many ways, named by kind and seed."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from framestream.pipeline.probe import probe_video
from framestream.pipeline.raw_sample import sample_from_members
from framestream.pipeline.sampling import FastSlowSampling, Sampling
from framestream.pipeline.transforms import ClipTransform

from damage import KINDS, damage
from synthetic import video_bytes

FRAMES, SIZE, IMAGE_SIZE = 30, (96, 64), 48
SAMPLING = FastSlowSampling(num_fast=4, num_slow=4)
SEEDS = range(12)  # per kind of damage and source
SOUND = "sound"

# name -> (suffix, how it is encoded)
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "h264 mp4, sound": (".mp4", {"audio": True}),
    "h264 mp4, variable rate": (".mp4", {"vfr": True}),
    "h264 mp4, fragmented": (".mp4", {"fragmented": True}),
    "h264 mkv, open GOPs": (".mkv", {"open_gop": True, "b_frames": 3}),
    "h264 ts": (".ts", {}),
    "h264 avi": (".avi", {}),
    "hevc mp4": (".mp4", {"codec": "hevc"}),
    "hevc mkv": (".mkv", {"codec": "hevc", "open_gop": True}),
    "vp9 webm": (".webm", {"codec": "vp9"}),
    "mpeg4 mp4": (".mp4", {"codec": "mpeg4", "b_frames": 0}),
    "mpeg4 avi": (".avi", {"codec": "mpeg4"}),
    "av1 mp4": (".mp4", {"codec": "av1"}),
}

# What the JSON beside a video holds: ours; ours without its packets; also without its checksum; there is none.
MODES = ("packets", "checksum", "metadata", "foreign")
_LACKING = {"packets": (), "checksum": ("packets",), "metadata": ("packets", "sha256")}


@dataclass(frozen=True)
class Input:
    """One sample: what was done to it, and what stands in the shard."""

    key: str
    kind: str
    video: bytes
    ext: str
    json: bytes | None


@cache
def clip(source: str, num_frames: int = FRAMES) -> tuple[bytes, dict[str, Any]]:
    """(bytes, our metadata) of a sound clip."""
    data = encode(source, num_frames)
    return data, {**probe_video(data, packets=True).to_json(), "sha256": hashlib.sha256(data).hexdigest()}


def encode(source: str, num_frames: int = FRAMES) -> bytes:
    """A sound clip, the same bytes each time: muxers put random numbers into some containers unless told not to."""
    suffix, options = SOURCES[source]
    container = {"fflags": "+bitexact"}
    return video_bytes(suffix, num_frames=num_frames, size=SIZE, gop=10, container_options=container, **options)


@cache
def reference(source: str, sampling: Sampling = SAMPLING) -> dict[str, torch.Tensor]:
    """`frames`, `frame_index` and `frame_time` of the sound clip."""
    data, info = clip(source)
    members = {SOURCES[source][0][1:]: data, "json": json.dumps(info).encode()}
    return ClipTransform(sampling, image_size=IMAGE_SIZE)(sample_from_members(source, "reference", members))


def not_video(source: str) -> dict[str, bytes]:
    """Files that are no video, or not the one that they were."""
    data, _ = clip(source)
    other, _ = clip("h264 mp4, sound" if source != "h264 mp4, sound" else "h264 avi", FRAMES - 7)
    return {
        "empty": b"",
        "one byte": data[:1],
        "text": b"this is no video\n" * 200,
        "web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "storage error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "play list": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "concat script": b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        "compressed": gzip.compress(data, mtime=0),
        "zeros": bytes(len(data)),
        "other video": other,
    }


def bytes_inputs(source: str, mode: str) -> Iterable[Input]:
    """Damaged videos; `json` is right for the video as it was, or not there."""
    data, info = clip(source)
    suffix = SOURCES[source][0]
    text = None
    if mode != "foreign":
        text = json.dumps({key: value for key, value in info.items() if key not in _LACKING[mode]}).encode()
    for kind in KINDS:
        for seed in SEEDS:
            name = f"{kind.replace(' ', '-')}-{seed:03d}"
            yield Input(name, kind, damage(data, suffix, kind, seed), suffix[1:], text)
    for what, content in not_video(source).items():
        kind = "other video" if what == "other video" else "no video"
        yield Input(what.replace(" ", "-"), kind, content, suffix[1:], text)
    for ext in ("mp4", "mkv", "webm", "avi", "ts", "mov"):
        if ext != suffix[1:]:
            yield Input(f"named-{ext}", "wrong extension", data, ext, text)


def json_inputs(source: str) -> Iterable[Input]:
    """Sound videos whose metadata is wrong."""
    data, info = clip(source)
    other = clip(source, FRAMES - 7)[1]
    times = info.get("timestamps") or [i / info["fps"] for i in range(FRAMES)]
    changes: dict[str, dict[str, Any]] = {
        **{f"num-frames-{n}": {"num_frames": n} for n in (FRAMES - 1, FRAMES + 1, 1, 2 * FRAMES, 0, -3, 10**9)},
        "num-frames-endless": {"num_frames": 10**400},
        "num-frames-text": {"num_frames": str(FRAMES)},
        "num-frames-nan": {"num_frames": float("nan")},
        "num-frames-missing": {"num_frames": None},
        **{f"fps-{n}": {"fps": n} for n in (0, -24, 10**30, float("inf"), float("nan"), "24")},
        "fps-doubled": {"fps": 2 * info["fps"]},
        "fps-halved": {"fps": info["fps"] / 2},
        "keys-none": {"key_frames": []},
        "keys-shifted": {"key_frames": [key + 1 for key in info["key_frames"]]},
        "keys-all": {"key_frames": list(range(FRAMES))},
        "keys-beyond": {"key_frames": [0, 10**6]},
        "keys-falling": {"key_frames": [9, 3]},
        "times-short": {"timestamps": times[:-1]},
        "times-falling": {"timestamps": times[::-1]},
        "times-stretched": {"timestamps": [2 * time for time in times]},
        "times-one-off": {"timestamps": [*times[:9], times[9] + 0.9 * (times[10] - times[9]), *times[10:]]},
        "times-huge": {"timestamps": [time * 1e300 for time in times]},
        "size-other": {"width": 1 << 15, "height": 1},
        "rotation-other": {"rotation": 90},
        "codec-other": {"codec": "theora"},
    }
    for name, change in changes.items():
        yield Input(name, "wrong metadata", data, SOURCES[source][0][1:], json.dumps({**info, **change}).encode())
    whole = json.dumps(info).encode()
    raw = {
        "other-video": json.dumps(other).encode(),
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "list": b"[1, 2]",
        "binary": bytes(range(256)),
        "nested": b"[" * 100_000,
        "digits": b'{"num_frames": ' + b"9" * 10_000 + b"}",
    }
    for name, content in raw.items():
        yield Input(f"json-{name}", "wrong metadata", data, SOURCES[source][0][1:], content)


def with_neighbours(inputs: Iterable[Input], source: str, mode: str) -> list[Input]:
    """The inputs with a sound sample after every four of them."""
    data, info = clip(source)
    text = None if mode == "foreign" else json.dumps(info).encode()
    mixed: list[Input] = []
    for number, one in enumerate(inputs):
        mixed.append(one)
        if number % 4 == 3:
            mixed.append(Input(f"sound-{number:04d}", SOUND, data, SOURCES[source][0][1:], text))
    mixed.append(Input("sound-last", SOUND, data, SOURCES[source][0][1:], text))
    return mixed
