"""What `framestream inspect` looks at: the splits that a target names, and which of their samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shards import ShardSet

from .verify_places import find_places


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
    place = target[0].removeprefix("file://")
    if is_url(place):
        try:
            return [Split("", ShardSet.open(place, storage_options=storage_options))]
        except ShardError as err:
            with suppress(ShardError):
                if splits := list(_remote_splits(place, storage_options)):
                    return splits
            raise err from None
    folder = Path(place).expanduser()
    inside = sorted({tar.parent for tar in folder.glob("*/[!.]*.tar")}) if folder.is_dir() else []
    splits = [Split(path.name, ShardSet.open(path)) for path in inside]
    if not splits or any(folder.glob("[!.]*.tar")):
        splits.insert(0, Split("", ShardSet.open(place)))
    return splits


def _remote_splits(place: str, storage_options: dict[str, Any] | None) -> Iterator[Split]:
    """The folders of shards in a remote folder that holds none itself."""
    for found in find_places(place.rstrip("/"), Remote(storage_options or {})):
        if found.name:
            yield Split(found.name, ShardSet.open(found.path, storage_options=storage_options))


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
