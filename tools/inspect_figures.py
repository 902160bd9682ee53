"""Pictures of the inspection page as inline SVG in its colours: distributions, clips on a time line, the mask."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.masks import FrameMask

from .figures import INK, MODEL, MUTED, SECOND, themed
from .inspect_clips import SeenClip
from .inspect_splits import spread
from .inspect_text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_OVERLAID = 3  # splits in one chart; more of them are drawn as one
MAX_TICKS = 300  # on a time line, of frames and of key frames
_BINS = 24
_LOG_FROM = 50  # largest over smallest value from which on the axis is logarithmic
_WIDTH = 960.0  # of a time line
_THUMB_SIDE = 56.0  # on a time line, at least: what a label needs


def spelled(values: np.ndarray, unit: str) -> str:
    """A distribution in words."""
    low, lower, middle, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    if low == high:
        return f"all {number(low)} {unit}"
    return (
        f"from {number(low)} to {number(high)} {unit}, median {number(middle)}, "
        f"half of them from {number(lower)} to {number(upper)}"
    )


def number(value: float) -> str:
    """Three digits, without an exponent: 0.04, 1.33, 250, 12,400."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.1f}".removesuffix(".0")


def histogram(name: str, title: str, unit: str, series: Sequence[tuple[str, np.ndarray]]) -> str:
    """One chart of up to `MAX_OVERLAID` series of numbers, float `[n]` each: bars for the first, lines for the rest."""
    everything = np.concatenate([values for _, values in series])
    low, high = float(everything.min()), float(everything.max())
    logarithmic = low > 0 and high / low >= _LOG_FROM
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # rounding must not leave the extremes out

    def draw(axes: Axes) -> None:
        for place, (_, values) in enumerate(series):
            shares = 100 * np.histogram(values, edges)[0] / len(values)
            if place == 0:
                axes.stairs(shares, edges, fill=True, color=MODEL, alpha=0.85)
            else:
                dash = "solid" if place == 1 else (0, (2, 2))
                axes.stairs(shares, edges, color=SECOND if place == 1 else INK, linewidth=2, linestyle=dash)
        axes.set_xscale("log" if logarithmic else "linear")
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        if logarithmic:
            axes.xaxis.minorticks_off()
            axes.set_xticks(_round_ticks(low, high))
        axes.set_xlabel(unit, color=MUTED, fontsize=13)
        axes.margins(x=0.02)

    said = "; ".join(f"{split + ': ' if split else ''}{spelled(values, unit)}" for split, values in series)
    return themed(draw, f"chart-{name}", shown(f"{title}, {said}.", 1000), 440, 240)


def _round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two numbers; fewer where those would be too many."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 7:
            break
    return ticks


def timeline(key: str, clip: SeenClip) -> str:
    """One clip: slow frames above a time line, fast frames below, each tied to its moment; key frames as ticks."""
    rows = {s: [i for i in range(len(clip.stream)) if clip.stream[i] == s and clip.valid[i]] for s in (0, 1)}
    columns = max(8, len(rows[0]), len(rows[1]))
    side = max(_THUMB_SIDE, (_WIDTH - 8 * (columns - 1)) / columns)
    width = columns * (side + 8) - 8  # more than _WIDTH for many frames: the page lets it scroll
    axis = side + 92 if rows[0] else 44.0
    height = axis + 66 + side + 42
    times = clip.info.timestamps
    span = max(clip.info.duration, 1e-6)

    def at(seconds: float) -> float:
        return 16 + (width - 32) * min(seconds / span, 1.0)

    def seconds_of(frame: int) -> float:
        return frame / clip.info.fps if times is None else times[frame]

    def tick(kind: str, frame: int, reach: float) -> str:
        x = at(seconds_of(frame))
        return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{axis - reach:.1f}" y2="{axis + reach:.1f}"/>'

    parts = [f'<line class="axis" x1="16" x2="{width - 16:.0f}" y1="{axis:.1f}" y2="{axis:.1f}"/>']
    if clip.info.num_frames <= MAX_TICKS:
        parts += [tick("tick", frame, 3) for frame in range(clip.info.num_frames)]
    keys = clip.info.key_frames
    parts += [tick("key", keys[k], 8) for k in spread(MAX_TICKS, len(keys))]
    if not any(clip.frame_time[i] < 0.06 * span for i in rows[1]):  # else a fast frame stands there, which says its own
        parts.append(f'<text class="start" x="{at(0):.1f}" y="{axis + 22:.1f}">0 s</text>')
    parts.append(f'<text class="end" x="{at(span):.1f}" y="{axis - 12:.1f}">{_second(span)}</text>')
    for stream, name in ((0, "slow"), (1, "fast")):
        left = (width - len(rows[stream]) * (side + 8) + 8) / 2
        top = 0.0 if stream == 0 else axis + 66
        label = side + 16 if stream == 0 else top + side + 16
        edge, mark = (side + 38, axis - 13) if stream == 0 else (top, axis + 13)
        for column, i in enumerate(sorted(rows[stream], key=clip.frame_index.__getitem__)):
            x, moment = left + column * (side + 8), at(clip.frame_time[i])
            middle, centre = (edge + mark) / 2, x + side / 2
            parts.append(
                f'<path class="tie {name}" d="M{centre:.1f} {edge:.1f}C{centre:.1f} {middle:.1f} {moment:.1f} '
                f'{middle:.1f} {moment:.1f} {mark:.1f}"/>'
                f'<image x="{x:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" href="{clip.thumbs[i]}"/>'
                f'<rect class="frame {name}" x="{x:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}"/>'
                f'<text class="index" x="{centre:.1f}" y="{label:.1f}">{clip.frame_index[i]}</text>'
                f'<text x="{centre:.1f}" y="{label + 15:.1f}">{_second(clip.frame_time[i])}</text>'
            )
            parts.append(
                f'<circle class="mark slow" cx="{moment:.1f}" cy="{axis - 13:.1f}" r="5"/>'
                if stream == 0
                else f'<rect class="mark fast" x="{moment - 4.5:.1f}" y="{axis + 8.5:.1f}" width="9" height="9"/>'
            )
    said = "; ".join(
        f"{len(rows[s])} {name} frames from {clip.frame_time[rows[s][0]]:.2f} to {clip.frame_time[rows[s][-1]]:.2f} s"
        for s, name in ((0, "slow"), (1, "fast"))
        if rows[s]
    )
    said = f"Time line of clip {key}, {span:.2f} seconds: {said}; key frames at {len(keys)} places."
    return (
        f'<svg class="timeline" style="min-width:{0.75 * width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(said)}">' + "".join(parts) + "</svg>"
    )


