"""How close a shuffle by windows of shards comes to a full one, as numbers.

What a window costs is that the samples of a batch share few shards. Where each shard is like the whole dataset, that
costs nothing. The worst case is a dataset in which each shard holds one kind of sample: then the mean of a batch
varies more than that of independent samples does, by Kish's design effect 1 + (B - 1) * rho (Kish 1965, *Survey
Sampling*), rho being how much more often than by chance two samples of a batch share a shard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .order import SampleOrder


class ShuffleQuality(NamedTuple):
    """Figures of one epoch's order, over all of its batches.

    Attributes:
        same_shard: share of pairs of samples of a batch that lie in the same shard.
        same_shard_by_chance: the same for a full shuffle, exactly.
        batch_worth: independent samples that a batch of B is worth if each shard held one kind: B for a full shuffle,
            1 for no shuffle.
        epoch_correlation: Spearman's rank correlation of the samples' positions in this epoch and the next; 0 for full
            shuffles.
    """

    same_shard: float
    same_shard_by_chance: float
    batch_worth: float
    epoch_correlation: float


def shuffle_quality(order: SampleOrder, batch_size: int, epoch: int = 0) -> ShuffleQuality:
    """Measure the order of an epoch. Takes time and memory in proportion to the number of samples.

    Args:
        batch_size: B, samples of a global batch, at least 2; a last partial batch is left out.

    Raises:
        ValueError: `batch_size` is below 2, or there is no full batch.
    """
    if not 2 <= batch_size <= len(order):
        raise ValueError(f"batch_size is {batch_size}; it must be from 2 to the {len(order)} samples there are.")
    places = np.array([order.at(epoch, position) for position in range(len(order))])
    batches = np.sort(places[: len(order) // batch_size * batch_size, 0].reshape(-1, batch_size), axis=1)
    # Runs of equal shards in each sorted row; a run of r samples has r (r - 1) / 2 pairs.
    starts = np.ones(batches.shape, dtype=bool)
    starts[:, 1:] = batches[:, 1:] != batches[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(starts.ravel()), batches.size)).astype(float)
    pairs = batches.shape[0] * batch_size * (batch_size - 1) / 2
    same = float((runs * (runs - 1) / 2).sum() / pairs)
    sizes, total = np.asarray(order.sizes, dtype=float), float(len(order))
    chance = float((sizes * (sizes - 1)).sum() / (total * (total - 1)))
    rho = (same - chance) / (1 - chance) if chance < 1 else 0.0
    first = np.concatenate([[0], np.cumsum(order.sizes)])
    following = np.array([order.at(epoch + 1, position) for position in range(len(order))])
    now, then = (np.argsort(first[p[:, 0]] + p[:, 1]) for p in (places, following))
    return ShuffleQuality(same, chance, batch_size / (1 + (batch_size - 1) * rho), float(np.corrcoef(now, then)[0, 1]))
