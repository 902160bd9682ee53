"""Progress on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)

Advance = Callable[[int, str], None]
_LINE_EVERY_S = 15.0


@contextmanager
def progress_bar(label: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Yields `advance(done, note)`: a bar with an ETA on a terminal, else a line every 15 seconds and at the end."""
    if quiet:
        yield lambda done, note: None
        return
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, note: str) -> None:
            nonlocal last
            if done >= total or time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                console.print(f"{label}: {done}/{total} {note}".rstrip())

        yield line
        return
    columns = (
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(28),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
