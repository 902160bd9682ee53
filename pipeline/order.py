"""Which sample stands at which position of which epoch: a pure function of a few integers.

The order is computed, never stored: position `p` of epoch `e` follows from (seed, e, p, shard sizes). Hence
a resumed run starts anywhere at the same cost, workers and ranks agree without talking to each other, and the
saved state is a few integers. Hashing is done here, in 64-bit integer arithmetic, because the random streams
of numpy and torch are not promised to stay the same from one release to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cached import cached_property
from .errors import ConfigError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of splitmix64
_MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Separate streams of one seed, so that e.g. the spares of a position say nothing about its crop.
_SHARDS, _SAMPLES, _SPARES = 1, 2, 3

#: Spares come from the window of the failing sample this many times; after that from everywhere else.
WINDOW_ATTEMPTS = 8

#: Epochs and windows whose permutation is kept; two, because batches straddle boundaries, and two for spares.
_KEPT = 4


def mix(*numbers: int) -> int:
    """Hash integers to 64 well mixed bits (the finaliser of splitmix64, Steele et al. 2014, chained)."""
    word = 0
    for number in numbers:
        word = (word + _GOLDEN & _WORD) ^ (number & _WORD)
        word = (word ^ word >> 30) * _MULTIPLY[0] & _WORD
        word = (word ^ word >> 27) * _MULTIPLY[1] & _WORD
        word ^= word >> 31
    return word


def below(word: int, count: int) -> int:
    """Map 64 hashed bits to 0..count-1, evenly."""
    return word * count >> 64


def permutation(count: int, *numbers: int) -> np.ndarray:
    """Shuffle 0..count-1 by hashed keys: int64 [count], the same on every machine and numpy version."""
    keys = np.arange(count, dtype=np.uint64) ^ np.uint64(mix(*numbers) + _GOLDEN & _WORD)
    keys = (keys ^ keys >> np.uint64(30)) * np.uint64(_MULTIPLY[0])
    keys = (keys ^ keys >> np.uint64(27)) * np.uint64(_MULTIPLY[1])
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable")


def rank_rows(rows: int, rank: int, world_size: int) -> range:
    """Return one rank's part of a global batch of `rows` rows: contiguous, even, no overlap."""
    return range(rows * rank // world_size, rows * (rank + 1) // world_size)


class Window(NamedTuple):
    """A run of positions that needs only `shards` to be at hand: positions start..stop-1 of an epoch."""

    number: int
    start: int
    stop: int
    shards: tuple[int, ...]


class _Epoch(NamedTuple):
    shards: np.ndarray  # [S] shard numbers in the order of this epoch
    starts: np.ndarray  # [windows + 1] first position of each window


class SampleOrder:
    """The order of all samples of a dataset, for every epoch.

    Shuffled, an epoch walks through the shards in a random order, `window_shards` of them at a time, and
    through the samples of such a window in a random order: every sample exactly once, and only one window's
    shards (two at its edge) need to be at hand. Not shuffled, it is the stored order. Shards without samples play
    no part.

    Args:
        sizes: samples in each shard.
        seed: any integer; other seeds give other orders.
        shuffle: False gives the stored order in every epoch.
        window_shards: shards whose samples are mixed with each other; more is better mixed, fewer needs less
            local space.

    Raises:
        ConfigError: there is no sample, a size is negative, or `window_shards` < 1.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int = 0, shuffle: bool = True, window_shards: int = 4) -> None:
        if window_shards < 1:
            raise ConfigError(f"window_shards is {window_shards}; it must be at least 1.")
        if any(size < 0 for size in sizes):
            raise ConfigError("A shard size is negative; sizes are numbers of samples.")
        if not sum(sizes):
            raise ConfigError(f"There is no sample in the {len(sizes)} shard(s) given; nothing can be loaded.")
        self.sizes = tuple(int(size) for size in sizes)
        self.seed, self.shuffle, self.window_shards = int(seed), shuffle, window_shards
        self._total = sum(self.sizes)
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._total

    def __getstate__(self) -> dict[str, object]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_filled"}
        return {**kept, "_epochs": {}, "_windows": {}}

    @cached_property
    def _filled(self) -> np.ndarray:
        return np.flatnonzero(self.sizes)

    def at(self, epoch: int, position: int) -> tuple[int, int]:
        """Return (shard, sample within the shard) at a position, 0 <= position < len.

        Raises:
            IndexError: the position is outside the epoch.
        """
        window = self.window(epoch, position)
        return self._inside(epoch, window, position - window.start)

    def window(self, epoch: int, position: int) -> Window:
        """Return the window that a position belongs to.

        Raises:
            IndexError: the position is outside the epoch.
        """
        if not 0 <= position < self._total:
            raise IndexError(f"Position {position} is outside an epoch of {self._total} samples.")
        shards, starts = self._epoch(epoch)
        index = int(np.searchsorted(starts, position, side="right")) - 1
        chosen = shards[index * self.window_shards : (index + 1) * self.window_shards]
        return Window(index, int(starts[index]), int(starts[index + 1]), tuple(chosen.tolist()))

    def spare(self, epoch: int, position: int, attempt: int) -> tuple[int, int]:
        """Return the sample that stands in for a failed one at attempt 0, 1, …

        The first attempts stay in the window, whose shards are at hand; then all other windows follow. They
        repeat no sample before they have to, and never return the failed one when there is another.
        """
        window = self.window(epoch, position)
        count = window.stop - window.start
        others, outside = count - 1, self._total - count
        start = mix(self.seed, _SPARES, epoch, position) >> 1
        near = min(others, WINDOW_ATTEMPTS) if outside else others
        if attempt < near or not outside:
            if not others:
                return self.at(epoch, position)
            shift = 1 + (start + attempt) % others
            return self._inside(epoch, window, (position - window.start + shift) % count)
        return self.at(epoch, (window.stop + (start + attempt - near) % outside) % self._total)

    def shards_within(self, positions: int) -> int:
        """How many shards any run of consecutive positions of an epoch touches at most, spares apart.

        A run of k positions reaches over at most 2 + (k - 2) // m windows, m being the fewest samples that a full
        window can hold, and there is at least one sample to a shard.
        """
        filled = np.sort(np.asarray(self.sizes)[self._filled])
        if positions < 1:
            return 0
        width = self.window_shards if self.shuffle else 1
        fewest = int(filled[:width].sum())
        windows = 1 if positions == 1 else 2 + (positions - 2) // fewest
        return min(positions, windows * width, len(filled))

    def _epoch(self, epoch: int) -> _Epoch:
        if not self.shuffle:
            epoch = 0
        if epoch not in self._epochs:
            count = len(self._filled)
            shards = self._filled
            if self.shuffle:
                shards = shards[permutation(count, self.seed, _SHARDS, epoch)]
            ends = np.cumsum(np.asarray(self.sizes, dtype=np.int64)[shards])
            last = np.append(np.arange(self.window_shards, count, self.window_shards), count) - 1
            _make_room(self._epochs)
            self._epochs[epoch] = _Epoch(shards, np.concatenate([[0], ends[last]]))
        return self._epochs[epoch]

    def _inside(self, epoch: int, window: Window, row: int) -> tuple[int, int]:
        key = (epoch if self.shuffle else 0, window.number)
        if key not in self._windows:
            count = window.stop - window.start
            rows = permutation(count, self.seed, _SAMPLES, *key) if self.shuffle else np.arange(count)
            ends = np.cumsum([self.sizes[shard] for shard in window.shards])
            _make_room(self._windows)
            self._windows[key] = (rows, ends)
        rows, ends = self._windows[key]
        stored = int(rows[row])
        slot = int(np.searchsorted(ends, stored, side="right"))
        shard = window.shards[slot]
        return shard, stored - (int(ends[slot]) - self.sizes[shard])


def _make_room(kept: dict) -> None:
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]
