"""The samples of one shard in little memory: a worker keeps the indexes of many shards, each with many samples.

As lists of dicts of tuples, which is what JSON gives, a sample takes more than four times as much.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload


class IndexedSample(NamedTuple):
    """One sample: its key and, per extension, the byte offset of the data in the tar and its size."""

    key: str
    members: dict[str, tuple[int, int]]


class SampleTable(Sequence[IndexedSample]):
    """An immutable row of samples, packed; each is made anew when it is asked for.

    Raises:
        OverflowError: an offset or a size needs more than 63 bits, or there are 2**31 members.
    """

    def __init__(self, samples: Iterable[tuple[str, Mapping[str, tuple[int, int]]]]) -> None:
        keys: list[str] = []
        kinds: dict[tuple[str, ...], int] = {}  # which extensions a sample has -> number of that kind
        self._kind, self._start, self._places = array("I"), array("I"), array("q")
        for key, members in samples:
            keys.append(key)
            self._kind.append(kinds.setdefault(tuple(members), len(kinds)))
            self._start.append(len(self._places))
            for place in members.values():
                self._places.extend(place)
        self._keys, self._kinds = tuple(keys), tuple(kinds)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> IndexedSample: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[IndexedSample, ...]: ...

    def __getitem__(self, index: int | slice) -> IndexedSample | tuple[IndexedSample, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        key, start = self._keys[index], self._start[index]
        places = self._places
        return IndexedSample(
            key,
            {
                ext: (places[at], places[at + 1])
                for ext, at in zip(self._kinds[self._kind[index]], range(start, len(places), 2), strict=False)
            },
        )

    def __iter__(self) -> Iterator[IndexedSample]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (SampleTable, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(self._keys)

    def __repr__(self) -> str:
        return f"SampleTable({len(self)} samples)"
