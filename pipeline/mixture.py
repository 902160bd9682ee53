"""Several datasets, drawn in fixed shares: which dataset comes at which draw is a function of the draw's number.

The schedule is that of Pfair scheduling (Baruah et al. 1996, *Proportionate progress*): the j-th draw of a dataset of
share w falls into the interval from floor(j / w) to ceil((j + 1) / w), and the earliest deadline comes first. On one
machine that always works out, so after any number n of draws every dataset has been drawn within one of n * w times.
Shares are ratios of whole numbers, so the schedule repeats after a period and is found for any draw at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .cached import cached_property
from .errors import ConfigError

#: Longest period of a schedule. Weights whose ratios need a longer one are rounded to it.
MAX_PERIOD = 100_000


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    name: str
    shards: Any
    weight: float


def parse_mixture(parts: Mapping[str, Any]) -> list[MixturePart]:
    """Read `{name: {"shards": …, "weight": 3}}`, sorted by name; a weight that is left out is 1.

    Raises:
        ConfigError: there is no dataset, or one has an unknown key, no shards or an impossible weight.
    """
    if not parts:
        raise ConfigError("The mixture names no dataset; give {name: {shards: …, weight: …}} for each.")
    # Sorted, so that the order in which a config names them plays no part.
    return sorted((_part(name, part) for name, part in parts.items()), key=lambda part: part.name)


def _part(name: Any, part: Any) -> MixturePart:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"The mixture calls a dataset {name!r}; a name must be a string.")
    if not isinstance(part, Mapping):
        raise ConfigError(f"Dataset {name} of the mixture is {part!r}; it must be {{shards: …, weight: …}}.")
    unknown = sorted(set(map(str, part)) - {"shards", "weight"})
    if unknown:
        raise ConfigError(f"Dataset {name} of the mixture has the unknown key {unknown[0]}; known: shards, weight.")
    if not part.get("shards"):
        raise ConfigError(f"Dataset {name} of the mixture has no shards; give a folder, a glob, a list or a URL.")
    weight = part.get("weight", 1)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight <= 0:
        raise ConfigError(f"Dataset {name} of the mixture has the weight {weight!r}; it must be a positive number.")
    return MixturePart(name, part["shards"], weight)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive whole numbers in the ratio of `weights`, with a sum of at most `MAX_PERIOD`.

    Numbers are taken as they are written: 0.1 is a tenth. Ratios that need a larger sum are rounded, none to zero.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    whole = [int(part * scale) for part in exact]
    shared = math.gcd(*whole)
    if sum(whole) // shared <= MAX_PERIOD:
        return tuple(part // shared for part in whole)
    total = sum(whole)
    rounded = [max(1, part * MAX_PERIOD // total) for part in whole]
    # What rounding down has left goes to those that it cost most.
    lost = sorted(range(len(whole)), key=lambda i: rounded[i] - Fraction(whole[i] * MAX_PERIOD, total))
    for i in lost[: max(0, MAX_PERIOD - sum(rounded))]:
        rounded[i] += 1
    # And what the smallest were raised by is taken from the largest.
    rounded[rounded.index(max(rounded))] -= max(0, sum(rounded) - MAX_PERIOD)
    return tuple(rounded)


@dataclass(frozen=True)
class MixtureSchedule:
    """Which of several datasets comes at draw 0, 1, 2, …, in shares given by whole numbers.

    Args:
        weights: positive whole numbers, one per dataset; see `whole_weights`.
    """

    weights: tuple[int, ...]

    @property
    def period(self) -> int:
        """Draws after which the schedule repeats; each dataset comes `weights[i]` times in them."""
        return sum(self.weights)

    @cached_property
    def _draws(self) -> np.ndarray:
        """Dataset of each draw of a period: int32 [period]."""
        period, weights = self.period, self.weights
        taken = [0] * len(weights)
        draws = np.empty(period, dtype=np.int32)
        for draw in range(period):
            best, deadline = -1, period + 1
            for part, weight in enumerate(weights):
                if taken[part] * period // weight <= draw:  # its next draw may come from here on
                    until = -((taken[part] + 1) * -period // weight)
                    if until < deadline:
                        best, deadline = part, until
            draws[draw] = best
            taken[best] += 1
        return draws

    @cached_property
    def _places(self) -> tuple[np.ndarray, ...]:
        """Draws of a period at which each dataset comes."""
        return tuple(np.flatnonzero(self._draws == part) for part in range(len(self.weights)))

    def at(self, draw: int) -> tuple[int, int]:
        """(dataset, how often it was drawn before) at a draw."""
        rounds, place = divmod(draw, self.period)
        part = int(self._draws[place])
        return part, rounds * self.weights[part] + int(np.searchsorted(self._places[part], place))

    def counts(self, draws: int) -> tuple[int, ...]:
        """How often each dataset was drawn in the first `draws` draws: within one of its share."""
        rounds, place = divmod(draws, self.period)
        return tuple(
            rounds * weight + int(np.searchsorted(places, place))
            for weight, places in zip(self.weights, self._places, strict=True)
        )
