"""Which clip stands at a position: of one dataset, or of several in fixed shares."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ConfigError
from .mixture import MixtureSchedule
from .order import SampleOrder, mix
from .watch import Place

_MIXTURE = 21  # stream of the seed, apart from those of `order` and `transforms`


def part_seed(seed: int, part: int) -> int:
    """The seed of one dataset's own order in a mixture."""
    return mix(seed, _MIXTURE, part)


class ClipOrder:
    """The order of all clips of a run. One dataset: its `SampleOrder`. Several: a schedule draws from each in turn.

    In a mixture each dataset walks through epochs of its own, each a shuffle of all its samples: none is drawn again
    before all others of its dataset were. A dataset's walk goes on where it is when an epoch of the mixture ends.

    Args:
        orders: one per dataset.
        seed: of the run; what is drawn at random for a position follows from it.
        schedule: of the datasets, None where there is one.
        epoch_samples: samples that make an epoch; of a mixture only. Default: as many as all datasets hold.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        seed: int,
        schedule: MixtureSchedule | None = None,
        epoch_samples: int | None = None,
    ) -> None:
        if epoch_samples is not None and schedule is None:
            raise ConfigError("epoch_samples is for mixtures; an epoch of one dataset is each of its samples once.")
        self.orders, self.seed, self.schedule = tuple(orders), seed, schedule
        self._total = epoch_samples or sum(map(len, orders))
        if schedule is not None:
            schedule.counts(0)  # found here once, and not in every worker

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._total

    def at(self, epoch: int, position: int) -> Place:
        """Return the sample at a position, 0 <= position < len. Raises IndexError outside."""
        part, own_epoch, own_position = self._own(epoch, position)
        return Place(part, *self.orders[part].at(own_epoch, own_position))

    def spare(self, epoch: int, position: int, attempt: int) -> Place:
        """Return the sample that stands in for a failed one, of the same dataset; see `SampleOrder.spare`."""
        part, own_epoch, own_position = self._own(epoch, position)
        return Place(part, *self.orders[part].spare(own_epoch, own_position, attempt))

    def reached(self, epoch: int, position: int) -> list[tuple[int, int]]:
        """Where each dataset stands in its own walk, (epoch, position), before a position of the run."""
        draws = epoch * self._total + position
        if self.schedule is None:
            return [divmod(draws, self._total)]
        counts = self.schedule.counts(draws)
        return [divmod(count, len(order)) for count, order in zip(counts, self.orders, strict=True)]

    def _own(self, epoch: int, position: int) -> tuple[int, int, int]:
        if not 0 <= position < self._total:
            raise IndexError(f"Position {position} is outside an epoch of {self._total} samples.")
        if self.schedule is None:
            return 0, epoch, position
        part, count = self.schedule.at(epoch * self._total + position)
        return part, *divmod(count, len(self.orders[part]))
