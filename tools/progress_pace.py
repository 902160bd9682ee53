"""How far a step is, how fast it goes and how long it will still take; and how that is said."""

from __future__ import annotations

from collections import deque

WINDOW_S = 60.0  # rates are those of the last minute
_POINT_EVERY_S = 0.5


class Pace:
    """How far one step is and how fast it goes: over the last minute, and over all of it once it is done."""

    def __init__(self, step: str, done: int, now: float) -> None:
        self.step, self.began, self.first = step, now, done
        self.done, self.bad = done, 0
        self.total: int | None = None
        self.now = now
        self.ended = False
        self.next_shown = now
        self.shown: tuple[int, int | None, int] | None = None
        self._points = deque([(now, done)])

    def update(self, done: int, total: int | None, bad: int, now: float) -> None:
        """Take new numbers. A step that starts again (`done` falls) is measured anew."""
        if done < self.done:
            self._points = deque([(now, done)])
            self.began, self.first = now, done
        self.done, self.total, self.bad, self.now = done, total, bad, now
        if now - self._points[-1][0] >= _POINT_EVERY_S:
            self._points.append((now, done))
            while len(self._points) > 2 and self._points[1][0] < now - WINDOW_S:
                self._points.popleft()

    @property
    def numbers(self) -> tuple[int, int | None, int]:
        return self.done, self.total, self.bad

    @property
    def elapsed_s(self) -> float:
        return self.now - self.began

    @property
    def rate(self) -> float | None:
        """Per second; None where nothing can be said yet."""
        since, before = (self.began, self.first) if self.done == self.total else self._points[0]
        if self.now - since <= 0 or self.done == before:
            return None
        return (self.done - before) / (self.now - since)

    @property
    def eta_s(self) -> float | None:
        """Seconds left; None where nothing can be said."""
        if self.total is None or (self.rate is None and self.done < self.total):
            return None
        return max(0, self.total - self.done) / self.rate if self.rate else 0.0


def in_words(seconds: float) -> str:
    """A time span, to two units: `3 h 9 min`, `12 s`, `0.4 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def in_words_rate(rate: float) -> str:
    """A rate with three digits, per second or, where that is little, per minute or hour."""
    unit, size = ("s", 1) if rate >= 1 else ("min", 60) if rate * 60 >= 1 else ("h", 3600)
    value = rate * size
    return f"{value:.0f}/{unit}" if value >= 100 else f"{value:.3g}/{unit}"
