"""The loop over batches: one epoch after another, on every rank in step, resumable at any batch."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NoReturn

import torch

from .batches import BatchMaker, Delivery, Failure, RankBatches, pinned
from .cuda_lanes import Lanes
from .deaths import Coroner
from .decode import GPU_BACKENDS, load_reader
from .errors import ConfigError, StateError
from .health import Health, NoSpareError
from .prefetch import ReadAhead
from .shard_prefetch import ShardPrefetch
from .state import Progress, from_state, to_state
from .trainer_side import READ_AHEAD, TrainerSide
from .workers import WorkerCounts, WorkerPool


class _Loop(Iterator[dict[str, Any]]):
    """One `for batch in loader`. Dropping or closing it ends its threads at once."""

    def __init__(self, batches: Generator[dict[str, Any], None, None]) -> None:
        self._batches, self._superseded = batches, False

    def __next__(self) -> dict[str, Any]:
        if self._superseded:  # to end in silence would pass for the end of the epoch
            raise StateError(
                "This loop over the loader was ended by another one that began over the same loader, and a loader runs "
                "one loop at a time; to look at a batch in the middle of a loop take the one that the loop gave, or "
                "build a second loader for it."
            )
        return next(self._batches)

    def close(self) -> None:
        """End here; what runs at this moment, as where a signal handler closes the loader, is let run."""
        if inspect.getgeneratorstate(self._batches) != inspect.GEN_RUNNING:
            self._batches.close()

    def supersede(self) -> None:
        """End because another loop begins. One that is over already stays over."""
        self._superseded = self._superseded or inspect.getgeneratorstate(self._batches) != inspect.GEN_CLOSED
        self.close()


class ClipLoader:
    """Batches of clips, epoch after epoch. Built by `build_loader`.

    Each `for batch in loader` is one epoch, the next one each time, also after a loop that was left early. Only
    after `load_state_dict` the next loop continues the epoch of the state where it stood; a state that was saved
    after an epoch's last batch gives an empty remainder, and the loop after it is the next epoch. One loop runs
    at a time: starting another ends the first, which raises a StateError when it is asked for its next batch.

    What comes at which place depends on data, settings and seed alone, never on the number of workers; with the
    same global batch (`batch_size` times ranks) a run may also continue on another number of ranks.

    The loader shards by rank itself and must not be sharded again. It is on purpose no `torch.utils.data
    .DataLoader` and shows no `dataset` or `sampler`, so that `Accelerator.prepare(loader)` hands it through as it is.
    For the HF Trainer and Lightning see `framestream.pipeline.frameworks`.
    """

    def __init__(
        self,
        maker: BatchMaker,
        rows: RankBatches,
        health: Health,
        *,
        device: torch.device,
        attention_backend: str,
        num_workers: int,
        prefetch_factor: int,
        start_method: str | None,
        pin_memory: bool,
        decode_threads: int,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self._maker, self._rows, self._health = maker, rows, health
        self._device, self._attention_backend = device, attention_backend
        self._num_workers, self._prefetch_factor, self._start_method = num_workers, prefetch_factor, start_method
        self._pin = pin_memory
        self._lanes = Lanes(self._lane_device())
        self._trainer_side = TrainerSide(maker, decode_threads, self._lanes, rows.most_rows, pin_memory)
        self._fingerprint = dict(fingerprint)
        self._progress = Progress(0, 0)
        source = maker.source
        self._prefetch = [ShardPrefetch(*both) for both in zip(source.shards, source.order.orders, strict=True)]
        self._fresh = True  # the next loop takes up `_progress` instead of beginning the next epoch
        # Weak, so that leaving the loop ends it at once, and with it its thread.
        self._running: weakref.ref[_Loop] | None = None
        self._counts = WorkerCounts()
        self._filled = 0.0  # fill rates of packed batches, summed up
        self._pool: list[WorkerPool] = []  # one, once a loop with workers has begun
        self._pool_owner = os.getpid()
        weakref.finalize(self, _stop_workers, self._pool, os.getpid())

    @property
    def epoch(self) -> int:
        """The epoch of the latest loop, from 0."""
        return self._progress.epoch

    @property
    def rank(self) -> int:
        """Which rank's rows this is."""
        return self._rows.rank

    @property
    def world_size(self) -> int:
        """Ranks that share a global batch."""
        return self._rows.world_size

    @property
    def decode_on(self) -> str:
        """Where videos are decoded: "workers" or "trainer"."""
        return "workers" if self._maker.decode else "trainer"

    @property
    def decode_threads(self) -> int:
        """Threads of the training process that decode; 0 where workers do."""
        return 0 if self._maker.decode else self._trainer_side.threads

    @property
    def decoder(self) -> str:
        """The decoding backend in use."""
        return self._maker.source.transform.decoder

    def __len__(self) -> int:
        """Batches of a full epoch on each rank."""
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if (before := self._loop()) is not None:
            before.supersede()
        if not self._fresh:
            self._progress = Progress(self._progress.epoch + 1, 0)
        self._fresh = False
        loop = _Loop(self._epoch_batches(self._progress))
        self._running = weakref.ref(loop)
        return loop

    def __getitem__(self, index: Any) -> NoReturn:
        """Say what to do instead; a DataLoader asks for samples by number."""
        raise ConfigError(
            "A ClipLoader has no samples by number and goes into no DataLoader, because it batches, shards and has "
            "workers itself: iterate over the loader, see framestream.pipeline.frameworks for the HF Trainer and "
            "Lightning, or give a ClipDataset to the DataLoader."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, JSON-serialisable: `{version, seed, epoch, consumed, fingerprint}`.

        `consumed` counts the samples of the epoch in all batches handed out so far, over all ranks. The state is
        the same on every rank; saving that of rank 0 is enough.
        """
        return to_state(self._progress, self._maker.source.order.seed, self._fingerprint)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Continue where a state was saved: the next loop gives what was left of its epoch.

        Args:
            state: what `state_dict` returned, also after a round trip through JSON.
            strict: False accepts a state of other data, seed or settings. The position is taken over as it is,
                and what follows is this loader's own order.

        Raises:
            StateError: it is no state, of another version, or belongs to something else; says which part.
        """
        order = self._maker.source.order
        progress = from_state(state, order.seed, self._fingerprint, len(order), strict=strict)
        self._leave()
        self._progress, self._fresh = progress, True

    def stats(self) -> dict[str, float]:
        """Return counters of this rank since the loader was built, flat.

        `samples`, `batches`, `samples_per_s`. Mean milliseconds per sample: `read_ms`, `decode_ms`, `transform_ms`,
        `collate_ms` (where the work is done, summed over parallel workers) and `transfer_ms` (taking finished batches
        from the workers). `wait_share`, the share of time that the consumer waited for a batch: is training starved?
        `worker_busy_share`, of the same time, that workers were at work. `worker_restarts`, workers that died or
        overran their time and were replaced. `cache_hits` and `cache_misses`, samples of remote shards that were at
        hand when they were needed, and that had to wait for a download. `rejects`, `reject_share`, `spares`,
        `lost_samples`, those of the data as a whole that its shards should hold by their index and do not,
        `without_meta`, samples whose JSON was missing or damaged, and `cpu_fallbacks`, samples that the GPU's decoder
        could not decode and the CPU's did. In a mixture `samples/NAME` for each dataset. With `pack_to`, `fill_rate`:
        the mean over batches.
        """
        total = self._health.seconds * max(self._num_workers, 1)
        return {
            **self._health.stats(),
            "transfer_ms": self._counts.transfer_s * 1e3 / max(self._health.samples, 1),
            "worker_busy_share": min(1.0, self._counts.busy_s / total) if total else 0.0,
            "worker_restarts": self._counts.restarts,
            **({"fill_rate": self._filled / max(self._health.batches, 1)} if self._maker.collate.pack_to else {}),
        }

    def close(self) -> None:
        """Stop worker processes and threads. The loader stays usable and starts new ones when it needs them."""
        self._leave()
        _stop_workers(self._pool, self._pool_owner)
        for prefetch in self._prefetch:
            prefetch.close()

    def _lane_device(self) -> torch.device | None:
        """Where threads of this process work on CUDA streams of their own; None where they do not."""
        if self._maker.decode:
            return None
        if self._device.type == "cuda":
            return self._device
        on_gpu = self.decoder in GPU_BACKENDS  # by name, for a model that is elsewhere
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    def _loop(self) -> _Loop | None:
        return None if self._running is None else self._running()

    def _leave(self) -> None:
        if (loop := self._loop()) is not None:
            loop.close()

    def _epoch_batches(self, progress: Progress) -> Generator[dict[str, Any], None, None]:
        self._rows.epoch, self._rows.start = progress
        ends = self._rows.ends()
        deliveries = self._deliveries()
        try:
            while True:
                self._health.waiting()
                delivery = next(deliveries, None)
                if delivery is None:
                    return
                if isinstance(delivery, Failure):
                    if isinstance(delivery.error, NoSpareError):
                        self._health.reject(delivery.error.rejects)
                    raise delivery.error
                batch = self._checked(delivery)
                self._health.served()
                self._progress = Progress(progress.epoch, next(ends))
                self._reach(self._progress)
                yield batch
        finally:
            self._health.left()
            deliveries.close()

    def _deliveries(self) -> Generator[Delivery | Failure, None, None]:
        for backend in (self.decoder, self._maker.source.transform.fallback):
            if backend is not None:
                load_reader(backend)
        made = self._made()
        self._reach(Progress(self._rows.epoch, self._rows.start))
        if not self._maker.decode:
            yield from self._trainer_side.deliveries(made)
        elif not self._pin:
            yield from made
        elif not self._num_workers:
            yield from map(pinned, made)
        else:  # copying to page-locked memory goes on beside the training step
            ahead = ReadAhead(self._copied(made), READ_AHEAD)
            try:
                yield from ahead
            finally:
                ahead.close()

    def _made(self) -> Iterator[Any]:
        """What the workers make of the rows, or this process where there are none: a `Delivery` or a `Failure`, or a
        `Planned` batch that is to be decoded here."""
        if not self._num_workers:
            return map(self._maker, self._rows)
        if self._pool_owner != os.getpid():  # a fork has the sockets of its parent's workers, and must not use them
            self._pool.clear()
            self._pool_owner = os.getpid()
        if not self._pool:
            self._pool.append(
                WorkerPool(
                    self._maker,
                    self._num_workers,
                    prefetch=self._prefetch_factor,
                    context=self._start_method,
                    on_death=Coroner(self._maker.source.limit_s, self._num_workers),
                    counts=self._counts,
                )
            )
        return self._pool[0].run(self._rows)

    def _copied(self, made: Iterator[Delivery | Failure]) -> Iterator[Delivery | Failure]:
        """Runs in a thread of this process."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is each thread's own
        yield from map(pinned, made)

    def _reach(self, progress: Progress) -> None:
        """Have the shards fetched that come next."""
        reached = self._maker.source.order.reached(*progress)
        for prefetch, place in zip(self._prefetch, reached, strict=True):
            prefetch.reach(*place)

    def _checked(self, delivery: Delivery) -> dict[str, Any]:
        batch = delivery.batch
        self._health.record(delivery.reports, delivery.collate_ms)
        self._filled += batch.get("fill_rate", 0.0)
        self._lanes.hand_over(batch)
        batch["frame_mask"].prepare(self._device, self._attention_backend)
        return batch


def _stop_workers(pool: list[WorkerPool], owner: int) -> None:
    """Let a loader's worker processes go when the loader does. A forked child must not end those of its parent."""
    if os.getpid() == owner:
        while pool:
            pool.pop().close()
