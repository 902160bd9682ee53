"""A `ClipLoader` inside other people's training loops: what they ask for, and what they save.

Frameworks look at a loader before they use it, count its batches themselves, and resume in their own way. Two things
follow: asking for an iterator must not begin an epoch, and a state saved after an epoch's last batch means the next
epoch, because the framework has counted this one already. `FrameworkLoader` does that for any framework;
`LoaderTrainerMixin` also tells the HF Trainer where it stands. Neither imports a framework before it is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from .errors import ConfigError, StateError

if TYPE_CHECKING:
    from .clip_loader import ClipLoader

#: Under this name the loader's state stands in the `stateful_callbacks` of a checkpoint's trainer_state.json.
CALLBACK = "LoaderStateCallback"


def batches_done(state: Mapping[str, Any]) -> int:
    """Return how many batches of its epoch a loader state has handed out; the last one may have been partial."""
    return -(-state["consumed"] // state["fingerprint"]["global_batch"])


def at_next_batch(state: Mapping[str, Any], batches: int) -> dict[str, Any]:
    """Return `state`, or the beginning of the next epoch when its own, of `batches` batches, is over."""
    if batches_done(state) < batches:
        return dict(state)
    return {**state, "epoch": state["epoch"] + 1, "consumed": 0}


def samples_per_epoch(loader: ClipLoader) -> int:
    """Return the samples of a full epoch, over all ranks."""
    data = loader.state_dict()["fingerprint"]
    return len(loader) * data["global_batch"] if data["drop_last"] else data["samples"]


class FrameworkLoader:
    """A loader that may be looked at: an epoch begins with its first batch, not with `iter()`.

    Its state after the last batch of an epoch is the beginning of the next one. Lightning needs both; see
    docs/frameworks.md.
    """

    def __init__(self, loader: ClipLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Batches of a full epoch on each rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.loader

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which the next batch follows, JSON-serialisable."""
        return at_next_batch(self.loader.state_dict(), len(self.loader))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was saved; raises as `ClipLoader.load_state_dict`."""
        self.loader.load_state_dict(state)


class LoaderTrainerMixin:
    """The HF Trainer on a `ClipLoader`: `class ClipTrainer(LoaderTrainerMixin, Trainer)`, with `train_loader=`.

    The loader shards by rank itself, so the Trainer does not shard again. Checkpoints hold the loader's state in
    trainer_state.json, as of the batches that were trained on, and `train(resume_from_checkpoint=...)` goes on with
    the next one: the same batches, steps, epochs and accumulated gradients as in an unbroken run. A loader as
    `eval_dataset` (or several, in a dict) gives the same clips at every evaluation. Settings of the Trainer about data
    (`per_device_train_batch_size`, `dataloader_*`, seeds) have no effect on loaders.

    Args:
        train_loader: of `build_loader`; `batch_size` is per rank.
        args, kwargs: of the Trainer, without `train_dataset`.

    Raises:
        ConfigError: a setting with which the stream could not be right; the message says which.
        StateError: on resume, the checkpoint holds no loader state, or one that belongs to another run.
    """

    args: Any
    eval_dataset: Any

    def __init__(self, *args: Any, train_loader: ClipLoader, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "train_dataset", None) is not None:
            raise ConfigError("There are a train_dataset and a train_loader; give the train_loader alone.")
        _check_arguments(self.args, train_loader)
        self._feed = _TrainerFeed(train_loader)
        self.add_callback(_loader_callback(self._feed))  # type: ignore[attr-defined]

    def get_train_dataloader(self) -> DataLoader[Any]:
        # An own generator leaves the global random state, which a resume restores, alone.
        return DataLoader(self._feed, batch_size=None, collate_fn=_untouched, generator=torch.Generator())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        from .clip_loader import ClipLoader

        loader = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(loader, str):  # the Trainer goes through a dict by name
            loader = self.eval_dataset[loader]
        if not isinstance(loader, ClipLoader):
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        _check_evaluation(self.args, loader)
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "consumed": 0})
        return FrameworkLoader(loader)

    def num_examples(self, dataloader: Any) -> int:
        if isinstance(dataloader, FrameworkLoader):
            return samples_per_epoch(dataloader.loader)
        if getattr(dataloader, "dataset", None) is self._feed:
            return samples_per_epoch(self._feed.loader)
        return super().num_examples(dataloader)  # type: ignore[misc]


class _TrainerFeed(IterableDataset[dict[str, Any]]):
    """The loader as the HF Trainer resumes its own: every epoch has its full length, and the Trainer passes over the
    batches that the checkpoint has seen. What it passes over are empty dicts, which cost microseconds; a Trainer
    that trained on one would say that the batch is empty.

    `position` is the loader's state as of the last batch that was trained on. Batches that the Trainer holds for the
    parts of an accumulated step are handed out, but not trained on yet.
    """

    def __init__(self, loader: ClipLoader) -> None:
        self.loader = loader
        self.position: dict[str, Any] = loader.state_dict()
        self._handed: deque[dict[str, Any]] = deque()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(batches_done(self.position)):
            yield {}
        self._handed.clear()
        self.loader.load_state_dict(self.position)
        for batch in self.loader:
            self._handed.append(at_next_batch(self.loader.state_dict(), len(self)))
            yield batch

    def begin(self) -> None:
        """A run that resumes nothing: begin with the epoch at whose beginning the loader stands."""
        position = at_next_batch(self.loader.state_dict(), len(self))
        if position["consumed"]:
            raise ConfigError(
                f"The train_loader stands after {position['consumed']} samples of epoch {position['epoch']}, and the "
                "Trainer begins at the beginning of an epoch. Resume with train(resume_from_checkpoint=...), or load "
                "a state with consumed=0 into the loader."
            )
        self.position = position

    def resume(self, saved: Mapping[str, Any] | None, skipped: int) -> None:
        """Continue from a checkpoint, of whose epoch the Trainer passes over `skipped` batches."""
        if saved is None:
            raise StateError(
                "The checkpoint holds no loader state, because it was saved without LoaderTrainerMixin; load a state "
                "into the loader by hand, or begin anew."
            )
        self.loader.load_state_dict(saved)
        position = at_next_batch(saved, len(self))
        if batches_done(position) != skipped:
            raise StateError(
                f"The loader had given {batches_done(position)} batches of epoch {position['epoch']} when the "
                f"checkpoint was saved, and the Trainer takes it for {skipped}; resume with the same "
                "gradient_accumulation_steps, and not after an epoch that a callback ended early."
            )
        self.position = position

    def trained(self) -> None:
        """The oldest batch that was handed out has been trained on."""
        if not self._handed:
            raise ConfigError("The Trainer trained on a batch that did not come from the train_loader.")
        self.position = self._handed.popleft()

    def end_epoch(self) -> None:
        """The epoch is over for the Trainer, also when a callback ended it early."""
        if self.position["consumed"]:
            self.position = {**self.position, "epoch": self.position["epoch"] + 1, "consumed": 0}


def _loader_callback(feed: _TrainerFeed) -> Any:
    """The callback that keeps a feed in step with a Trainer.

    Its state travels in the checkpoint's trainer_state.json: a callback is not told which checkpoint a run resumes
    from, and a file written after the checkpoint would be missing when the run is killed in between.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class LoaderStateCallback(TrainerCallback, ExportableState):
        # The feed comes from around the class, because the Trainer may build callbacks anew from their state.
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"position": feed.position}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _check_arguments(args, feed.loader)
            if not state.global_step:
                feed.begin()
                return
            saved = state.stateful_callbacks.get(CALLBACK)
            parts = args.gradient_accumulation_steps
            steps_per_epoch = -(-len(feed) // parts)
            feed.resume(saved and saved["attributes"]["position"], state.global_step % steps_per_epoch * parts)

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            feed.trained()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            feed.trained()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            feed.end_epoch()

    return LoaderStateCallback()


def _check_arguments(args: Any, loader: ClipLoader) -> None:
    if args.ignore_data_skip:
        raise ConfigError(
            "ignore_data_skip=True lets the Trainer count a resumed epoch from its beginning, so that it ends with "
            "gradients that are never applied; leave it False. Nothing is loaded twice for it."
        )
    if args.auto_find_batch_size:
        raise ConfigError("auto_find_batch_size has no hold on the train_loader; set its batch_size instead.")
    if args.n_gpu > 1:
        raise ConfigError(
            f"The Trainer would split each batch over {args.n_gpu} GPUs in one process; start one process per GPU "
            "with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    _check_rank(args, loader)


def _check_evaluation(args: Any, loader: ClipLoader) -> None:
    _check_rank(args, loader)
    samples, batch = samples_per_epoch(loader), loader.state_dict()["fingerprint"]["global_batch"]
    if samples % batch % args.world_size:
        raise ConfigError(
            f"The last batch of the evaluation has {samples % batch} samples for {args.world_size} ranks, and the "
            "Trainer takes it that every rank has equally many; build that loader with drop_last=True, or with a "
            "batch_size that divides the samples."
        )


def _check_rank(args: Any, loader: ClipLoader) -> None:
    ours, theirs = (loader.rank, loader.world_size), (args.process_index, args.world_size)
    if ours != theirs:
        raise ConfigError(
            f"The loader is that of rank {ours[0]} of {ours[1]}, and the Trainer runs as rank {theirs[0]} of "
            f"{theirs[1]}; build the loader after TrainingArguments and without rank and world_size (ranks without "
            "GPU need use_cpu=True)."
        )


def _untouched(batch: Any) -> Any:
    return batch
