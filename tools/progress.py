"""How long jobs talk: a bar on a terminal, lines in a log file, JSON for a log collector, or nothing but errors.

Progress and messages go to stderr, results to stdout, so that a command's result can be piped while it is watched.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal, Protocol, get_args

from framestream.pipeline.errors import ConfigError

from .progress_pace import Pace, in_words, in_words_rate

Output = Literal["auto", "bar", "plain", "json", "quiet"]
LINE_EVERY_S = 10.0  # lines and JSON
DRAW_EVERY_S = 0.1  # the bar
_UNUSABLE_TERMINALS = ("dumb", "unknown")  # they cannot move the cursor


class _Sink(Protocol):
    """Where a `Reporter` writes."""

    first_after_s: float  # how long a step waits for its first showing
    every_s: float

    def progress(self, pace: Pace) -> None: ...
    def message(self, text: str, facts: Mapping[str, Any]) -> None: ...
    def error(self, text: str) -> None: ...
    def end(self, lines: Sequence[str], facts: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Reporter:
    """Tells how a job goes. Made by `reporting`; may be called ten thousand times a second, from any thread."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._steps: dict[str, Pace] = {}
        self._lock = threading.RLock()

    def step(self, step: str, done: int, total: int | None, bad: int) -> None:
        """`done` of `total` (None where unknown) things of `step` are done, `bad` of all are lost or wrong."""
        now = time.monotonic()
        with self._lock:
            pace = self._steps.get(step)
            if pace is None:
                self._show_unshown()  # a new step begins where the one before has ended
                pace = self._steps[step] = Pace(step, done, now)
                pace.next_shown = now + self._sink.first_after_s
            pace.update(done, total, bad, now)
            ends = done == total and not pace.ended
            if ends or now >= pace.next_shown:
                pace.ended = pace.ended or ends
                self._show(pace)

    __call__ = step

    def say(self, text: str, **facts: Any) -> None:
        """One event in a sentence; `facts` are for those who read JSON."""
        with self._lock:
            self._sink.message(text, facts)

    def error(self, text: str) -> None:
        """Say why the command failed. This alone is shown in every mode."""
        with self._lock:
            self._sink.error(text)

    def end(self, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        """The result, on stdout: `lines`, or one JSON object of `facts`. Progress is over with that."""
        with self._lock:
            self._show_unshown()
            self._sink.end(lines, facts)

    def close(self) -> None:
        """Show what was not shown yet and give the terminal back."""
        with self._lock:
            self._show_unshown()
            self._sink.close()

    def _show(self, pace: Pace) -> None:
        pace.next_shown = pace.now + self._sink.every_s
        pace.shown = pace.numbers
        self._sink.progress(pace)

    def _show_unshown(self) -> None:
        for pace in self._steps.values():
            if pace.shown != pace.numbers:
                self._show(pace)


@contextmanager
def reporting(command: str, output: Output = "auto", *, counted: str = "rejected") -> Iterator[Reporter]:
    """A `Reporter` for the time of a job; what is logged meanwhile goes through it too.

    Args:
        command: the name of the command, for messages and JSON.
        output: `auto` is a bar where stderr is a terminal and lines elsewhere; `bar`; `plain` is a line every 10 s
            and at each step's end; `json` is JSON lines on stderr and one object on stdout; `quiet` shows errors only.
        counted: what the numbers `bad` of steps count.

    Raises:
        ConfigError: an unknown `output`.
    """
    if output not in get_args(Output):
        raise ConfigError(f"log output is {output!r}, it has to be one of {', '.join(get_args(Output))}")
    reporter = Reporter(_sink(command, output, counted))
    try:
        with _logged_by(reporter):
            yield reporter
    finally:
        reporter.close()


def _sink(command: str, output: Output, counted: str) -> _Sink:
    if output == "auto":
        terminal = sys.stderr.isatty() and os.environ.get("TERM") not in _UNUSABLE_TERMINALS
        output = "bar" if terminal else "plain"
    if output == "bar":
        from .progress_bar import BarSink

        return BarSink(command, counted)
    return {"plain": _Plain, "json": _Json, "quiet": _Quiet}[output](command, counted)


class _Plain:
    first_after_s = every_s = LINE_EVERY_S

    def __init__(self, command: str, counted: str) -> None:
        self.command, self.counted = command, counted

    def progress(self, pace: Pace) -> None:
        of = "" if pace.total is None else f"/{pace.total}"
        facts = [f"{pace.step} {pace.done}{of}"]
        if pace.rate is not None:
            facts.append(in_words_rate(pace.rate))
        if pace.done == pace.total:
            facts.append(f"took {in_words(pace.elapsed_s)}")
        elif pace.eta_s is not None:
            facts.append(f"{in_words(pace.eta_s)} left")
        facts.append(f"{pace.bad} {self.counted}")
        self.message(", ".join(facts), {})

    def message(self, text: str, facts: Mapping[str, Any]) -> None:
        _write(sys.stderr, text)

    def error(self, text: str) -> None:
        _write(sys.stderr, f"framestream {self.command}: {text}")

    def end(self, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        for line in lines:
            _write(sys.stdout, line)

    def close(self) -> None:
        sys.stderr.flush()


class _Quiet(_Plain):
    def progress(self, pace: Pace) -> None:
        pass

    def message(self, text: str, facts: Mapping[str, Any]) -> None:
        if facts.get("level") in ("error", "critical"):
            self.error(text)

    def end(self, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        pass


class _Json(_Plain):
    """One object a line, each with `time` (ISO 8601, UTC), `command` and `event`."""

    def progress(self, pace: Pace) -> None:
        rate, eta = pace.rate, pace.eta_s
        self._event(
            "progress",
            step=pace.step,
            done=pace.done,
            total=pace.total,
            rate=None if rate is None else round(rate, 3),
            eta_s=None if eta is None else round(eta, 1),
            elapsed_s=round(pace.elapsed_s, 1),
            bad=pace.bad,
        )

    def message(self, text: str, facts: Mapping[str, Any]) -> None:
        self._event("message", text=text, **({"facts": facts} if facts else {}))

    def error(self, text: str) -> None:
        self._event("error", text=text)

    def end(self, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        self._event("end", facts=facts)
        _write(sys.stdout, json.dumps(facts, default=str))

    def _event(self, event: str, **facts: Any) -> None:
        moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": moment, "command": self.command, "event": event, **facts}
        _write(sys.stderr, json.dumps(line, default=str))


class _LogHandler(logging.Handler):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.say(record.getMessage(), level=record.levelname.lower(), logger=record.name)


@contextmanager
def _logged_by(reporter: Reporter) -> Iterator[None]:
    """Records that would go to stderr go through `reporter`: they must neither tear the bar nor stand among JSON."""
    root = logging.getLogger()
    theirs = [h for h in root.handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stderr]
    ours = _LogHandler(reporter)
    for handler in theirs:
        root.removeHandler(handler)
    root.addHandler(ours)
    try:
        yield
    finally:
        root.removeHandler(ours)
        for handler in theirs:
            root.addHandler(handler)


def printable(text: str) -> str:
    """`text` without what a terminal would obey and a stream cannot encode, as names of files may have it."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _write(stream: Any, line: str) -> None:
    stream.write(printable(line) + "\n")  # one call, so that lines of several processes stay whole
    stream.flush()
