"""What a loader delivered, what it had to leave out, and where the time went."""

from __future__ import annotations

import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TypedDict

from .errors import ConfigError, RejectLimitError, ShardError
from .shard_listing import ListedShard

#: The reject limit is not applied before this many samples were tried: a share of a few means nothing.
SAMPLES_BEFORE_LIMIT = 100

#: Rejected samples that are remembered as written down already; memory must not grow with the dataset.
MAX_REMEMBERED = 10_000

STAGES = ("read_ms", "decode_ms", "transform_ms")


class Reject(TypedDict):
    """A sample that could not be used."""

    shard: str
    key: str
    reason: str


@dataclass
class ClipReport:
    """What happened on the way to a clip; for statistics, not part of a batch.

    Attributes:
        timing: milliseconds by stage, see `STAGES`.
        without_meta: the sample's JSON is missing or damaged.
        cached: whether a remote shard was at hand when the sample was read; None for local ones.
        rejects: samples that failed in its place.
        padding: a repeated sample on a rank that has no row of its own.
        dataset: its dataset's name, in a mixture.
        fallback: why another decoder than the one chosen has decoded it, "" where that was not so.
    """

    timing: dict[str, float]
    without_meta: bool = False
    cached: bool | None = None
    rejects: list[Reject] = field(default_factory=list)
    padding: bool = False
    dataset: str | None = None
    fallback: str = ""


class NoSpareError(RejectLimitError):
    """A sample and every spare that was tried in its place failed; `rejects` lists them."""

    def __init__(self, message: str, rejects: Sequence[Reject] = ()) -> None:
        super().__init__(message)
        self.rejects = list(rejects)


class Health:
    """Counters of one loader on one rank, and its limit of rejects.

    Args:
        max_reject_share: rejected samples over all samples tried, 0 to 1, above which the run stops.
        rejects_path: a JSON Lines file to which each rejected sample is appended, once unless there are very many.

    Raises:
        ConfigError: the share is not within 0..1.
    """

    def __init__(self, max_reject_share: float, rejects_path: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(max_reject_share, (int, float)) or not 0 <= max_reject_share <= 1:
            raise ConfigError(f"max_reject_share is {max_reject_share!r}; it must be a share from 0 to 1.")
        self.max_reject_share = max_reject_share
        self.rejects_path = None if rejects_path is None else Path(rejects_path)
        self.samples = self.batches = self.rejects = self.spares = self.without_meta = self.fallbacks = 0
        self.lost = 0  # samples that shards no longer hold, over all ranks
        self.waited = self.used = 0.0  # seconds: the consumer in the loader, the consumer elsewhere
        self.cache_hits = self.cache_misses = 0
        self.datasets: Counter[str] = Counter()
        self.collate_ms = 0.0
        self._stages = dict.fromkeys(STAGES, 0.0)
        self._written: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._left: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds that the consumer spent in loops over the loader."""
        return self.waited + self.used

    def waiting(self) -> None:
        """The consumer asks for a batch."""
        now = perf_counter()
        if self._left is not None:
            self.used += now - self._left
        self._left = now

    def served(self) -> None:
        """The consumer gets its batch."""
        now = perf_counter()
        if self._left is not None:
            self.waited += now - self._left
        self._left = now

    def left(self) -> None:
        """The consumer has left the loop; what it does now is not measured."""
        self._left = None

    def record(self, reports: Iterable[ClipReport], collate_ms: float = 0.0) -> None:
        """Count a delivered batch.

        Raises:
            RejectLimitError: more than `max_reject_share` of at least 100 samples were rejected.
        """
        self.batches += 1
        self.collate_ms += collate_ms
        rejects: list[Reject] = []
        for report in reports:
            if report.padding:
                continue
            self.samples += 1
            self.spares += bool(report.rejects)
            self.without_meta += report.without_meta
            self.fallbacks += bool(report.fallback)
            self.cache_hits += report.cached is True
            self.cache_misses += report.cached is False
            if report.dataset is not None:
                self.datasets[report.dataset] += 1
            rejects += report.rejects
            for stage in STAGES:
                self._stages[stage] += report.timing[stage]
        self.reject(rejects)

    def reject(self, rejects: Sequence[Reject]) -> None:
        """Count and write down rejected samples; raises as `record`."""
        if not rejects:
            return
        self.rejects += len(rejects)
        self._append(rejects)
        tried = self.samples + self.rejects
        if tried >= SAMPLES_BEFORE_LIMIT and self.rejects > self.max_reject_share * tried:
            last = rejects[-1]
            raise RejectLimitError(
                f"{self.rejects} of {tried} samples were rejected, more than max_reject_share="
                f"{self.max_reject_share:g} allows; the last was {last['key']} in {last['shard']}: {last['reason']}"
            )

    def lose(self, shards: Sequence[ListedShard], found: int, *, write: bool = True) -> None:
        """Count the samples that shards should hold by their index and do not; known when they are opened.

        Args:
            shards: those that lack samples.
            found: samples of the whole set.
            write: write one line per shard into `rejects_path`; for one of the ranks.

        Raises:
            ShardError: they are more than `max_reject_share` of the samples that should be there.
        """
        if not shards:
            return
        self.lost = sum(shard.lost for shard in shards)
        if write:
            self._append(
                [
                    {
                        "shard": shard.path,
                        "key": "",
                        "reason": f"{shard.lost} of its {shard.expected} samples are lost: {shard.why}",
                    }
                    for shard in shards
                ]
            )
        expected = found + self.lost
        if self.lost > self.max_reject_share * expected:
            worst = max(shards, key=lambda shard: shard.lost)
            raise ShardError(
                f"{self.lost} of {expected} samples are lost, more than max_reject_share={self.max_reject_share:g} "
                f"allows; {worst.path} holds {worst.num_samples} of the {worst.expected} samples that its index lists "
                f"({worst.why}). `framestream verify` on its folder says more; copy or write it again, or accept what "
                "is there with a higher max_reject_share."
            )

    def stats(self) -> dict[str, float]:
        """Return the counters as a flat dict; times are per sample, since the loader was built."""
        tried = self.samples + self.rejects
        total = self.seconds
        return {
            "samples": self.samples,
            "batches": self.batches,
            "samples_per_s": self.samples / total if total else 0.0,
            **{stage: self._stages[stage] / max(self.samples, 1) for stage in STAGES},
            "collate_ms": self.collate_ms / max(self.samples, 1),
            "wait_share": self.waited / total if total else 0.0,
            "cache_hits": self.cache_hits,
            "cache_misses": self.cache_misses,
            "rejects": self.rejects,
            "reject_share": self.rejects / tried if tried else 0.0,
            "spares": self.spares,
            "lost_samples": self.lost,
            "without_meta": self.without_meta,
            "cpu_fallbacks": self.fallbacks,
            **{f"samples/{name}": count for name, count in self.datasets.items()},
        }

    def _append(self, rejects: Sequence[Reject]) -> None:
        if self.rejects_path is None:
            return
        lines = []
        for reject in rejects:
            sample = (reject["shard"], reject["key"])
            if sample not in self._written:
                self._written[sample] = None
                if len(self._written) > MAX_REMEMBERED:
                    self._written.popitem(last=False)
                lines.append(json.dumps(reject) + "\n")
        if lines:
            self.rejects_path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode, so that the lines of several ranks do not mix.
            with open(self.rejects_path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
