"""Whose fault it is when a worker process dies: the sample's that it was at, or somebody else's."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from .errors import WorkerError
from .watch import Place
from .workers import Death

#: Deaths without any result between them, and without a sample to blame, before the run ends; with many workers more,
#: because something outside may end all of them at once, and once more.
MOST_IN_A_ROW = 5

#: How often a worker may be ended from outside over the same sample of the same request before the sample is held to
#: be the reason. Before that it may be the system's doing, when memory runs out, or an operator's.
MOST_AT_ONE_SAMPLE = 3

_OF_THE_DECODER = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "exit status")

log = logging.getLogger(__name__)


class Banned(NamedTuple):
    """A sample that is rejected unread from now on, and why."""

    place: Place
    reason: str


class Coroner:
    """Decides what a death means. Called by `WorkerPool` with each of them."""

    def __init__(self, limit_s: float, workers: int = 1) -> None:
        self._limit_s, self._most = limit_s, max(MOST_IN_A_ROW, 2 * workers + 1)
        self._at: Counter[tuple[Place, int]] = Counter()

    def __call__(self, death: Death) -> Banned | None:
        """Return the sample that is to blame, None where the work should simply be done again.

        Raises:
            WorkerError: workers keep dying without a sample to blame.
        """
        if death.place is not None:
            self._at[death.place, death.ticket] += 1
            if death.hung:
                reason = f"a worker process did not get done with it in {self._limit_s:g} s, and was ended and replaced"
                return self._banned(death.place, reason)
            if death.how.startswith(_OF_THE_DECODER) or self._at[death.place, death.ticket] >= MOST_AT_ONE_SAMPLE:
                return self._banned(death.place, f"a worker process died of it ({death.how}), and was replaced")
        if death.in_a_row >= self._most:
            if death.how.startswith("exit status"):
                why = (
                    "What they printed above says why; where workers are spawned, the script that builds the loader "
                    'needs an `if __name__ == "__main__":`.'
                )
            else:
                why = (
                    "Most often memory has run out: use fewer workers, a smaller batch_size or a smaller "
                    "prefetch_factor; the system's log says more."
                )
            raise WorkerError(
                f"{death.in_a_row} worker processes in a row ended ({death.how}) before they got anything done. {why} "
                "The loader's state is still good to resume from."
            )
        log.warning("a worker process ended (%s) and is replaced; its work is done again", death.how)
        return None

    def _banned(self, place: Place, reason: str) -> Banned:
        log.warning("sample %d of shard %d: %s", place.sample, place.shard, reason)
        return Banned(place, reason)
