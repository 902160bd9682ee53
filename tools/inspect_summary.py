"""What the metadata of a split's samples says, without a look at the videos: read one by one, kept as numbers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from framestream.pipeline.errors import SampleError, ShardError
from framestream.pipeline.probe import VideoInfo
from framestream.pipeline.raw_sample import RawSample
from framestream.pipeline.sampling import Sampling

from .inspect_splits import Split
from .inspect_text import shown

#: Numbers of each sample: what they are, and in which unit.
NUMBERS = {
    "duration": ("Duration", "seconds"),
    "gop": ("From key frame to key frame", "frames"),
    "side": ("Shorter side of the picture", "pixels"),
    "characters": ("Length of the text", "characters"),
}
#: Kinds of which each sample is one.
KINDS = {"size": "Picture size", "fps": "Frames per second", "codec": "Codec", "orientation": "Orientation"}
#: What may be said of a sample.
MARKS = {
    "no_text": "without a text",
    "no_json": "without metadata",
    "damaged_json": "with damaged metadata",
    "undescribed": "whose metadata does not describe the video",
    "unreadable": "that cannot be read",
    "variable": "with a variable frame rate",
    "rotated": "stored turned",
    "sound": "with sound",
    "short": "too short for the sampling",
}
_PLANNED = 100_000  # frames of a clip that are enough to know whether any are missing
MAX_PROBLEMS = 100  # sentences that are kept


@dataclass
class Facts:
    """What was found out about one split.

    Attributes:
        name: of the split.
        samples, shards, num_bytes: of all of it.
        read: samples that were looked at, the unreadable ones included.
        shards_read: shards that they come from.
        numbers: for each of `NUMBERS` the values of those that have one.
        kinds: for each of `KINDS` how many samples are of which.
        marks: for each of `MARKS` how many samples it is true of.
        problems: one sentence each of what was wrong with the shards, the first ones.
        num_problems: how many there were.
    """

    name: str
    samples: int
    shards: int
    num_bytes: int
    read: int = 0
    shards_read: int = 0
    numbers: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in NUMBERS})
    kinds: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in KINDS})
    marks: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    @property
    def described(self) -> int:
        """Samples whose metadata describes their video."""
        return len(self.numbers["duration"])

    @property
    def seconds(self) -> float:
        """Length of all samples; from the mean of those that were looked at where that is not all of them."""
        return sum(self.numbers["duration"]) / max(1, self.described) * self.samples

    @property
    def whole(self) -> bool:
        """Whether every sample was looked at."""
        return self.read == self.samples

    def told(self, problem: str) -> None:
        """Remember what was wrong."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(shown(problem))


def read_facts(
    split: Split, places: Sequence[tuple[int, int]], sampling: Sampling, advance: Callable[[], None]
) -> Facts:
    """Read JSON and text of the samples at `places` (shard, sample), and call `advance` after each."""
    shards = split.shards
    facts = Facts(split.name, len(shards), len(shards.names), split.num_bytes)
    for problem in shards.problems:
        facts.told(problem)
    facts.shards_read = len({shard for shard, _ in places})
    bad: set[int] = set()  # shards that cannot be read; each is told of once
    for shard, number in places:
        facts.read += 1
        sample = None
        if shard not in bad:
            try:
                sample = shards.read(shard, number, want=("json", "txt"))
            except (ShardError, SampleError) as err:
                facts.told(str(err))
                if isinstance(err, ShardError):
                    bad.add(shard)
        if sample is None:
            facts.marks["unreadable"] += 1
        else:
            _add(facts, sample, sampling)
        advance()
    return facts


def _add(facts: Facts, sample: RawSample, sampling: Sampling) -> None:
    text = sample.text
    if text:
        facts.numbers["characters"].append(len(text))
    else:
        facts.marks["no_text"] += 1
    if sample.meta_error:
        facts.marks["no_json" if "json" not in sample.members else "damaged_json"] += 1
        return
    try:
        info = VideoInfo.from_json({name: value for name, value in sample.meta.items() if name != "packets"})
    except SampleError:
        facts.marks["undescribed"] += 1
        return
    facts.numbers["duration"].append(info.duration)
    facts.numbers["side"].append(min(info.width, info.height))
    if info.key_frames:
        facts.numbers["gop"].append(info.num_frames / len(info.key_frames))
    facts.kinds["size"][f"{info.width} × {info.height}"] += 1
    facts.kinds["codec"][shown(info.codec, 40) or "not said"] += 1
    facts.kinds["orientation"][_orientation(info)] += 1
    facts.kinds["fps"]["variable" if info.timestamps is not None else f"{round(info.fps, 2):g}"] += 1
    facts.marks["variable"] += info.timestamps is not None
    facts.marks["rotated"] += bool(info.rotation)
    facts.marks["sound"] += info.has_audio
    facts.marks["short"] += _lacks_frames(sampling, info)


def _orientation(info: VideoInfo) -> str:
    if info.width == info.height:
        return "square"
    return "wide" if info.width > info.height else "upright"


def _lacks_frames(sampling: Sampling, info: VideoInfo) -> bool:
    """Whether a plan of this clip would have to be filled up. A longer past never takes frames away."""
    frames = min(info.num_frames, _PLANNED)
    times: np.ndarray | None = None
    if sampling.fps is not None:
        times = np.arange(frames) / info.fps if info.timestamps is None else np.asarray(info.timestamps[-frames:])
    extra: dict[str, Any] = {}
    if getattr(sampling, "slow_snap", None) is not None:
        extra["key_frames"] = info.key_frames
    return not sampling.plan(frames, timestamps=times, **extra).valid.all()
