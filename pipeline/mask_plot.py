"""A picture of a mask that a person can check: rows are queries, columns are keys, filled = may attend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

STREAM_COLOURS = ("#2a78d6", "#d9622b")  # slow, fast


def draw_matrix(
    axes: object, matrix: np.ndarray, title: str | None = None, streams: Sequence[int] | None = None
) -> None:
    """Draw bool `[M, M]` into matplotlib axes; `streams` colours the columns' and rows' labels."""
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap

    assert isinstance(axes, Axes)
    size = len(matrix)
    axes.imshow(matrix, cmap=ListedColormap(["#f1f0ec", "#1f3a5f"]), vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    if title:
        axes.set_title(title)
    if size <= 32:
        axes.set_xticks(np.arange(size), minor=False)
        axes.set_yticks(np.arange(size), minor=False)
        axes.tick_params(labelsize=7, length=0)
        axes.set_xticks(np.arange(-0.5, size), minor=True)
        axes.set_yticks(np.arange(-0.5, size), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        if streams is not None:
            names = [f"{'sf'[s]}{list(streams[:k]).count(s)}" for k, s in enumerate(streams)]
            axes.set_xticklabels(names, rotation=90)
            axes.set_yticklabels(names)
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                for label, stream in zip(labels, streams, strict=True):
                    label.set_color(STREAM_COLOURS[stream])
    for spine in axes.spines.values():
        spine.set_visible(False)


def plot_matrix(
    matrix: np.ndarray, path: str | Path, title: str | None = None, streams: Sequence[int] | None = None
) -> Path:
    """Write a picture of bool `[M, M]` to `path` (format by its suffix) and return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inches = float(np.clip(1.5 + 0.22 * len(matrix), 3.5, 8.0))
    figure = Figure(figsize=(inches, inches), layout="constrained")
    FigureCanvasAgg(figure)
    draw_matrix(figure.add_subplot(), matrix, title, streams)
    path = Path(path)
    figure.savefig(path, dpi=144)
    return path
