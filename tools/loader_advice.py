"""What limits a loader, and what to change: pure functions of what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass, field

#: What a batch passes through, in order, with the names that `ClipLoader.stats` gives to its milliseconds per clip.
STAGES = {
    "read": ("read_ms",),
    "decode": ("decode_ms",),
    "transform": ("transform_ms", "collate_ms"),
    "transfer": ("transfer_ms", "device_ms"),
}


@dataclass
class Examination:
    """What a run of the loader alone has shown.

    Attributes:
        samples, seconds: clips delivered, and how long that took, without the first batches.
        ms: milliseconds per clip of each of `STAGES`.
        busy_share: of the time that all workers had, how much they were at work.
        workers, cores: worker processes; processor cores that this process may use.
        epoch_batches: batches of an epoch.
        decode_on: "workers" or "trainer".
        gpu: a CUDA device is here.
        remote: shards are fetched over a network.
        misses: share of remote clips that had to wait for a download.
        gop: frames from key frame to key frame, mean over the clips seen; 0 where unknown.
        short_side: of the videos, median in pixels; 0 where unknown.
        could_snap: the sampling has slow frames that may move to key frames, and do not.
        image_size: pixels that the model sees.
        bytes_per_clip: of a batch's tensors.
        floats: frames are delivered as floats.
        rejects: share of rejected samples.
        reasons: of the rejects, with their counts, the most frequent first.
        restarts: workers that died or hung and were replaced.
    """

    samples: int
    seconds: float
    ms: dict[str, float]
    busy_share: float = 0.0
    workers: int = 0
    cores: int = 1
    epoch_batches: int = 1000
    decode_on: str = "workers"
    gpu: bool = False
    remote: bool = False
    misses: float = 0.0
    gop: float = 0.0
    short_side: float = 0.0
    could_snap: bool = False
    image_size: int = 224
    bytes_per_clip: float = 0.0
    floats: bool = False
    rejects: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    restarts: int = 0

    @property
    def rate(self) -> float:
        """Clips per second."""
        return self.samples / self.seconds if self.seconds else 0.0


def limit_of(seen: Examination) -> str:
    """The stage that holds the others up, one of `STAGES`.

    Workers and the training process work at the same time, so the side that needs longer per clip is the limit, and
    on it the stage that takes most. Without workers one process does everything.
    """
    if not seen.workers:
        return max(seen.ms, key=seen.ms.__getitem__)
    making = {name: ms for name, ms in seen.ms.items() if name != "transfer"}
    taking = {"transfer": seen.ms["transfer"]}
    if seen.decode_on == "trainer":
        taking |= {name: making.pop(name) for name in ("decode", "transform")}
    at_once = min(seen.workers, seen.cores)
    side = making if sum(making.values()) / at_once >= sum(taking.values()) else taking
    return max(side, key=side.__getitem__)


def advice(seen: Examination) -> list[str]:
    """What to change, one sentence each, the most useful first."""
    limit = limit_of(seen)
    said = {"read": _read, "decode": _decode, "transform": _transform, "transfer": _transfer}[limit](seen)
    if limit == "read" or (limit != "transfer" and (seen.decode_on == "workers" or not seen.workers)):
        said += _workers(seen)
    if seen.rejects > 0.01:
        said.append(f"{seen.rejects:.0%} of the clips are rejected and replaced, for the reasons above.")
    if seen.restarts:
        said.append(f"{seen.restarts} worker(s) died or hung and were replaced.")
    return said or ["Nothing stands out: this machine does what it can."]


def _read(seen: Examination) -> list[str]:
    if seen.remote and seen.misses > 0.02:
        return [
            f"{seen.misses:.0%} of the clips waited for a download: the network brings less than is read. Shards with "
            "smaller videos (framestream shard --short-side) need less; a data.cache_gb that holds the whole set "
            "downloads it only once."
        ]
    return ["Reading takes longest: copy the shards to a local disk, or write them anew with a smaller --short-side."]


def _decode(seen: Examination) -> list[str]:
    said = []
    if seen.gop > 32:
        said.append(
            f"The videos have a key frame every {seen.gop:.0f} frames, and from it on all frames up to a wanted one "
            "have to be decoded: write the shards anew with `framestream shard --gop 16`."
        )
    if seen.short_side >= 1.5 * seen.image_size:
        said.append(
            f"The videos are {seen.short_side:.0f} pixels on their short side and the model sees {seen.image_size}: "
            f"write the shards anew with `framestream shard --short-side {seen.image_size}`."
        )
    if seen.could_snap:
        said.append(
            "If slow frames may stand at the nearest key frame instead, they decode alone: `slow_snap: keyframe` in "
            "data.sampling."
        )
    if seen.gpu and seen.decode_on == "workers":
        said.append("A GPU is here: `framestream doctor` says which GPU decoder could be used, and what it needs.")
    return said


def _transform(seen: Examination) -> list[str]:
    return ["Transforming the frames takes longest: do less there (data.augment, or a smaller data.image_size)."]


def _transfer(seen: Examination) -> list[str]:
    said = []
    if seen.floats:
        said.append(
            "Frames travel as floats: leave `normalize` out and normalise on the device, a quarter of the bytes."
        )
    said.append(
        f"Handing batches over takes longest ({seen.bytes_per_clip / 1e6:.1f} MB a clip): take fewer frames, or a "
        "smaller data.image_size."
    )
    return said


def _workers(seen: Examination) -> list[str]:
    if seen.epoch_batches < 4 * seen.workers:
        return [
            f"An epoch has {seen.epoch_batches} batch(es), too few to keep {seen.workers} worker(s) busy, "
            "which have nothing ahead where one ends: a smaller data.batch_size, or more clips."
        ]
    if seen.workers < seen.cores:
        return [f"{seen.workers or 'no'} worker(s) on {seen.cores} cores: try --data.workers {seen.cores}."]
    if seen.workers > seen.cores:
        return [f"{seen.workers} workers share {seen.cores} cores: more of them will not help."]
    if seen.busy_share > 0.8:
        return [f"All {seen.cores} cores are at work: from here on only less work or more cores help."]
    return []
