"""The bar of `tools/progress.py`, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from .progress import DRAW_EVERY_S, printable
from .progress_pace import Pace, in_words, in_words_rate

_COUNT_WIDTH = 15  # 1000000/1000000


class BarSink:
    """One bar per step: how far, how fast, how long still, how long already, and how many are `counted`."""

    first_after_s = 0.0
    every_s = DRAW_EVERY_S

    def __init__(self, command: str, counted: str) -> None:
        self.command = command
        self._console = Console(stderr=True, force_terminal=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(None, table_column=Column(ratio=1)),  # takes the room that is left, and gives way first
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=_COUNT_WIDTH)),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            TextColumn(f"{{task.fields[bad]}} {counted}"),
            console=self._console,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe must not come out here
        )
        self._tasks: dict[str, TaskID] = {}
        self._bar.start()

    def progress(self, pace: Pace) -> None:
        facts: dict[str, Any] = {
            "total": pace.total,
            "completed": pace.done,
            "rate": "-/s" if pace.rate is None else in_words_rate(pace.rate),
            "left": "" if not pace.eta_s else f"{in_words(pace.eta_s)} left",
            "bad": pace.bad,
        }
        if pace.step in self._tasks:
            self._bar.update(self._tasks[pace.step], **facts)
        else:
            self._stop_steps()
            self._tasks[pace.step] = self._bar.add_task(pace.step, **facts)

    def message(self, text: str, facts: Mapping[str, Any]) -> None:
        self._console.print(printable(text), markup=False)

    def error(self, text: str) -> None:
        self._console.print(printable(f"framestream {self.command}: {text}"), markup=False)

    def end(self, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        self.close()
        for line in lines:
            print(printable(line))

    def close(self) -> None:
        self._stop_steps()
        self._bar.stop()

    def _stop_steps(self) -> None:
        for task in self._bar.tasks:
            if task.stop_time is None:  # once: stopping again would move the end
                self._bar.stop_task(task.id)
            if task.total is None:
                self._bar.update(task.id, total=task.completed)  # no pulse where nothing happens any more
