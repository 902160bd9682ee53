"""Who does the work of a sharding run: processes of this machine, or (ray_engine.py) a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from framestream.pipeline.errors import ConfigError

from .cores import usable_cores
from .making import ClipTask, MadeClip, make_clip
from .output import Output
from .pool import Failure, WorkerPool
from .probing import Probed, ProbeTask, probe_source
from .units import Step, Unit, write_units

EngineName = Literal["local", "ray"]
PROBE_TIMEOUT_S = 600.0  # for one source at least: all of its bytes are read, and fetched where it is remote
DECODED_BYTES_S = 250_000.0  # so many take a second at the slowest where all frames are decoded
ADVICE = "; --timeout-seconds gives it more"  # what to do about a source or clip that takes too long
ENCODED_S = 5.0  # for each second of a clip, on top of the limit
DECODED_S = 6 * 3600.0  # for all frames of a source of unknown size


@dataclass(frozen=True)
class NumberedProbe:
    """A source to be probed, and its number in the plan."""

    number: int
    task: ProbeTask


class Engine(Protocol):
    """Runs both phases; results come in any order but those of one unit. `close` ends it."""

    def probe(self, probes: Iterable[NumberedProbe]) -> Iterator[tuple[int, Probed | Failure]]:
        """Number and outcome of each probe."""

    def write(self, units: Iterable[Unit], output: Output) -> Iterator[Step]:
        """Make units; see `write_units`."""

    def close(self) -> None:
        """Give back what the engine holds; it may be used again."""


def open_engine(
    name: EngineName,
    *,
    workers: int,
    timeout_s: float,
    ray_address: str | None = None,
    reject_unfetched: bool = False,
) -> Engine:
    """The engine of that name.

    Args:
        workers: processes of this machine; 0 takes one per CPU core. On Ray: tasks at a time; 0 takes what there is.
        timeout_s: for one clip.
        reject_unfetched: clips whose source cannot be fetched are lost; otherwise their shard is left for later.

    Raises:
        ConfigError: the name is unknown, a number is impossible, or Ray is not installed or not to be reached.
    """
    if workers < 0 or timeout_s <= 0:
        raise ConfigError(f"workers and timeout have to be positive, got {workers} and {timeout_s:g}")
    if name == "local":
        return LocalEngine(workers or usable_cores(), timeout_s, reject_unfetched, keep=True)
    if name == "ray":
        from .ray_engine import RayEngine

        return RayEngine(workers, timeout_s, ray_address, reject_unfetched)
    raise ConfigError(f"engine is {name!r}, it has to be local or ray")


@dataclass
class LocalEngine:
    """Processes of this machine; a crash or hang costs the source or clip at which it happened.

    Attributes:
        keep: its processes serve both phases, and end with `close`; else they end with their phase. Starting one takes
            as long as looking at ten videos.
    """

    workers: int
    timeout_s: float
    reject_unfetched: bool = False
    keep: bool = False
    _kept: WorkerPool[Any, Any] | None = field(default=None, init=False, repr=False)

    def probe(self, probes: Iterable[NumberedProbe]) -> Iterator[tuple[int, Probed | Failure]]:
        with self._pool(probe_numbered, self._probe_timeout_s) as pool:
            for probe, result in pool.map(probes):
                yield probe.number, result

    def _probe_timeout_s(self, probe: NumberedProbe) -> float:
        size = probe.task.source.size
        all_frames = probe.task.decode == "all" or probe.task.scene_threshold is not None
        decoding = 0.0 if not all_frames else DECODED_S if size < 0 else size / DECODED_BYTES_S
        return max(PROBE_TIMEOUT_S, self.timeout_s) + decoding

    def _clip_timeout_s(self, task: ClipTask) -> float:
        return self.timeout_s + ENCODED_S * (task.clip.end - task.clip.start)

    def write(self, units: Iterable[Unit], output: Output) -> Iterator[Step]:
        with self._pool(make_clip, self._clip_timeout_s) as pool:
            yield from write_units(units, output, pool, reject_unfetched=self.reject_unfetched)

    @contextmanager
    def _pool(
        self, function: Callable[[Any], Any], timeout_s: float | Callable[[Any], float]
    ) -> Iterator[WorkerPool[Any, Any]]:
        pool, self._kept = self._kept, None
        if pool is None:
            pool = WorkerPool(function, workers=self.workers, timeout_s=timeout_s, weigh=_weight, advice=ADVICE)
        pool.function, pool.timeout_s = function, timeout_s
        try:
            yield pool
        except BaseException:  # tasks may be left in it
            pool.close()
            raise
        if self.keep:
            self._kept = pool
        else:
            pool.close()

    def close(self) -> None:
        """Its processes end."""
        if self._kept is not None:
            self._kept.close()
        self._kept = None


def _weight(result: Probed | MadeClip) -> int:
    return result.num_bytes() if isinstance(result, MadeClip) else 0


def probe_numbered(probe: NumberedProbe) -> Probed:
    return probe_source(probe.task)
