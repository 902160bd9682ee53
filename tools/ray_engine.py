"""Sharding on a Ray cluster (https://docs.ray.io): a task per shard, and a task per stretch of sources to be probed.

A task is a process on some node; inside it the same code runs as on one machine, so the bytes are the same, and a
decoder that crashes costs its clip. Ray runs a task again whose node or process was lost. Nothing but the output has to
be reachable from the nodes: what a task needs of the plan travels with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from framestream.pipeline.errors import ConfigError, FramestreamError, ShardError, StorageError

from .engines import LocalEngine, NumberedProbe
from .output import Output
from .pool import Failure
from .probing import Probed
from .units import Outcome, Step, Unit

PROBES_PER_TASK = 64
RETRIES = 3  # of a task whose process or node was lost
AHEAD = 2  # tasks per CPU that are given out at a time


class RayEngine:
    """Gives tasks to a Ray cluster, a bounded number at a time.

    Args:
        workers: tasks at a time; 0 for as many as the cluster has CPUs.
        timeout_s: for one clip.
        address: of the cluster, as `ray.init` takes it; None for $RAY_ADDRESS, a cluster running here, or a new
            one of this machine only. "local" always begins a new one.
        reject_unfetched: see `open_engine`.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, workers: int, timeout_s: float, address: str | None, reject_unfetched: bool) -> None:
        try:
            import ray
        except ImportError as err:
            raise ConfigError("the engine ray needs Ray: `pip install 'framestream[ray]'`") from err
        self._ray: Any = ray
        self._workers, self._address = workers, address
        self._node = LocalEngine(1, timeout_s, reject_unfetched)  # what a task runs, wherever it runs
        self._connected = False

    def close(self) -> None:
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def _connect(self) -> None:
        """Once, when the first task is at hand. A connection of the caller's own is used, and left to him.

        Raises:
            ConfigError: the cluster cannot be reached.
        """
        if self._ray.is_initialized():
            return
        cpus = {"num_cpus": self._workers} if self._workers and self._address == "local" else {}
        try:
            self._ray.init(
                address=self._address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                **cpus,
            )
        except (ConnectionError, RuntimeError, ValueError) as err:
            raise ConfigError(f"the Ray cluster {self._address or ''} cannot be reached ({err})") from err
        self._connected = True

    def probe(self, probes: Iterable[NumberedProbe]) -> Iterator[tuple[int, Probed | Failure]]:
        for chunk, outcomes in self._run(_probe, _chunks(probes, PROBES_PER_TASK), self._node):
            if isinstance(outcomes, FramestreamError):  # of the cluster, and no fault of the sources
                yield from ((probe.number, Failure(str(outcomes), storage=True)) for probe in chunk)
            else:
                yield from outcomes

    def write(self, units: Iterable[Unit], output: Output) -> Iterator[Step]:
        for unit, outcome in self._run(_write, units, self._node, output):
            if isinstance(outcome, FramestreamError):
                yield Step(len(unit.tasks), unfetched=str(outcome))
            else:
                yield Step(len(unit.tasks), len(outcome.lost), outcome)

    def _run(self, function: Callable[..., Any], items: Iterable[Any], *rest: Any) -> Iterator[tuple[Any, Any]]:
        """(item, result or error) as tasks end; impossible requests and interrupts are raised."""
        ray = self._ray
        self._connect()
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        at_a_time = self._workers or AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        source = iter(items)
        running: dict[Any, Any] = {}
        try:
            while True:
                for item in islice(source, at_a_time - len(running)):
                    running[remote.remote(item, *rest)] = item
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    item = running.pop(reference)
                    yield item, self._result(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as err:
            cause = err.cause
            if isinstance(cause, (ConfigError, KeyboardInterrupt)):
                raise cause from None
            return cause if isinstance(cause, FramestreamError) else ShardError(f"{type(cause).__name__}: {cause}")
        except self._ray.exceptions.RayError as err:
            lines = str(err).strip().splitlines()
            return ShardError(f"its process was lost {RETRIES + 1} times: {lines[0] if lines else type(err).__name__}")


def _chunks(items: Iterable[NumberedProbe], size: int) -> Iterator[list[NumberedProbe]]:
    source = iter(items)
    for first in source:
        yield list(chain([first], islice(source, size - 1)))


def _probe(chunk: list[NumberedProbe], node: LocalEngine) -> list[tuple[int, Probed | Failure]]:
    return list(node.probe(chunk))


def _write(unit: Unit, node: LocalEngine, output: Output) -> Outcome:
    *_, last = node.write([unit], output)
    if last.outcome is None:
        raise StorageError(last.unfetched)
    return last.outcome
