"""The result of an ablation as JSON, as a Markdown table, as a picture and as one HTML page."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framestream.model.checkpoint import write_json
from framestream.pipeline.atomic import atomic_write

from . import figures
from .ablate_rows import Row
from .bench_picture import blank_figure
from .config import leaves
from .pages import page_environment
from .results import versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS_FILE, MARKDOWN_FILE, PICTURE_FILE, PAGE_FILE = (f"ablation.{end}" for end in ("json", "md", "png", "html"))
ABOUT = {
    "sprites": "Squares that move at constant speed: two frames determine the next, and a longer memory adds nothing.",
    "memory": "Coloured bars, shown first, then hidden, and laid open one by one at the end: what comes next can only "
    "be remembered.",
    "clips": "Clips of real videos.",
}
_PRINT = {"ink": "#1c2026", "muted": "#5d646f", "line": "#dedbd3", "forced": "#0f7466", "made": "#7a4fb0"}
_PAGE = {
    "ink": figures.INK,
    "muted": figures.MUTED,
    "line": figures.LINE,
    "forced": figures.MODEL,
    "made": figures.SECOND,
}


def summary(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, standard deviation (of a sample; none of one value) and range over seeds; all None where one is None."""
    if any(value is None for value in values):
        return dict.fromkeys(("mean", "std", "min", "max"))
    known = [float(value) for value in values if value is not None]
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.mean(known), "std": std, "min": min(known), "max": max(known)}


def gather(
    settings: Mapping[str, Any],
    scores: Mapping[str, list[dict[str, Any]]],
    costs: Mapping[str, Mapping[str, float]],
    rows: Mapping[str, Row],
) -> dict[str, Any]:
    """All numbers: of each run, and their summaries over seeds."""
    found = {}
    for name, row in rows.items():
        runs = scores[name]
        found[name] = {
            **asdict(row),
            "leaking": runs[0]["leaking"],
            "forced": summary([run["teacher_forced"]["ratio"] for run in runs]),
            "rollout": [
                summary([run["rollout"][step]["ratio"] for run in runs]) for step in range(len(runs[0]["rollout"]))
            ],
            "cost": dict(costs[name]),
            "runs": runs,
        }
    first = next(iter(scores.values()))
    results = {
        "set": settings["set"],
        "about": ABOUT[settings["set"]],
        "created": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "seeds": len(first),
        "tokens": first[0]["tokens"],
        "fewest_tokens": first[0]["fewest_tokens"],
        "steps": settings["train"]["steps"],
        "batch_size": settings["batch_size"],
        "clips": first[0]["clips"],
        "targets": first[0]["teacher_forced"]["frames"],
        "rows": found,
        "settings": dict(settings),
        "versions": versions(),
    }
    results["findings"], results["reading"] = findings(results), how_to_read(len(first))
    return results


