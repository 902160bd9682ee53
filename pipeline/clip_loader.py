"""The loop over batches: one epoch after another, on every rank in step, resumable at any batch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from .batches import BatchMaker, Delivery, Failure, RankBatches, as_is
from .health import Health, NoSpareError
from .prefetch import ReadAhead
from .shard_prefetch import ShardPrefetch
from .state import Progress, from_state, to_state

#: Batches that the decoding thread of `decode_on="trainer"` keeps ready.
READ_AHEAD = 2


class ClipLoader:
    """Batches of clips, epoch after epoch. Built by `build_loader`.

    Each `for batch in loader` is one epoch, the next one each time, also after a loop that was left early. Only
    after `load_state_dict` the next loop continues the epoch of the state where it stood; a state that was saved
    after an epoch's last batch gives an empty remainder, and the loop after it is the next epoch. One loop runs
    at a time: starting another ends the first.

    What comes at which place depends on data, settings and seed alone, never on the number of workers; with the
    same global batch (`batch_size` times ranks) a run may also continue on another number of ranks.

    The loader shards by rank itself and must not be sharded again. It is on purpose no `torch.utils.data
    .DataLoader` and shows no `dataset` or `sampler`, so `Accelerator.prepare(loader)` and HF Trainer hand it
    through as it is: return it from `Trainer.get_train_dataloader`, set `ignore_data_skip=True`, and save its
    `state_dict()` with the checkpoint. With Lightning set `use_distributed_sampler=False`.
    """

    def __init__(
        self,
        maker: BatchMaker,
        rows: RankBatches,
        health: Health,
        *,
        device: torch.device,
        attention_backend: str,
        loading: Mapping[str, Any],
        pin_memory: bool,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self._maker, self._rows, self._health = maker, rows, health
        self._device, self._attention_backend = device, attention_backend
        self._loading, self._pin = dict(loading), pin_memory
        self._fingerprint = dict(fingerprint)
        self._progress = Progress(0, 0)
        self._prefetch = ShardPrefetch(maker.source.shards, maker.source.order)
        self._fresh = True  # the next loop takes up `_progress` instead of beginning the next epoch
        # Weak, so that leaving the loop ends it at once, and with it its thread.
        self._running: weakref.ref[Generator[dict[str, Any], None, None]] | None = None
        self._workers: list[DataLoader[Any]] = []  # one, once a loop has begun
        weakref.finalize(self, _stop_workers, self._workers, os.getpid())

    @property
    def epoch(self) -> int:
        """The epoch of the latest loop, from 0."""
        return self._progress.epoch

    @property
    def decode_on(self) -> str:
        """Where videos are decoded: "workers" or "trainer"."""
        return "workers" if self._maker.decode else "trainer"

    @property
    def decoder(self) -> str:
        """The decoding backend in use."""
        return self._maker.source.transform.decoder

    def __len__(self) -> int:
        """Batches of a full epoch on each rank."""
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._leave()
        if not self._fresh:
            self._progress = Progress(self._progress.epoch + 1, 0)
        self._fresh = False
        loop = self._epoch_batches(self._progress)
        self._running = weakref.ref(loop)
        return loop

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

        `samples`, `batches`, `samples_per_s`; mean milliseconds per sample `read_ms`, `decode_ms`,
        `transform_ms` (summed over parallel workers); `wait_share`, the share of time that the consumer waited
        for a batch; `rejects`, `reject_share`, `spares`, and `without_meta`, samples whose JSON was missing or
        damaged.
        """
        return self._health.stats()

    def close(self) -> None:
        """Stop worker processes and threads. The loader stays usable and starts new ones when it needs them."""
        self._leave()
        self._workers.clear()

    def _leave(self) -> None:
        loop = None if self._running is None else self._running()
        if loop is not None:
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
                self._prefetch.reach(*self._progress)
                yield batch
        finally:
            self._health.left()
            deliveries.close()

    def _deliveries(self) -> Generator[Delivery | Failure, None, None]:
        if not self._workers:
            self._workers.append(
                DataLoader(
                    self._maker,  # type: ignore[arg-type]
                    batch_size=None,
                    sampler=self._rows,
                    collate_fn=as_is,
                    pin_memory=self._pin and self._maker.decode,
                    generator=torch.Generator(),  # leaves the global random state, which a resume restores, alone
                    **self._loading,
                )
            )
        loaded = iter(self._workers[0])
        self._prefetch.reach(self._rows.epoch, self._rows.start)
        if self._maker.decode:
            yield from loaded
            return
        ahead = ReadAhead(self._finished(loaded), READ_AHEAD)
        try:
            for delivery in ahead:
                yield _pinned(delivery) if self._pin else delivery
        finally:
            ahead.close()

    def _finished(self, loaded: Iterator[Any]) -> Iterator[Delivery | Failure]:
        """Runs in the decoding thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is each thread's own
        yield from map(self._maker.finish, loaded)

    def _checked(self, delivery: Delivery) -> dict[str, Any]:
        batch, reports = delivery
        self._health.record(reports)
        batch["frame_mask"].prepare(self._device, self._attention_backend)
        return batch


_inherited: list[list[DataLoader[Any]]] = []


def _stop_workers(workers: list[DataLoader[Any]], owner: int) -> None:
    """Let a loader's worker processes go when the loader does.

    The list keeps them out of reference cycles, from which a garbage collection takes their queues apart first and
    then waits seconds for processes that hear nothing. A forked child must not stop the workers of its parent.
    """
    if os.getpid() == owner:
        workers.clear()
    else:
        _inherited.append(workers)


def _pinned(delivery: Delivery | Failure) -> Delivery | Failure:
    if isinstance(delivery, Failure):
        return delivery
    batch = {
        name: value.pin_memory() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in delivery.batch.items()
    }
    return delivery._replace(batch=batch)
