"""What `framestream inspect` looks at: the splits that a target names, and which of their samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shards import ShardSet

REMOTE_SPLITS = ("train", "val")  # folders that are looked for where a remote folder holds no shards itself


@dataclass(frozen=True)
class Split:
    """Shards that belong together. `name` is that of their folder, "" where the target is not split."""

    name: str
    shards: ShardSet

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards, as far as they are known without fetching them."""
        local = sum(os.path.getsize(path) for path in self.shards.paths if not is_url(path))
        return local + sum(self.shards.remote_bytes)


def open_splits(target: Sequence[str], storage_options: dict[str, Any] | None = None) -> list[Split]:
    """The splits of a target: of a folder those in it that hold shards, and its own shards as ""; else one, "".

    Args:
        storage_options: settings of the storage that a URL names.
    Raises:
        ConfigError, ShardError: as `ShardSet.open` does.
    """
    if len(target) != 1:
        return [Split("", ShardSet.open(list(target), storage_options=storage_options))]
    place = target[0]
    if is_url(place):
        try:
            return [Split("", ShardSet.open(place, storage_options=storage_options))]
        except ShardError as err:
            splits = list(_remote_splits(place, storage_options))
            if not splits:
                raise err from None
            return splits
    folder = Path(place).expanduser()
    inside = sorted({tar.parent for tar in folder.glob("*/[!.]*.tar")}) if folder.is_dir() else []
    splits = [Split(path.name, ShardSet.open(path)) for path in inside]
    if not splits or any(folder.glob("[!.]*.tar")):
        splits.insert(0, Split("", ShardSet.open(place)))
    return splits


def _remote_splits(place: str, storage_options: dict[str, Any] | None) -> Iterator[Split]:
    for name in REMOTE_SPLITS:
        try:
            yield Split(name, ShardSet.open(f"{place.rstrip('/')}/{name}", storage_options=storage_options))
        except ShardError:
            continue


def spread(count: int, of: int) -> list[int]:
    """`count` numbers spread evenly over `range(of)`, the same ones every time; all of them where there are fewer."""
    if count >= of:
        return list(range(of))
    return [(2 * k + 1) * of // (2 * count) for k in range(count)]


def chosen_places(splits: Sequence[Split], max_samples: int, max_shards: int) -> list[list[tuple[int, int]]]:
    """For each split the (shard, sample) places to look at, in stored order, `max_samples` in all splits together.

    Args:
        splits: at least one.
        max_samples: at least 1; every split gets its share, and one sample at least.
        max_shards: of a remote split, because reading a sample fetches its shard; local ones are read in place.

    Raises:
        ConfigError: a limit below 1.
    """
    if max_samples < 1 or max_shards < 1:
        raise ConfigError(f"max_samples and max_shards have to be at least 1, got {max_samples} and {max_shards}")
    total = sum(len(split.shards) for split in splits)
    chosen = []
    for split in splits:
        share = max(1, max_samples * len(split.shards) // total)
        filled = [number for number, size in enumerate(split.shards.sizes) if size]
        if not split.shards.remote_bytes or len(filled) <= max_shards:
            chosen.append([split.shards.locate(index) for index in spread(share, len(split.shards))])
            continue
        places = [
            (number, sample)
            for number in (filled[k] for k in spread(max_shards, len(filled)))
            for sample in range(split.shards.sizes[number])
        ]
        chosen.append([places[k] for k in spread(share, len(places))])
    return chosen
