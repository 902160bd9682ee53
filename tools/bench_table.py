"""The tables that `framestream bench` prints: milliseconds, ratios, and in words what a table cannot hold."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .bench_rows import Row


def print_table(title: str, first: str, rows: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> None:
    """Print `rows`, each a mapping from column to cell; what a row lacks is shown as -."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column.replace(", ", ",\n").replace(" / ", " /\n"), justify="right", max_width=13)
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(column, "-") for column in columns))
    natural = Console(width=1000).measure(table).maximum  # a narrow terminal may wrap lines, but loses no figure
    Console(width=max(Console().width, natural)).print(table)


def columns_of(parts: Iterable[Iterable[str]]) -> list[str]:
    """Every name in the order in which it first appears."""
    return list(dict.fromkeys(name for part in parts for name in part))


def print_rows(name: str, rows: Sequence[Row]) -> None:
    """The table of a benchmark whose rows all have the same few candidates."""
    cells = {row.case: {k: f"{v:,.2f}" for k, v in (*row.ms.items(), *row.facts.items())} for row in rows}
    print_table(f"{name}: median milliseconds", "case", cells, columns_of(cells.values()))


def print_ratios(title: str, rows: Sequence[Row], percent: Sequence[str] = ()) -> None:
    """The facts of rows; those named in `percent` as a share of 100."""
    cells = {
        row.case: {k: f"{100 * v:.1f} %" if k in percent else _times(v) for k, v in row.facts.items()} for row in rows
    }
    print_table(title, "", cells, columns_of(cells.values()))


def print_milliseconds(title: str, rows: Sequence[Row], candidates: Sequence[str]) -> None:
    """Medians of many candidates; a candidate that no row has is left out, and said with the reason by `reasons`."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells[row.case] = {
            name: f"{ms:,.1f}" + (" (wrong)" if name in row.notes else "") for name, ms in row.ms.items()
        }
    there = [name for name in candidates if any(name in row.ms for row in rows)]
    print_table(title, "", cells, there)


def reasons(rows: Sequence[Row]) -> list[str]:
    """One sentence for each reason why a candidate was not measured or is marked, with the number of rows."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for name, reason in row.notes.items():
            found[name, reason].append(row.case)
    return [
        f"{name}: {reason} ({'everywhere' if len(cases) == len(rows) > 1 else ', '.join(cases)})"
        for (name, reason), cases in found.items()
    ]


def medians(rows: Sequence[Row], fact: str) -> str:
    """Median of a fact over rows, and its range where there are several."""
    values = [row.facts[fact] for row in rows if fact in row.facts]
    if not values:
        return "-"
    if len(values) == 1:
        return _times(values[0])
    return f"{_times(statistics.median(values))} ({_times(min(values))} to {_times(max(values))})"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
