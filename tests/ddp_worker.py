"""One rank of a DDP step; started by torchrun from test_module. Rank 1 has a batch without any target."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from framestream.pipeline.sampling import DenseSampling

from model_setup import batch_of, small_module


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    module = small_module()
    model = DistributedDataParallel(module)
    batch = batch_of() if rank == 0 else batch_of(DenseSampling(4), (1, 1))
    for _ in range(2):  # DDP complains about parameters without gradient at the second pass
        module.zero_grad()
        model(batch).loss.backward()
    torch.save({name: p.grad for name, p in module.named_parameters()}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