def findings(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say about the questions that the rows ask, a sentence each."""
    rows, said = results["rows"], []
    for better, worse, what in (
        ("frame_mask", "baseline", "A frame mask in place of token order, with the newest frames"),
        ("full", "frame_mask", "Slow frames in place of older ones, with a frame mask"),
        ("full", "fast_slow", "A frame mask in place of token order, with slow and fast frames"),
    ):
        if better in rows and worse in rows:
            forced = compared(rows[better]["forced"], rows[worse]["forced"])
            made = compared(rows[better]["rollout"][-1], rows[worse]["rollout"][-1])
            steps = len(rows[better]["rollout"])
            said.append(f"{what}: {forced} from true history; {made} in generated frame {steps}.")
    if "leaky" in rows and "full" in rows:
        forced = compared(rows["leaky"]["forced"], rows["full"]["forced"])
        made = compared(rows["leaky"]["rollout"][0], rows["full"]["rollout"][0])
        last = compared(rows["leaky"]["rollout"][-1], rows["full"]["rollout"][-1])
        said.append(
            f"A mask that shows targets, against the honest one: {forced} from true history; {made} in the first "
            f"generated frame, {last} in the last."
        )
    return said


def compared(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> str:
    """`less error (0.310 against 0.980)`; a difference counts where the ranges over seeds do not overlap.

    One seed has no range, and nothing is said of a difference.
    """
    values = [each[key] for each in (one, other) for key in ("mean", "min", "max")]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not measured"
    mean, low, high, other_mean, other_low, other_high = known
    numbers = f"{mean:.3f} against {other_mean:.3f}"
    if one["std"] is None or other["std"] is None:
        return f"{numbers} (one seed: no statement)"
    if high < other_low:
        return f"less error ({numbers})"
    if low > other_high:
        return f"more error ({numbers})"
    return f"no difference beyond that of seeds ({numbers})"


def how_to_read(seeds: int) -> str:
    """What a stated difference means with so many seeds, and how often chance alone makes one.

    If two rows of n runs do not differ, each of the C(2n, n) ways to mix their order is as likely, and in two of them
    all runs of one row come first.
    """
    if seeds < 2:
        return "One seed says nothing about differences: another seed gives other numbers. Use more seeds."
    return (
        f"A difference is called one where the ranges over {seeds} seeds do not overlap. For independent runs of rows "
        f"that do not differ, chance alone makes one in 1 of {math.comb(2 * seeds, seeds) // 2} comparisons."
    )


def _cell(values: Mapping[str, float | None]) -> str:
    if values["mean"] is None:
        return "not measured"
    spread = "" if values["std"] is None else f" ± {values['std']:.2f}"
    return f"{values['mean']:.2f}{spread}"


def markdown(results: Mapping[str, Any]) -> str:
    """The table, with a line on what it holds."""
    steps = len(next(iter(results["rows"].values()))["rollout"])
    head = ["", "frame mask", "fast-slow", "mask", "true history", *(f"generated {i + 1}" for i in range(steps))]
    head += ["ms per step", "MB per step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in results["rows"].values():
        cells = [row["title"], "yes" if row["frame_mask"] else "no", "yes" if row["fast_slow"] else "no"]
        cells += [row["mask"] if row["frame_mask"] else "token order", _cell(row["forced"])]
        cells += [_cell(step) for step in row["rollout"]]
        cells += [f"{row['cost']['ms']:.0f}", f"{row['cost']['mb']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    of_seeds = f"mean ± standard deviation of {results['seeds']} seeds" if results["seeds"] > 1 else "one seed"
    note = (
        f"Error / error of repeating the last frame, {of_seeds}; {results['steps']} steps of {results['batch_size']} "
        f"clips, {results['tokens']:.10g} tokens per clip in every row; {results['targets']} target frames of "
        f"{results['clips']} held-out clips, the same for every row."
    )
    found = [f"- {sentence}" for sentence in results["findings"]]
    return "\n".join([*lines, "", note, "", *found, "", results["reading"]]) + "\n"


def draw(axes: Axes, results: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """For each row the error from true history and in each generated frame; whiskers are the range over seeds."""
    rows = list(results["rows"].values())
    for kind, marker in (("forced", "o"), ("made", "s")):
        label = "from true history" if kind == "forced" else "generated, frame by frame"
        for place, row in enumerate(rows):
            points = [row["forced"]] if kind == "forced" else row["rollout"]
            x = [place - 0.28] if kind == "forced" else [place - 0.1 + 0.13 * i for i in range(len(points))]
            nan = math.nan
            mean, low, high = (
                [p[key] if p[key] is not None else nan for p in points] for key in ("mean", "min", "max")
            )
            axes.plot(x, mean, color=colours[kind], linewidth=1.2, marker=marker, label=label if not place else None)
            axes.vlines(x, low, high, color=colours[kind], linewidth=2.5, alpha=0.6)
    axes.axhline(1.0, color=colours["muted"], linewidth=1.2, linestyle=(0, (5, 3)))
    axes.set_xticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.4)
    axes.set_ylim(bottom=0)


def write_picture(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The results of one set, or of several beside each other, as a PNG."""
    figure = blank_figure(7.2 * len(results), 3.8)
    grid = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, one in zip(grid, results, strict=True):
        draw(axes, one, _PRINT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_PRINT["line"], linewidth=0.8)
        seeds = f"{one['seeds']} seeds" if one["seeds"] > 1 else "one seed"
        axes.set_title(f"{one['set']}: {seeds}, {one['steps']} steps", fontsize=10)
        axes.set_ylabel("error / error of repeating the last frame", fontsize=9)
    grid[0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def page(results: Mapping[str, Any]) -> str:
    """The whole page as a string: no script, no request. Numbers stand in `<data>` with their path in ablation.json."""
    from markupsafe import Markup

    def number(path: str, style: str = "{:.2f}") -> Markup:
        value: Any = results
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        if value is None:
            return Markup("<span>not measured</span>")
        return Markup('<data data-key="{}" value="{}">{}</data>').format(path, repr(value), style.format(value))

    environment = page_environment()
    label = "For each row the error from true history and in each generated frame; the table has the numbers."
    chart = figures.themed(lambda axes: draw(axes, results, _PAGE), "ablation", label, 960, 380)
    return environment.get_template("ablation.html.j2").render(
        r=results, n=number, chart=Markup(chart), settings=leaves(results["settings"])
    )


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """ablation.json, .md, .png and .html, each whole or not at all."""
    write_json(folder / RESULTS_FILE, results)
    atomic_write(folder / MARKDOWN_FILE, markdown(results).encode())
    atomic_write(folder / PAGE_FILE, page(results).encode())
    write_picture([results], folder / PICTURE_FILE)
