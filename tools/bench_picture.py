"""The pictures that `framestream bench` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_rows import Row, ratio

Rates = Mapping[str, Mapping[str, Mapping[int, float]]]  # set -> candidate -> number of workers -> clips a second

_INK, _FAINT = "#333333", "#d0d0d0"
# One colour and one mark for each candidate; ours stands out.
_MARKS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
_COLOURS = ("#d62728", "#ff9896", "#8c564b", "#9467bd", "#17457a", "#6f9fd0", "#3f7d20", "#a8c64a", "#7f7f7f")


def draw_bars(rows: Sequence[Row], path: Path, *, log: bool) -> None:
    """Milliseconds of few candidates as bars, a group per row."""
    candidates = list(rows[0].ms)
    height = 0.8 / len(candidates)
    figure = blank_figure(8, 1 + 0.3 * len(rows) * len(candidates))
    axes = figure.add_subplot()
    for k, candidate in enumerate(candidates):
        places = [row + k * height for row in range(len(rows))]
        bars = axes.barh(places, [row.ms[candidate] for row in rows], height * 0.92, label=candidate)
        axes.bar_label(bars, fmt="{:,.1f}", padding=3, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], [row.case for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median")
    axes.margins(x=0.15)
    if log:
        axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(candidates), frameon=False)
    figure.savefig(path, dpi=144)


def draw_against(rows: Sequence[Row], candidates: Sequence[str], base: str, title: str, path: Path) -> None:
    """Each candidate's time over that of `base` in the same round (medians), a line of marks per row, on a logarithmic
    scale; hollow marks are wrong frames. Rows without `base` are left out. The first candidate's figures are written
    at the edge."""
    rows = [row for row in rows if base in row.ms]
    figure = blank_figure(10, 2.0 + 0.42 * max(1, len(rows)))
    axes = figure.add_subplot()
    there = [name for name in candidates if name != base and any(name in row.ms for row in rows)]
    for y, row in enumerate(rows):
        found = {name: value for name in there if (value := ratio(row.times, name, base)) is not None}
        ends = [1.0, *found.values()]
        axes.plot([min(ends), max(ends)], [y, y], color=_FAINT, linewidth=1, zorder=1)
        for k, name in reversed(list(enumerate(there))):
            if name in found:
                colour = _COLOURS[k % len(_COLOURS)]
                axes.plot(
                    found[name], y, _MARKS[k % len(_MARKS)], color=colour, zorder=3 + (k == 0),
                    markerfacecolor="white" if name in row.notes else colour, markersize=9 if k == 0 else 6.5,
                )  # fmt: skip
        edge = axes.get_yaxis_transform()
        axes.text(1.01, y, f"{found[there[0]]:.2f}", transform=edge, color=_COLOURS[0], va="center", fontsize=9)
    axes.axvline(1.0, color=_INK, linewidth=1.2, zorder=2)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_yticks(range(len(rows)), [f"{row.case}   ({row.ms[base]:,.0f} ms)" for row in rows])
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set_xlabel(f"times as long as the {base} (in brackets), logarithmic; at the edge: {there[0] if there else ''}")
    axes.grid(axis="x", color="#ececec", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for k, name in enumerate(there):
        axes.plot([], [], _MARKS[k % len(_MARKS)], color=_COLOURS[k % len(_COLOURS)], label=name)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=144)


def draw_rates(rates: Rates, labels: Mapping[str, Mapping[str, str]], title: str, path: Path) -> None:
    """Clips per second as bars on a logarithmic scale: a panel per set, a group of bars per candidate, in it a bar per
    number of workers, paler for fewer. `labels` stand behind the bars: panel -> candidate -> text."""
    figure = blank_figure(10, 1.3 + sum(0.5 + 0.42 * len(panel) for panel in rates.values()))
    every = [rate for panel in rates.values() for group in panel.values() for rate in group.values()]
    heights = [len(panel) for panel in rates.values()]
    plots = figure.subplots(len(rates), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, panel) in zip(plots, rates.items(), strict=True):
        for y, (candidate, group) in enumerate(panel.items()):
            counts = sorted(group)
            tall = 0.8 / len(counts)
            colour = _COLOURS[0] if candidate.startswith("framestream") else _COLOURS[4]
            for k, count in enumerate(counts):
                place = y - 0.4 + (k + 0.5) * tall
                tone = 0.4 + 0.6 * (k + 1) / len(counts)
                axes.barh(place, group[count], tall * 0.9, color=colour, alpha=tone, zorder=2)
            end = max(group.values())
            axes.text(end, y, "  " + labels[name].get(candidate, ""), va="center", fontsize=9, color=_INK)
        axes.set_yticks(range(len(panel)), list(panel))
        axes.set_ylim(len(panel) - 0.45, -0.55)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.set_xlim(min(every) / 1.5, max(every) * 3)
        _plain_ticks(axes)
        axes.grid(axis="x", color="#ececec", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    plots[-1].set_xlabel("clips per second, logarithmic")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=144)


def blank_figure(width: float, height: float) -> Any:
    """A figure of so many inches that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain_ticks(axes: Any) -> None:
    """1, 2, 5, 10, … in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(LogLocator(subs=[k / 10 for k in range(1, 10)]))
