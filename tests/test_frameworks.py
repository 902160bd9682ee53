"""The loader inside HF Trainer, Accelerate and Lightning: sharded once, resumed exactly, or refused with a reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from framestream.pipeline.errors import ConfigError, StateError
from framestream.pipeline.frameworks import FrameworkLoader, LoaderTrainerMixin, at_next_batch

import torchrun
from loader_setup import digest, keys, make_loader, write_shards
from trainer_job import BATCH, EPOCHS, SAMPLES, Watching, accelerated, arguments, loader_of, outcome, trainer_of

# Batches of `SAMPLES` after which an optimiser step of two batches ends: 2 + 2 + 1 in each of two epochs.
ENDS = [2, 4, 5, 7, 9, 10]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 clips in 4 shards, one of them no video."""
    return write_shards(tmp_path_factory.mktemp("shards"), SAMPLES, 5, bad={3})


def epochs_of(shards: Path, count: int = EPOCHS, **options: Any) -> list[list[list[str]]]:
    """What the loader gives without any framework: keys by epoch and batch."""
    loader = loader_of(shards, **options)
    return [keys(loader) for _ in range(count)]


def seen_keys(run: dict[str, Any]) -> list[list[str]]:
    return [row for row, _ in run["seen"]]


# -- the view that frameworks get ------------------------------------------------------------------------


def test_looking_at_a_loader_begins_nothing(shards: Path) -> None:
    view = FrameworkLoader(loader_of(shards))
    before = view.state_dict()
    iter(view)
    iter(view)
    assert view.state_dict() == before
    assert [len(view), keys(view), keys(view)] == [5, *epochs_of(shards)]


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_state_of_the_view_is_that_of_the_next_batch(shards: Path, drop_last: bool) -> None:
    first, second = epochs_of(shards, drop_last=drop_last)
    loader = loader_of(shards, drop_last=drop_last)
    view = FrameworkLoader(loader)
    for number, _ in enumerate(view, 1):
        state = json.loads(json.dumps(view.state_dict()))
        resumed = FrameworkLoader(loader_of(shards, drop_last=drop_last))
        resumed.load_state_dict(state)
        assert keys(resumed) == (first[number:] or second)
    assert (state["epoch"], state["consumed"]) == (1, 0)
    assert at_next_batch(state, len(loader)) == state
    assert loader.state_dict()["epoch"] == 0  # the loader's own state has an empty remainder


# -- HF Trainer ------------------------------------------------------------------------------------------


