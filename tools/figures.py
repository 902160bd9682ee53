"""Pictures of the report page, as inline SVG that takes its colours from the page (light and dark) and its own PNGs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from .results import ClipView, MaskView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib draws in these colours; the page replaces them by its own variables.
_INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--model)",
    "#050505": "var(--second)",
    "#060606": "var(--copy)",
}
INK, MUTED, LINE, MODEL, SECOND, COPY = _INKS


def png_uri(image: np.ndarray) -> str:
    """uint8 `[H,W,3]` as a data URI."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(image), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def difference_uri(one: np.ndarray, other: np.ndarray, full_scale: float) -> str:
    """Mean absolute difference of two uint8 `[H,W,3]` pictures over the channels; `full_scale` (0..1) is brightest."""
    from matplotlib import colormaps

    gap = np.abs(one.astype(np.float32) - other.astype(np.float32)).mean(-1) / 255.0
    coloured = colormaps["magma"](np.clip(gap / full_scale, 0.0, 1.0))[..., :3]
    return png_uri((coloured * 255).round().astype(np.uint8))


def themed(draw: Callable[[Axes], None], name: str, label: str, width: float, height: float) -> str:
    """A matplotlib chart as inline SVG: page colours, page fonts, ids of its own."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 13}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=13, length=0, pad=6)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        draw(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for ink, variable in _INKS.items():
        svg = svg.replace(ink, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px var(--sans)", svg)
    opening = rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', opening, svg, count=1)


def loss_chart(train: Sequence[Sequence[float]], label: str) -> str:
    """Training loss `[(step, loss)]`: every value faint, and a running mean."""
    steps, losses = np.array([row[0] for row in train]), np.array([row[1] for row in train])

    def draw(axes: Axes) -> None:
        axes.plot(steps, losses, color=COPY, linewidth=1, alpha=0.55)
        axes.plot(steps, _running_mean(losses), color=MODEL, linewidth=2.4)
        axes.set_xlabel("optimiser step", color=MUTED, fontsize=13)
        axes.set_yscale("log" if losses.min() > 0 and losses.max() > 8 * losses.min() else "linear")
        axes.margins(x=0.01)

    return themed(draw, "loss", label, 520, 300)


def held_out_chart(curve: Sequence[Sequence[float | None]], label: str) -> str:
    """Error ratios on held-out clips during training: `[(step, teacher-forced, rollout step 1)]`."""
    rows = np.array(curve, dtype=np.float64).reshape(-1, 3)

    def draw(axes: Axes) -> None:
        axes.axhline(1.0, color=COPY, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.plot(rows[:, 0], rows[:, 2], color=SECOND, linewidth=2.4, marker="s", markersize=5)
        axes.plot(rows[:, 0], rows[:, 1], color=MODEL, linewidth=2.4, marker="o", markersize=5)
        axes.set_xlabel("optimiser step", color=MUTED, fontsize=13)
        measured = rows[:, 1:][np.isfinite(rows[:, 1:])]
        low, high = float(measured.min(initial=1.0)), float(measured.max(initial=1.0))
        axes.set_ylim(min(0.9, low) - 0.06, max(1.05, min(high, 1.6)) + 0.04)

    return themed(draw, "heldout", label, 520, 300)


def ratio_chart(forced: Sequence[float | None], rollout: Sequence[float | None], label: str) -> str:
    """Bars of model error / copy-last error per rollout step, beside the teacher-forced ones on the same frames."""
    places = np.arange(len(rollout))
    top = max([1.0] + [value for value in (*forced, *rollout) if value is not None])

    def draw(axes: Axes) -> None:
        for values, shift, ink in ((forced, -0.2, MODEL), (rollout, 0.2, SECOND)):
            heights = [math.nan if value is None else value for value in values]
            axes.bar(places + shift, heights, width=0.36, color=ink)
            for x, value in zip(places + shift, heights, strict=True):
                if math.isfinite(value):
                    axes.text(x, value + 0.015 * top, f"{value:.2f}", ha="center", va="bottom", color=INK, fontsize=12)
        axes.axhline(1.0, color=COPY, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_xticks(places, [f"frame {place + 1}" for place in places])
        axes.set_ylim(0, top * 1.12)

    return themed(draw, "ratios", label, 520, 300)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last tenth of the run, so that the line ends where the run ends."""
    window = max(1, len(values) // 10)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


_WIDTH = 960.0


def timeline(clip: ClipView, pictures: np.ndarray) -> str:
    """One clip: slow frames above a time line, fast frames below, each tied to its own moment."""
    rows = {
        stream: [i for i in range(len(clip.stream)) if clip.stream[i] == stream and clip.valid[i]] for stream in (0, 1)
    }
    columns = max(len(row) for row in rows.values())
    size = min(104.0, (_WIDTH - 8 * (columns - 1)) / columns)
    has_slow = bool(rows[0])
    axis_y = size + 84 if has_slow else 40.0
    height = axis_y + 62 + size + 26
    span = max(clip.seconds, clip.source_times[-1], 1e-6)

    def at(seconds: float) -> float:
        return 16 + (_WIDTH - 32) * seconds / span

    parts = [f'<line class="axis" x1="{at(0):.1f}" x2="{at(span):.1f}" y1="{axis_y}" y2="{axis_y}"/>']
    parts += [
        f'<line class="tick" x1="{at(t):.1f}" x2="{at(t):.1f}" y1="{axis_y - 3}" y2="{axis_y + 3}"/>'
        for t in clip.source_times[:600]
    ]
    # The beginning is labelled below the line and the end above it, where no frame of the other stream stands.
    for seconds, anchor, y in ((0.0, "start", axis_y + 20), (clip.source_times[-1], "end", axis_y - 10)):
        parts.append(f'<text class="{anchor}" x="{at(seconds):.1f}" y="{y:.1f}">{seconds:.2f} s</text>')
    for stream, name in ((0, "slow"), (1, "fast")):
        members = sorted(rows[stream], key=lambda i: clip.frame_index[i])
        left = (_WIDTH - len(members) * size - 8 * max(0, len(members) - 1)) / 2
        top = 22.0 if stream == 0 else axis_y + 62
        edge, mark = (top + size, axis_y - 9) if stream == 0 else (top, axis_y + 9)
        for column, i in enumerate(members):
            x, seconds, index = left + column * (size + 8), clip.frame_time[i], clip.frame_index[i]
            middle = (edge + mark) / 2
            parts.append(
                f'<path class="tie {name}" d="M{x + size / 2:.1f} {edge:.1f} C{x + size / 2:.1f} {middle:.1f} '
                f'{at(seconds):.1f} {middle:.1f} {at(seconds):.1f} {mark:.1f}"/>'
                f'<image x="{x:.1f}" y="{top:.1f}" width="{size:.1f}" height="{size:.1f}" '
                f'href="{png_uri(pictures[i])}"><title>{name} frame {index}, {seconds:.2f} s</title></image>'
                f'<rect class="frame {name}" x="{x:.1f}" y="{top:.1f}" width="{size:.1f}" height="{size:.1f}"/>'
                f'<text x="{x + size / 2:.1f}" y="{top - 7 if stream == 0 else top + size + 18:.1f}">{index}</text>'
            )
            parts.append(
                f'<circle class="mark slow" cx="{at(seconds):.1f}" cy="{axis_y - 9}" r="5"/>'
                if stream == 0
                else f'<rect class="mark fast" x="{at(seconds) - 4.5:.1f}" y="{axis_y + 4.5}" width="9" height="9"/>'
            )
    label = (
        f"Clip {clip.key}: {len(rows[0])} slow frames spread over {span:.2f} seconds and {len(rows[1])} fast frames "
        "at its end, each joined to its moment on a time line."
    )
    return f'<svg class="timeline" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">' + (
        "".join(parts) + "</svg>"
    )


def mask_picture(mask: MaskView) -> str:
    """The frame-level mask: rows ask, columns answer; a ring marks the frame that a row has to predict."""
    frames = len(mask.rows)
    cell, head = min(30.0, 560 / frames), 46.0
    edge = head + frames * cell
    every = 1 if cell >= 17 else 2 if cell >= 9 else 4
    parts = []
    for k in range(frames):
        name = "fast" if mask.stream[k] else "slow"
        middle = head + (k + 0.5) * cell
        parts.append(
            f'<rect class="{name}" x="{head + k * cell + 1:.1f}" y="{head - 7}" width="{cell - 2:.1f}" height="4"/>'
            f'<rect class="{name}" x="{head - 7}" y="{head + k * cell + 1:.1f}" width="4" height="{cell - 2:.1f}"/>'
        )
        if k % every == 0:
            index = mask.frame_index[k]
            parts.append(
                f'<text x="{middle:.1f}" y="{head - 13}">{index}</text>'
                f'<text class="row" x="{head - 12}" y="{middle + 4.5:.1f}">{index}</text>'
            )
    for q in range(frames):
        for k in range(frames):
            seen = mask.rows[q][k] == "1"
            kind = ("fast" if mask.stream[k] else "slow") if seen else "off"
            x, y = head + k * cell, head + q * cell
            parts.append(
                f'<rect class="cell {kind}" x="{x + 1:.1f}" y="{y + 1:.1f}" '
                f'width="{cell - 2:.1f}" height="{cell - 2:.1f}"/>'
            )
            if mask.targets[q] == k:
                parts.append(
                    f'<circle class="target" cx="{x + cell / 2:.1f}" cy="{y + cell / 2:.1f}" r="{cell * 0.24:.1f}"/>'
                )
    label = (
        f"Frame-level mask {mask.rule}, {frames} by {frames} frames, {mask.density:.0%} filled. "
        f"{mask.leaking} of {sum(t >= 0 for t in mask.targets)} prediction targets can be seen by the frame that "
        "predicts them."
    )
    return (
        f'<svg class="mask" viewBox="0 0 {edge + 2:.0f} {edge + 2:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
