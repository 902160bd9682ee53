"""One rank of training steps in shares; started by torchrun from test_parallel. Rank 1 has clips too short to roll out.

`fsdp_worker.py FOLDER`: writes FOLDER/rankN.pt with the gradients of two accumulated parts, once for each number of
rollout steps, and the evaluation of each rank's own clips.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from framestream.model.checkpoint import weights_of
from framestream.model.evaluate import evaluate, gather_evaluation
from framestream.model.parallel import parallel, sync_gradients, whole, whole_weights
from framestream.model.ranks import Ranks
from framestream.pipeline.sampling import DenseSampling

from model_setup import batch_of, small_module

PARTS = 2
STEPS = (0, 3)  # of the rollout in the loss


def batches(rank: int) -> list[dict[str, Any]]:
    """The parts of a rank; each rank has one sequence of clips of its own."""
    lengths = (6, 6) if rank == 0 else (3, 2)
    return [batch_of(DenseSampling(6), lengths, seed=10 * rank + part) for part in range(PARTS)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for steps in STEPS:
        module = small_module(rollout_steps=steps)
        names = [name for name, _ in module.named_parameters()]
        model = parallel(module, "fsdp2", Ranks(rank, 2, rank), torch.device("cpu"))
        held = sum(p.to_local().numel() for p in module.parameters())  # type: ignore[attr-defined]
        with whole_weights(module):  # as in a run that was killed before its last evaluation
            first = evaluate(module, batches(rank)[: 2 - rank], rollout_steps=3)
        model.train()
        for _ in range(2):  # a second step finds what a first one left behind
            model.zero_grad()
            for part, batch in enumerate(batches(rank)):
                with sync_gradients(model, part == PARTS - 1):
                    (model(batch).loss / PARTS).backward()
        gradients = {name: whole(p.grad) for name, p in zip(names, module.parameters(), strict=True)}
        with whole_weights(module):  # of rank 1 nothing can be generated
            mine = evaluate(module, batches(rank)[: 2 - rank], rollout_steps=3)
        assert (first.teacher_forced, first.rollout) == (mine.teacher_forced, mine.rollout)
        model(batches(rank)[0]).loss.backward()  # and training goes on
        found[str(steps)] = {
            "gradients": gradients,
            "held": held,
            "weights": weights_of(module),
            "evaluation": gather_evaluation(mine).to_json(),
        }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
