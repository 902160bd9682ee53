"""The small decisions about inputs and clips: what is filtered, what is held out, which shard a clip goes to. Pure."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

from framestream.pipeline.probe import VideoInfo

from .clips import Clip
from .inputs import Source
from .shard_options import Filters

_SLACK = 1e-5  # of a limit: rates and times are quotients, and 29.97 is meant to include 30000/1001


class Filtered(NamedTuple):
    """Why an input is not wanted: the name of the option, to count by, and a sentence."""

    rule: str
    reason: str


def filtered(info: VideoInfo, source: Source, filters: Filters) -> Filtered | None:
    """The first filter that leaves an input out, None where it is wanted."""
    end = info.duration if source.end is None else min(source.end, info.duration)
    facts = (
        ("seconds", end - (source.start or 0.0), "s"),
        ("side", min(info.width, info.height), "pixels of the shorter side"),
        ("fps", info.fps, "frames per second"),
    )
    for what, value, unit in facts:
        low, high = getattr(filters, f"min_{what}"), getattr(filters, f"max_{what}")
        if low is not None and value < low * (1.0 - _SLACK):
            return Filtered(f"min_{what}", f"its {value:.6g} {unit} are fewer than min_{what} {low:.6g}")
        if high is not None and value > high * (1.0 + _SLACK):
            return Filtered(f"max_{what}", f"its {value:.6g} {unit} are more than max_{what} {high:.6g}")
    return None


def held_out(source_name: str, share: float) -> bool:
    """Whether a video is held out, by a hash of its name alone, the one by which it came first: other videos never
    move it, and a larger share holds out the same videos and more."""
    digest = hashlib.sha256(source_name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def clip_bytes(clip: Clip, info: VideoInfo, size: int) -> int:
    """What a clip counts for `bytes_per_shard`: its share of the source's `size`, by its seconds."""
    if clip.frames is None or info.duration <= 0.0:
        return size
    return math.ceil(size * min(1.0, (clip.end - clip.start) / info.duration))


class ShardFilling:
    """Which shard each of the consecutive clips of one split goes to.

    A new shard begins behind `samples_per_shard` clips, and before a clip with which the shard would exceed
    `bytes_per_shard`; a clip that is larger than that has a shard of its own.
    """

    def __init__(self, samples_per_shard: int, bytes_per_shard: int | None) -> None:
        self.samples_per_shard, self.bytes_per_shard = samples_per_shard, bytes_per_shard
        self.shard, self.num_clips, self.num_bytes = 0, 0, 0

    def place(self, num_bytes: int) -> int:
        """The shard, from 0, of the next clip."""
        too_many = self.num_clips == self.samples_per_shard
        too_large = self.bytes_per_shard is not None and self.num_bytes + num_bytes > self.bytes_per_shard
        if too_many or (too_large and self.num_clips):
            self.shard, self.num_clips, self.num_bytes = self.shard + 1, 0, 0
        self.num_clips += 1
        self.num_bytes += num_bytes
        return self.shard
