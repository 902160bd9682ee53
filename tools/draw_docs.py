"""The pictures of the documentation, drawn from the package's own plans, layouts and masks.

python -m framestream.tools.draw_docs docs/images
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.mask_plot import STREAM_COLOURS, draw_matrix
from framestream.pipeline.masks import RULES, frame_causal, leaking_targets
from framestream.pipeline.sampling import FAST, SLOW, DenseSampling, FastSlowSampling, Sampling, SamplingPlan

from .bench_picture import blank_figure
from .drawn_batch import drawn_clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 144
_INK, _MUTED, _LINE, _PALE = "#22262b", "#6b7178", "#c9ccd1", "#f4f3ef"
_SEEN = "#1f3a5f"  # as in masks
_KEPT, _LEAKING = "#3fae6a", "#e0312f"
_LAYERS = 3  # of the predictor that targets leak through


def draw_docs(folder: str | Path) -> dict[str, Path]:
    """Draw every picture into `folder`, which must exist, and return the paths by name."""
    paths = {}
    for name, draw in PICTURES.items():
        figure = draw()
        paths[name] = Path(folder) / f"{name}.png"
        figure.savefig(paths[name], dpi=DPI)
    return paths


def draw_overview() -> Figure:
    """From a folder of videos to a trained model, and which of the three uses begins where."""
    figure, axes = _plain(9.0, 2.6)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 24)
    steps = (
        ("videos", "folders, lists,\nbuckets", _LINE),
        ("shards", "tars, an index,\na report", STREAM_COLOURS[FAST]),
        ("order", "which clip when;\na pure function", _SEEN),
        ("plan", "which frames\nof the clip", _SEEN),
        ("decode", "only what those\nframes need", _SEEN),
        ("batch", "frames, times,\nmask, positions", _SEEN),
        ("model", "next frame,\nrollout, audit", STREAM_COLOURS[SLOW]),
    )
    width, gap = 12.4, 2.0
    starts = [k * (width + gap) for k in range(len(steps))]
    for k, (left, (name, what, colour)) in enumerate(zip(starts, steps, strict=True)):
        axes.add_patch(
            FancyBboxPatch((left + 0.3, 13), width - 0.6, 10, boxstyle="round,pad=0.2,rounding_size=0.9",
                           facecolor=_PALE, edgecolor=colour, linewidth=1.4)
        )  # fmt: skip
        axes.text(left + width / 2, 20.6, name, ha="center", va="center", fontsize=11, fontweight="bold", color=_INK)
        axes.text(left + width / 2, 16.3, what, ha="center", va="center", fontsize=7.4, color=_MUTED, linespacing=1.3)
        if k:
            axes.annotate("", (left + 0.1, 18), (left - gap - 0.1, 18), arrowprops={"arrowstyle": "-|>", "color": _INK})
    uses = (
        (0, 1, 9.0, "use 1: the sharding tool"),
        (2, 5, 9.0, "use 2: the loader, in your own training code"),
        (2, 6, 3.2, "use 3: the training example, which uses the loader"),
    )
    for first, last, y, text in uses:
        left, right = starts[first] + 0.4, starts[last] + width - 0.4
        axes.plot([left, left, right, right], [y + 1, y, y, y + 1], color=_MUTED, linewidth=1)
        axes.text((left + right) / 2, y - 0.8, text, ha="center", va="top", fontsize=9, color=_INK)
    return figure


def draw_sampling() -> Figure:
    """The same clips under different samplings, each frame at its place in time."""
    keys = [0, 13, 26, 39, 52]
    rows: list[tuple[str, Sampling, int, int | None]] = [
        ("DenseSampling(16)", DenseSampling(16), 64, None),
        ("FastSlowSampling()\n8 slow over the whole clip", FastSlowSampling(), 64, None),
        ('slow_coverage="stride"\nthe most recent 8 x 4 frames', FastSlowSampling(slow_coverage="stride"), 64, None),
        ('slow_snap="keyframe"\nslow frames where decoding is cheap', FastSlowSampling(slow_snap="keyframe"), 64, None),
        ("fast_stride=2", FastSlowSampling(fast_stride=2), 64, None),
        ("end=40: the current moment\nlies before the end", FastSlowSampling(), 64, 40),
        ("a clip of 5 frames\n3 of 8 places only pad", FastSlowSampling(), 5, None),
    ]
    figure = blank_figure(9.6, 6.2)
    axes = figure.add_subplot()
    for y, (_, sampling, length, end) in enumerate(rows):
        snap = isinstance(sampling, FastSlowSampling) and sampling.slow_snap is not None
        options: dict[str, Any] = {"key_frames": keys} if snap else {}
        plan = sampling.plan(length, end=end, **options)
        axes.plot([-0.5, length - 0.5], [y, y], color=_LINE, linewidth=1.2, zorder=1)
        axes.plot(range(length), [y] * length, "|", color=_LINE, markersize=5, zorder=1)
        if snap:
            axes.plot(keys, [y] * len(keys), "|", color=_INK, markersize=15, markeredgewidth=1.4, zorder=2)
        if end is not None:
            axes.plot([end - 0.5] * 2, [y - 0.36, y + 0.36], color=_INK, linewidth=1.2, linestyle=(0, (3, 2)))
        for stream, offset, mark in ((SLOW, -0.19, "o"), (FAST, 0.19, "s")):
            frames = plan.frame_index[(plan.stream == stream) & plan.valid]
            axes.plot(frames, [y + offset] * len(frames), mark, color=STREAM_COLOURS[stream], markersize=5.5, zorder=3)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9, color=_INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-1.5, 64.5)
    axes.set_xlabel("source frame", color=_MUTED)
    axes.set_xticks([*range(0, 64, 8), 63])
    axes.tick_params(axis="x", colors=_MUTED)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    figure.legend(
        handles=[
            Line2D([], [], marker="o", linestyle="", color=STREAM_COLOURS[SLOW], label="slow frame"),
            Line2D([], [], marker="s", linestyle="", color=STREAM_COLOURS[FAST], label="fast frame"),
            Line2D([], [], marker="|", linestyle="", color=_INK, markersize=12, label="key frame"),
            Line2D([], [], color=_INK, linestyle=(0, (3, 2)), label="current moment"),
        ],
        loc="outside upper right", ncols=4, frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def draw_tokens() -> Figure:
    """What a frame mask is: four frames of three patches, by frame and by token."""
    frames, patches = 4, 3
    layout = FrameLayout.from_arrays(range(frames), patches=patches)
    size = frames * patches
    masks = (
        ("frame_causal: the patches of a frame\nsee each other and all earlier frames", frame_causal(layout).dense()),
        ("token order: a patch does not see\nthe patches beside it", torch.ones(size, size).tril().bool()),
    )
    figure = blank_figure(8.0, 4.4)
    for axes, (title, mask) in zip(figure.subplots(1, 2), masks, strict=True):
        draw_matrix(axes, mask.numpy())
        axes.set_title(title, fontsize=10, color=_INK)
        places = np.arange(frames) * patches + (patches - 1) / 2
        axes.set_xticks(places, [f"frame {k}" for k in range(frames)], fontsize=8)
        axes.set_yticks(places, [f"frame {k}" for k in range(frames)], fontsize=8, rotation=90, va="center")
        for k in range(1, frames):
            for line in (axes.axhline, axes.axvline):
                line(k * patches - 0.5, color=STREAM_COLOURS[FAST], linewidth=1.4)
    return figure


def draw_masks() -> Figure:
    """Every rule on one fast-slow sequence, and which targets it lets their query see."""
    layout = FrameLayout.from_plan(FastSlowSampling(num_fast=5, num_slow=4).plan(12), patches=1)
    targets = next_frame_targets(layout)
    figure = blank_figure(9.6, 7.9)
    names = [f"{'sf'[s]}{i}" for s, i in zip(layout.stream, layout.frame_index, strict=True)]
    for axes, (name, rule) in zip(figure.subplots(2, 3).flat, RULES.items(), strict=True):
        mask = rule(layout)
        leaks = leaking_targets(layout, mask, _LAYERS)
        draw_matrix(axes, mask.matrix().numpy(), streams=layout.stream)
        axes.set_xticklabels(names)
        axes.set_yticklabels(names)
        lost = sum(leaks)
        window = " (3 frames)" if name == "sliding_window" else ""
        axes.set_title(f"{name}{window}\n", fontsize=11, color=_INK)
        said = "no target leaks" if not lost else f"{lost} of {sum(t >= 0 for t in targets)} targets leak"
        axes.text(0.5, 1.02, said, transform=axes.transAxes, ha="center", va="bottom", fontsize=9,
                  color=_LEAKING if lost else _KEPT)  # fmt: skip
        for query, target in enumerate(targets):
            if target >= 0:
                colour = _LEAKING if leaks[query] else _KEPT
                axes.add_patch(Circle((target, query), 0.27, fill=False, edgecolor=colour, linewidth=1.8))
    figure.legend(
        handles=[
            Rectangle((0, 0), 1, 1, facecolor=_SEEN, label="may attend"),
            _ring(_KEPT, "target of the row, out of its reach"),
            _ring(_LEAKING, f"target that leaks, directly or through {_LAYERS} layers"),
        ],
        loc="outside lower center", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def draw_batch() -> Figure:
    """What one clip of a batch holds, frame by frame: a clip of seven frames, sampled as 4 slow and 8 fast."""
    length, fps, patches, size = 7, 25.0, 2, 64
    plan = FastSlowSampling(num_fast=8, num_slow=4).plan(length)
    batch = ClipCollator(patches_per_frame=patches)([_made_up_clip(plan, fps, size)])
    layout = FrameLayout.from_plan(plan, patches=patches)
    positions = batch["frame_position_ids"][0].reshape(-1, patches)
    targets = next_frame_targets(layout)
    rows: list[tuple[str, Callable[[int], str]]] = [
        ("frame_index", lambda k: str(int(batch["frame_index"][0, k]))),
        ("frame_time", lambda k: f"{float(batch['frame_time'][0, k]):.2f}"),
        ("frame_stream", lambda k: f"{int(batch['frame_stream'][0, k])}"),
        ("frame_valid", lambda k: "yes" if batch["frame_valid"][0, k] else "no"),
        (f"frame_position_ids\n({patches} patches a frame)", lambda k: " ".join(str(int(p)) for p in positions[k])),
        ("predicts place\n(next_frame_targets)", lambda k: "" if targets[k] < 0 else str(targets[k])),
    ]
    figure, axes = _plain(9.6, 4.3)
    count = plan.num_frames
    axes.set_xlim(-2.6, count)
    axes.set_ylim(len(rows) + 1.55, -1.0)
    for k in range(count):
        valid = bool(plan.valid[k])
        colour = STREAM_COLOURS[int(plan.stream[k])]
        axes.text(k + 0.5, -0.2, str(k), ha="center", va="center", fontsize=8, color=_MUTED)
        picture = batch["video_frames"][0, k].permute(1, 2, 0).numpy()
        axes.imshow(picture, extent=(k + 0.06, k + 0.94, 1.0, 0.06), alpha=1.0 if valid else 0.25, aspect="auto")
        axes.add_patch(
            Rectangle((k + 0.06, 0.06), 0.88, 0.94, fill=False, edgecolor=colour, linewidth=1.8,
                      linestyle="-" if valid else (0, (2, 2)))
        )  # fmt: skip
        for y, (_, text) in enumerate(rows):
            axes.add_patch(Rectangle((k + 0.06, y + 1.24), 0.88, 0.72, facecolor=_PALE if valid else "none"))
            axes.text(k + 0.5, y + 1.6, text(k), ha="center", va="center", fontsize=8.5, color=_INK if valid else _LINE)
    heads = [("place in the sequence", -0.2), ("video_frames", 0.53)]
    heads += [(name, row + 1.6) for row, (name, _) in enumerate(rows)]
    for head, height in heads:
        axes.text(-0.15, height, head, ha="right", va="center", fontsize=8.5, color=_INK if height > 0 else _MUTED)
    streams = ((0, 4, "slow: over the whole clip", SLOW), (4, count, "fast: the newest frames", FAST))
    for first, last, name, stream in streams:
        axes.text((first + last) / 2, -0.75, name, ha="center", va="center", fontsize=9, color=STREAM_COLOURS[stream])
    said = f"A clip of {length} frames at {fps:g} a second. Dashed: a place that only keeps the shape; nobody sees it."
    axes.text(count, len(rows) + 1.35, said, ha="right", va="center", fontsize=8, color=_MUTED)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "overview": draw_overview,
    "sampling": draw_sampling,
    "tokens": draw_tokens,
    "masks": draw_masks,
    "batch": draw_batch,
}


def _made_up_clip(plan: SamplingPlan, fps: float, size: int) -> dict[str, Any]:
    """What `ClipTransform` would give of a film in which a ball rises and falls."""
    y, x = np.mgrid[0:size, 0:size] / size
    frames = []
    for index in plan.frame_index:
        place = (index + 0.5) / (plan.frame_index.max() + 1)
        ball = (x - 0.1 - 0.8 * place) ** 2 + (y - 0.2 - 2.2 * (place - 0.5) ** 2) ** 2 < 0.012
        sky = np.stack([150 + 60 * y, 185 + 40 * y, 225 - 20 * y], axis=-1)
        frames.append(np.where(ball[..., None], (214, 69, 44), sky).astype(np.uint8).transpose(2, 0, 1))
    return drawn_clip(torch.from_numpy(np.stack(frames)), plan, fps)


def _plain(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with axes that show nothing of themselves."""
    figure = blank_figure(width, height)
    axes = figure.add_subplot()
    axes.set_axis_off()
    return figure, axes


def _ring(colour: str, label: str) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", markerfacecolor="none", markeredgecolor=colour,
                  markeredgewidth=1.8, markersize=9, label=label)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw into the folder that is the one argument."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m framestream.tools.draw_docs FOLDER (an existing one)", file=sys.stderr)
        return 2
    for path in draw_docs(arguments[0]).values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