def _second(seconds: float) -> str:
    return f"{seconds:.{2 if seconds < 100 else 1 if seconds < 1000 else 0}f} s"


def mask_picture(rule: str, layout: FrameLayout, mask: FrameMask, leaking: int) -> str:
    """The frame-level mask of one clip: rows ask, columns answer; a ring marks the frame that a row has to predict."""
    matrix, frames = mask.matrix().numpy(), layout.num_frames
    cell, head = max(3.0, min(30.0, 560 / frames)), 104.0
    edge = head + frames * cell
    every = max(1, round(16 / cell))
    gap = 1.0 if cell > 8 else 0.25
    shapes = {"off": [""], "slow": [""], "fast": [""]}
    parts: list[str] = []
    for k in range(frames):
        name, place = ("fast" if layout.stream[k] else "slow"), head + k * cell
        parts.append(
            f'<rect class="{name}" x="{place + gap:.1f}" y="{head - 7}" width="{cell - 2 * gap:.1f}" height="4"/>'
            f'<rect class="{name}" x="{head - 7}" y="{place + gap:.1f}" width="4" height="{cell - 2 * gap:.1f}"/>'
        )
        if k % every == 0:
            said = f"{name} {_second(layout.frame_time[k])}" if layout.frame_time else f"{name} {layout.frame_index[k]}"
            said = said if layout.valid[k] else f"({said})"
            middle = place + cell / 2 + 4.5
            parts.append(
                f'<text class="row" x="{head - 12}" y="{middle:.1f}">{said}</text>'
                f'<text class="column" transform="translate({middle:.1f} {head - 12}) rotate(-90)">{said}</text>'
            )
        for j in range(frames):
            kind = ("fast" if layout.stream[j] else "slow") if matrix[k, j] else "off"
            width = cell - 2 * gap
            shapes[kind].append(f"M{head + j * cell + gap:.1f} {place + gap:.1f}h{width:.1f}v{width:.1f}h-{width:.1f}z")
    parts += [f'<path class="cell {kind}" d="{"".join(drawn)}"/>' for kind, drawn in shapes.items()]
    targets = next_frame_targets(layout)
    parts += [
        f'<circle class="target" cx="{head + (target + 0.5) * cell:.1f}" cy="{head + (k + 0.5) * cell:.1f}" '
        f'r="{cell * 0.24:.1f}"/>'
        for k, target in enumerate(targets)
        if target >= 0
    ]
    said = (
        f"Frame-level mask {rule}, {frames} by {frames} frames, {mask.density:.0%} of the token pairs may attend. "
        f"{leaking} of {sum(target >= 0 for target in targets)} frames that are to be predicted can be seen."
    )
    return (
        f'<svg class="mask" viewBox="0 0 {edge + 2:.0f} {edge + 2:.0f}" role="img" aria-label="{escape(said)}">'
        + "".join(parts)
        + "</svg>"
    )
