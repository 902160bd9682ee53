"""One rank of the loader's jobs; started by torchrun from test_distributed.

`rank_job.py FOLDER`: FOLDER/plan.json names the scenarios, whose shards are in FOLDER/NAME. The results are written to
FOLDER/rankN.json. On two ranks an elastic run begins then, which has to be killed; on three ranks it goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from framestream.pipeline.atomic import atomic_write
from framestream.pipeline.clip_loader import ClipLoader

from loader_setup import digest, make_loader
from model_setup import PATCHES, SIDE, small_module

EPOCHS = 2
ELASTIC_BATCH = 6  # over all ranks
ELASTIC_STAGES = {2: 2, 3: 4}  # ranks: batches of a stage; an epoch has 5
HANG_S = 60  # a rank that waits longer for the others gives up


def rows_of(batch: dict[str, Any]) -> list[list[Any]]:
    """For each row its key, the key that it is a spare for, whether it is padding, and a digest of everything in it."""
    rows = []
    dense = batch["frame_mask"].dense()
    for row, (key, text, meta) in enumerate(zip(batch["keys"], batch["text"], batch["meta"], strict=True)):
        one = {name: value[row] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        one |= {"mask": dense[row], "keys": [key], "text": [text], "meta": [meta], "frame_mask": None}
        hashed = hashlib.sha256(repr(digest(one)).encode()).hexdigest()
        rows.append([key, meta.get("spare_for"), bool(meta.get("padding")), hashed])
    return rows


def in_step(batches: ClipLoader) -> Iterator[dict[str, Any]]:
    """Batches with a collective after each: it does not end when another rank has fewer."""
    for batch in batches:
        yield batch
        count = torch.ones(())
        dist.all_reduce(count)
        assert count == dist.get_world_size()


def scenario(shards: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Some epochs of a loader, one after another, on this rank."""
    loader = make_loader(shards, max_reject_share=1.0, **options)
    epochs, rejects = [], []
    for _ in range(EPOCHS):
        epochs.append([rows_of(batch) for batch in in_step(loader)])
        rejects.append(loader.stats()["rejects"])
    loader.close()
    return {"length": len(loader), "epochs": epochs, "rejects": rejects, "state": loader.state_dict()}


def ddp(shards: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A model of this project trained on all ranks; and again from a state after 2 batches of epoch 1."""
    runs: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for name in ("whole", "resumed"):
        module = small_module()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        loader = make_loader(shards, image_size=SIDE, patches_per_frame=PATCHES, max_reject_share=1.0, **options)
        if name == "resumed":
            module.load_state_dict(saved["module"])
            optimizer.load_state_dict(saved["optimizer"])
            loader.load_state_dict(json.loads(saved["loader"]))
        model = DistributedDataParallel(module)
        steps = []
        for epoch in range(loader.epoch, EPOCHS):
            for number, batch in enumerate(loader):
                loss = model(batch).loss
                optimizer.zero_grad()
                loss.backward()
                gradients = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
                assert gradients.abs().sum() > 0
                optimizer.step()
                steps.append([loss.item(), hashlib.sha256(gradients.numpy().tobytes()).hexdigest(), batch["keys"]])
                if name == "whole" and (epoch, number) == (1, 1):
                    path = shards / f"ddp-{dist.get_rank()}.pt"
                    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, path)
                    saved = torch.load(path) | {"loader": json.dumps(loader.state_dict())}
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        runs[name] = {"steps": steps, "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest()}
    return runs


def elastic_loader(folder: Path, ranks: int, **options: Any) -> ClipLoader:
    """The loader of the elastic run on `ranks` ranks, at the place where the saved state has it."""
    loader = make_loader(
        (folder / "elastic").resolve(),  # rejects name their shard by its path
        batch_size=ELASTIC_BATCH // ranks,
        drop_last=False,
        random_end=True,
        max_reject_share=1.0,
        **options,
    )
    state = folder / "elastic.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    return loader


def elastic(folder: Path) -> None:
    """A stage of the elastic run: note down each batch, agree with the other ranks, save the place on rank 0."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loader = elastic_loader(folder, ranks, num_workers=1)
    batches = 0
    with open(folder / f"elastic{ranks}-{rank}.jsonl", "w") as log:
        while True:
            for batch in in_step(loader):
                print(json.dumps(rows_of(batch)), file=log, flush=True)
                if batches == ELASTIC_STAGES[ranks]:
                    if ranks == 2:
                        wait_for_death(folder, rank)
                    return
                dist.barrier()
                if rank == 0:
                    atomic_write(folder / "elastic.json", json.dumps(loader.state_dict()).encode())
                batches += 1


def wait_for_death(folder: Path, rank: int) -> None:
    """Say who is to be killed, in the middle of an epoch, with a batch at hand that no state counts."""
    workers = [process.pid for process in multiprocessing.active_children()]
    atomic_write(folder / f"doomed{rank}.json", json.dumps({"rank": os.getpid(), "workers": workers}).encode())
    time.sleep(HANG_S)
    raise TimeoutError("Nobody killed this job.")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG_S))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ["RANK"] = "0"  # the process group wins over the environment
    plan = json.loads((folder / "plan.json").read_text())
    results: dict[str, Any] = {name: scenario(folder / name, options) for name, options in plan.items()}
    if ranks == 2:
        results["ddp"] = ddp(folder / "whole", plan["whole"])
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    elastic(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