def test_hf_trainer_takes_the_loader_as_it_is(shards: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    loader = loader_of(shards)

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return loader

    trainer = Trainer(model=Watching(), args=arguments(tmp_path, save_strategy="no"))
    trainer.train()
    whole = loader_of(shards)
    assert seen_keys(outcome(trainer)) == [*keys(whole), *keys(whole)]
    assert json.dumps(loader.state_dict()) == json.dumps(whole.state_dict())


@pytest.mark.parametrize(("parts", "drop_last", "ends"), [(1, True, range(1, 9)), (2, False, ENDS)])
def test_hf_trainer_goes_on_from_every_checkpoint(
    shards: Path, tmp_path: Path, parts: int, drop_last: bool, ends: list[int]
) -> None:
    pytest.importorskip("transformers")
    settings = {"gradient_accumulation_steps": parts}
    trainer = trainer_of(tmp_path / "whole", loader_of(shards, drop_last=drop_last), **settings)
    trainer.train()
    whole = outcome(trainer)
    assert seen_keys(whole) == list(chain(*epochs_of(shards, drop_last=drop_last)))
    assert whole["step"] == len(ends)
    for step, batches in enumerate(ends, 1):
        again = trainer_of(tmp_path / "again", loader_of(shards, drop_last=drop_last), save_strategy="no", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        rest = outcome(again)
        assert rest["seen"] == whole["seen"][batches:]
        assert {**rest, "seen": 0} == {**whole, "seen": 0}  # the weight to the bit, steps, epochs and losses


def test_hf_trainer_resumes_a_resumed_run_and_restores_other_callbacks(shards: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= self.steps

    seen: list[Any] = []
    for steps in (3, 6, 99):  # the second run begins in epoch 0 and ends in epoch 1
        trainer = trainer_of(
            tmp_path, loader_of(shards), callbacks=[Stop(steps)], restore_callback_states_from_checkpoint=steps > 3
        )
        trainer.train(resume_from_checkpoint=steps > 3)
        seen += seen_keys(outcome(trainer))
    assert seen == list(chain(*epochs_of(shards)))


def test_batches_that_a_trainer_fetched_ahead_are_not_counted(shards: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Ahead(LoaderTrainerMixin, transformers.Trainer):
        source, held = None, ()

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            if self.source is not epoch_iterator:
                self.source, self.held = epoch_iterator, []
            self.held = [*self.held, *islice(epoch_iterator, num_batches + 1 - len(self.held))]
            taken, self.held = self.held[:num_batches], self.held[num_batches:]
            return taken, None

    loader = loader_of(shards)
    ahead = Ahead(model=Watching(), args=arguments(tmp_path, max_steps=2), train_loader=loader)
    ahead.train()
    assert loader.state_dict()["consumed"] == 3 * BATCH
    trainer = trainer_of(tmp_path / "again", loader_of(shards))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen_keys(outcome(trainer)) == list(chain(*epochs_of(shards)))[2:]


def test_an_epoch_that_a_callback_ends_is_over(shards: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Enough(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    trainer = trainer_of(tmp_path, loader_of(shards), callbacks=[Enough()])
    trainer.train()
    first, second = epochs_of(shards)
    assert seen_keys(outcome(trainer)) == [*first[:2], *second]
    again = trainer_of(tmp_path, loader_of(shards))
    with pytest.raises(StateError, match="ended early"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_evaluation_sees_the_same_clips_every_time(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    held_out = loader_of(shards, shuffle=False)
    trainer = trainer_of(tmp_path, loader_of(shards), eval_dataset={"held_out": held_out}, eval_strategy="epoch")
    trainer.train()
    train, seen = epochs_of(shards), trainer.model.seen
    assert [row for row, _ in seen[5:10]] == epochs_of(shards, 1, shuffle=False)[0]
    assert seen[5:10] == seen[15:20]
    assert [row for row, _ in seen[:5] + seen[10:15]] == [*train[0], *train[1]]
    assert trainer.num_examples(trainer.get_train_dataloader()) == SAMPLES


def test_hf_settings_that_would_break_the_stream_are_refused(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for settings, text in (
        ({"ignore_data_skip": True}, "ignore_data_skip=True .* leave it False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size has no hold"),
    ):
        with pytest.raises(ConfigError, match=text):
            trainer_of(tmp_path, loader_of(shards), **settings)
    with pytest.raises(ConfigError, match="that of rank 1 of 2, and the Trainer runs as rank 0 of 1"):
        trainer_of(tmp_path, loader_of(shards, rank=1, world_size=2))
    with pytest.raises(ConfigError, match="give the train_loader alone"):
        trainer_of(tmp_path, loader_of(shards), train_dataset=[1, 2])
    moved = loader_of(shards)
    next(iter(moved))
    with pytest.raises(ConfigError, match="stands after 4 samples of epoch 0"):
        trainer_of(tmp_path, moved).train()


def test_checkpoints_of_something_else_are_refused(shards: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer = trainer_of(tmp_path / "one", loader_of(shards), max_steps=1)
    trainer.train()
    checkpoint = str(tmp_path / "one" / "checkpoint-1")
    with pytest.raises(StateError, match="seed was 3, is 4"):
        trainer_of(tmp_path, loader_of(shards, seed=4)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(StateError, match=r"had given 1 batches of epoch 0 .* takes it for 2"):
        trainer_of(tmp_path, loader_of(shards), gradient_accumulation_steps=2).train(resume_from_checkpoint=checkpoint)
    plain = transformers.Trainer(model=Watching(), args=arguments(tmp_path / "two", max_steps=1))
    plain.get_train_dataloader = lambda: loader_of(shards)
    plain.train()
    with pytest.raises(StateError, match="holds no loader state"):
        trainer_of(tmp_path, loader_of(shards)).train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-1"))


# -- Accelerate ------------------------------------------------------------------------------------------


def test_accelerate_neither_shards_again_nor_loses_the_batch(shards: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import send_to_device

    loader = loader_of(shards)
    assert accelerate.Accelerator(cpu=True).prepare(loader) is loader
    assert [keys(loader), keys(loader)] == epochs_of(shards)
    batch = next(iter(make_loader(shards, block_mask=True)))
    moved = send_to_device(batch, "cpu")
    assert set(moved) == set(batch)
    assert digest(moved) == digest(batch)


def test_accelerate_saves_the_loader_with_the_rest(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    runs = accelerated(shards, tmp_path)
    assert seen_keys(runs["whole"]) == list(chain(*epochs_of(shards)))
    assert runs["again"]["seen"] == runs["whole"]["seen"][7:]
    assert runs["again"]["weight"] == runs["whole"]["weight"]


# -- several ranks ---------------------------------------------------------------------------------------


def check_ranks(ranks: list[dict[str, Any]], shards: Path) -> None:
    """Every rank its own rows of what one process gives, in the whole run and in those that go on from it."""
    whole = [rank["runs"][0] for rank in ranks]
    single = loader_of(shards)
    for batches in zip(*(run["seen"] for run in whole), (row for _ in range(EPOCHS) for row in single), strict=True):
        rows = [row for row, _ in batches[:-1]]
        if sum(map(len, rows)) == BATCH:
            assert list(chain(*rows)) == batches[-1]["keys"]
        else:  # the last batch has one sample: on one rank it is padding
            assert rows == [batches[-1]["keys"]] * len(rows)
    assert {(run["step"], run["weight"]) for rank in ranks for run in rank["runs"]} == {
        (whole[0]["step"], whole[0]["weight"])
    }
    for rank in ranks:
        for run, batches in zip(rank["runs"][1:], (2, 5, 9), strict=True):
            assert run["seen"] == rank["runs"][0]["seen"][batches:]


@pytest.mark.slow
def test_trainer_and_accelerate_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shards = write_shards(tmp_path / "shards" / "train", SAMPLES, 5, bad={3})
    ranks = torchrun.run("trainer_job.py", 2, tmp_path)
    check_ranks(ranks, shards)
    for rank in ranks:
        runs = rank["accelerate"]
        assert runs["untouched"]
        assert seen_keys(runs["whole"]) == seen_keys(rank["runs"][0])
        assert runs["again"]["seen"] == runs["whole"]["seen"][7:]
        assert runs["again"]["weight"] == runs["whole"]["weight"] == ranks[0]["accelerate"]["whole"]["weight"]
        assert "the Trainer takes it that every rank has equally many" in rank["refused"]


# -- Lightning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "every", "ends"), [(2, "step", ENDS), (1, "epoch", [5, 10])])
def test_lightning_goes_on_from_every_checkpoint(
    shards: Path, tmp_path: Path, parts: int, every: str, ends: list[int]
) -> None:
    from lightning_job import fit

    whole = fit(shards, tmp_path / "whole", parts=parts, every=every)
    assert seen_keys(whole) == list(chain(*epochs_of(shards)))
    checkpoints = sorted((tmp_path / "whole").glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for checkpoint, batches in zip(checkpoints, ends, strict=True):
        again = fit(shards, tmp_path / "again", checkpoint, parts=parts, every=every)
        assert again["seen"] == whole["seen"][batches:]
        assert {**again, "seen": 0} == {**whole, "seen": 0}


@pytest.mark.parametrize("name", ["frameworks.md", "training.md"])
def test_the_recipe_for_lightning_runs_as_it_stands(tmp_path: Path, name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / name).read_text()
    (recipe,) = re.findall(r"<!-- lightning -->\n```py\n(.*?)```", page, re.DOTALL)
    (shards,) = re.findall(r'"(shards/[^"]*)"', recipe)
    write_shards(tmp_path / shards, 6, 3)
    done = subprocess.run(
        [sys.executable, "-c", recipe],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(next((tmp_path / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert (checkpoint["Clips"]["epoch"], checkpoint["Clips"]["consumed"]) == (2, 0)


@pytest.mark.slow
def test_lightning_on_two_ranks(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", SAMPLES, 5, bad={3})
    check_ranks(torchrun.run("lightning_job.py", 2, tmp_path), shards)
