"""One dataset or a mixture of several, opened: the shards, the order over all of them, and what identifies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .clip_order import ClipOrder, part_seed
from .mixture import MixtureSchedule, parse_mixture, whole_weights
from .order import SampleOrder
from .shard_paths import ShardsArgument
from .shards import ShardSet


class DataSource(NamedTuple):
    """What a loader draws from.

    Attributes:
        sets: the shards, one set per dataset.
        order: over all of them.
        names: of the datasets of a mixture; empty where there is one dataset.
        identity: what a saved state has to agree with, JSON-serialisable.
    """

    sets: tuple[ShardSet, ...]
    order: ClipOrder
    names: tuple[str, ...]
    identity: dict[str, Any]


def open_data(
    shards: ShardSet | ShardsArgument | Mapping[str, Any],
    *,
    seed: int,
    shuffle: bool,
    window_shards: int,
    epoch_samples: int | None,
    **opening: Any,
) -> DataSource:
    """Open `shards` as `build_loader` describes them; `opening` goes to `ShardSet.open`.

    Raises:
        ConfigError: an impossible setting.
        ShardError: there are no shards, or one cannot be indexed.
    """
    ordering: dict[str, Any] = {"shuffle": shuffle, "window_shards": window_shards}
    if not isinstance(shards, Mapping):
        opened = ShardSet.open(shards, **opening)
        order = ClipOrder([SampleOrder(opened.sizes, seed=seed, **ordering)], seed, None, epoch_samples)
        return DataSource((opened,), order, (), {"data": opened.fingerprint})
    parts = parse_mixture(shards)
    schedule = MixtureSchedule(whole_weights([part.weight for part in parts]))
    sets = tuple(ShardSet.open(part.shards, **opening) for part in parts)
    orders = [SampleOrder(one.sizes, seed=part_seed(seed, n), **ordering) for n, one in enumerate(sets)]
    names = tuple(part.name for part in parts)
    identity = {
        "data": {name: one.fingerprint for name, one in zip(names, sets, strict=True)},
        "weights": dict(zip(names, schedule.weights, strict=True)),
    }
    return DataSource(sets, ClipOrder(orders, seed, schedule, epoch_samples), names, identity)
