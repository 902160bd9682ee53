"""The HF Trainer and Accelerate on the loader; as a script one rank of a job that torchrun starts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framestream.pipeline.clip_loader import ClipLoader
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.frameworks import LoaderTrainerMixin

from loader_setup import make_loader

BATCH = 4  # over all ranks
SAMPLES = 17  # hence 5 batches per epoch, the last one with 1 sample
EPOCHS = 2


class Watching(torch.nn.Module):
    """A model whose weight depends on the order of what it sees, and which notes that down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[list[str], str]] = []

    def forward(self, video_frames: Tensor, keys: list[str], **batch: Any) -> dict[str, Tensor]:
        assert batch["frame_mask"].batch_size == len(keys)
        self.seen.append((keys, hashlib.sha256(video_frames.numpy().tobytes()).hexdigest()))
        target = video_frames.float().mean() / 255
        return {"loss": (self.weight - target) ** 2}


def loader_of(shards: Path, **options: Any) -> ClipLoader:
    """This rank's loader of global batch `BATCH`."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"batch_size": BATCH // ranks, "drop_last": False, "random_end": True, "max_reject_share": 1.0}
    return make_loader(shards, **{**settings, **options})


def arguments(folder: Path, **settings: Any) -> Any:
    import transformers

    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.1,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**defaults, **settings})


def trainer_of(
    folder: Path,
    loader: ClipLoader,
    *,
    callbacks: Any = (),
    eval_dataset: Any = None,
    train_dataset: Any = None,
    **settings: Any,
) -> Any:
    """A Trainer of `Watching` on `loader`, with a checkpoint after every step."""
    import transformers

    class ClipTrainer(LoaderTrainerMixin, transformers.Trainer):
        pass

    return ClipTrainer(
        model=Watching(),
        args=arguments(folder, **settings),
        train_loader=loader,
        callbacks=list(callbacks),
        eval_dataset=eval_dataset,
        train_dataset=train_dataset,
    )


def outcome(trainer: Any) -> dict[str, Any]:
    """What a run saw and what became of it, JSON-serialisable."""
    history = [{k: row[k] for k in ("step", "epoch", "loss")} for row in trainer.state.log_history if "loss" in row]
    model = trainer.model
    return {"seen": model.seen, "weight": model.weight.item(), "step": trainer.state.global_step, "history": history}


def trained(shards: Path, folder: Path) -> list[dict[str, Any]]:
    """An unbroken run, and runs that go on from its checkpoints: within epoch 0, at its end, within epoch 1."""
    settings = {"gradient_accumulation_steps": 2}
    whole = trainer_of(folder / "whole", loader_of(shards, num_workers=1), **settings)
    whole.train()
    runs = [outcome(whole)]
    for step in (1, 3, 5):
        again = trainer_of(folder / "again", loader_of(shards), save_strategy="no", **settings)
        again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
        runs.append(outcome(again))
    return runs


def accelerated(shards: Path, folder: Path) -> dict[str, Any]:
    """A run under Accelerate that saves after 2 batches of epoch 1, and one that goes on from there."""
    from accelerate import Accelerator

    result: dict[str, Any] = {}
    for name in ("whole", "again"):
        accelerator = Accelerator(cpu=True)
        loader, model = loader_of(shards), Watching()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        wrapped, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(loader)
        if name == "again":
            accelerator.load_state(str(folder / "accelerate"))
        for epoch in range(loader.epoch, EPOCHS):
            for number, batch in enumerate(prepared):
                accelerator.backward(wrapped(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                if name == "whole" and (epoch, number) == (1, 1):
                    accelerator.save_state(str(folder / "accelerate"))
        result |= {name: {"seen": model.seen, "weight": model.weight.item()}, "untouched": prepared is loader}
    return result


def run_recipes(folder: Path) -> None:
    """Run the code of docs/frameworks.md in `folder`, as it stands there, on every rank."""
    page = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()
    recipes = re.findall(r"<!-- test: [\w-]+ -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(recipes) == 3
    os.chdir(folder)
    dist = torch.distributed
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # a job can make its group only once
    for recipe in recipes:
        exec(compile(recipe, "docs/frameworks.md", "exec"), {"__name__": "__main__"})
    dist.destroy_process_group = end


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    run_recipes(folder)
    runs = trained(folder / "shards" / "train", folder)
    result = {"runs": runs, "accelerate": accelerated(folder / "shards" / "train", folder)}
    evaluating = trainer_of(
        folder, loader_of(folder / "shards" / "train"), eval_dataset=loader_of(folder / "shards" / "train")
    )
    try:
        evaluating.evaluate()
    except ConfigError as err:  # 17 samples, so that the ranks would not have equally many
        result["refused"] = str(err)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
