"""Who does the work of a sharding run: processes of this machine, or (ray_engine.py) a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from framestream.pipeline.errors import ConfigError

from .cores import usable_cores
from .output import Output
from .pool import Failure, WorkerPool
from .probing import Probed, ProbeTask, probe_source
from .units import Step, Unit, write_units

EngineName = Literal["local", "ray"]
PROBE_TIMEOUT_S = 600.0  # for one source at least: all of its bytes are read, and fetched where it is remote


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
        return LocalEngine(workers or usable_cores(), timeout_s, reject_unfetched)
    if name == "ray":
        from .ray_engine import RayEngine

        return RayEngine(workers, timeout_s, ray_address, reject_unfetched)
    raise ConfigError(f"engine is {name!r}, it has to be local or ray")


@dataclass(frozen=True)
class LocalEngine:
    """Processes of this machine; a crash or hang costs the source or clip at which it happened."""

    workers: int
    timeout_s: float
    reject_unfetched: bool = False

    def probe(self, probes: Iterable[NumberedProbe]) -> Iterator[tuple[int, Probed | Failure]]:
        with WorkerPool(probe_numbered, workers=self.workers, timeout_s=max(PROBE_TIMEOUT_S, self.timeout_s)) as pool:
            for probe, result in pool.map(probes):
                yield probe.number, result

    def write(self, units: Iterable[Unit], output: Output) -> Iterator[Step]:
        return write_units(
            units,
            output,
            workers=self.workers,
            timeout_s=self.timeout_s,
            reject_unfetched=self.reject_unfetched,
        )

    def close(self) -> None:
        """Its processes end with their step."""


def probe_numbered(probe: NumberedProbe) -> Probed:
    return probe_source(probe.task)
