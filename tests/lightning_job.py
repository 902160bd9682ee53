"""Lightning on the loader, as docs/frameworks.md says; as a script one rank of a job that torchrun starts."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from framestream.pipeline.frameworks import FrameworkLoader

from trainer_job import EPOCHS, Watching, loader_of


class Clips(lightning.LightningDataModule):
    def __init__(self, shards: Path, options: dict[str, Any]) -> None:
        super().__init__()
        self.shards, self.options = shards, options

    def setup(self, stage: str) -> None:
        self.loader = FrameworkLoader(loader_of(self.shards, **self.options))

    def train_dataloader(self) -> FrameworkLoader:
        return self.loader

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Watching()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    shards: Path, folder: Path, resume: Path | None = None, *, parts: int = 2, every: str = "step", **options: Any
) -> dict[str, Any]:
    """Train `EPOCHS` epochs with a checkpoint after every step or epoch; return what the model saw."""
    warnings.filterwarnings("ignore", module="lightning")
    when = {"every_n_train_steps": 1} if every == "step" else {"every_n_epochs": 1}
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=EPOCHS,
        accumulate_grad_batches=parts,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **when)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, datamodule=Clips(shards, options), ckpt_path=resume)
    return {"seen": module.model.seen, "weight": module.model.weight.item(), "step": trainer.global_step}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    shards, rank = folder / "shards", os.environ["RANK"]
    runs = [fit(shards, folder / "whole")]
    for step in (1, 3, 5):
        runs.append(fit(shards, folder / "again", folder / "whole" / f"step={step}.ckpt"))
    (folder / f"rank{rank}.json").write_text(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
