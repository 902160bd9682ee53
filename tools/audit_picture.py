"""Pictures of an audit: who may be reached beside who was, in characters for a terminal and as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.sampling import FAST

from .audit_report import ModelAudit

MOST_FRAMES = 32  # that fit beside each other in 80 columns
_WIDE = 14  # up to here a cell has two characters
NEVER, DIRECT, THROUGH, LEAK, SHOWN, SILENT = "·", "■", "+", "X", "x", "o"
_STYLES = {NEVER: "dim", DIRECT: "blue", THROUGH: "cyan", LEAK: "bold red", SHOWN: "magenta", SILENT: "yellow"}
_COLOURS = {
    NEVER: "#f1f0ec",
    DIRECT: "#1f3a5f",
    THROUGH: "#7ea3cc",
    LEAK: "#c62828",
    SHOWN: "#9a7fb8",
    SILENT: "#e6c229",
}
LEGEND = {
    DIRECT: "attends to it",
    THROUGH: "through layers",
    NEVER: "not reached",
    LEAK: "LEAK",
    SHOWN: "shows a target, not scored",
    SILENT: "no influence",
}


def cells(audit: ModelAudit, clip: int) -> tuple[list[list[str]], list[list[str]]]:
    """What is allowed and what was measured, a character of `LEGEND` for each pair (row predicts, column is seen)."""
    direct, allowed, measured = audit.attends[clip], audit.allowed[clip], audit.measured[clip]
    mask = [
        [DIRECT if d else THROUGH if a else NEVER for d, a in zip(*rows, strict=True)]
        for rows in zip(direct.tolist(), allowed.tolist(), strict=True)
    ]
    reveals, scored = audit.revealing[clip].tolist(), audit.scored[clip].tolist()
    found = [
        [_found(*cell, counts) for cell in zip(mask[i], measured[i].tolist(), reveals[i], strict=True)]
        for i, counts in enumerate(scored)
    ]
    return mask, found


def _found(cell: str, reached: bool, reveals: bool, scored: bool) -> str:
    if not reached:
        return NEVER if cell == NEVER else SILENT
    if cell == NEVER or (reveals and scored):
        return LEAK
    return SHOWN if reveals else cell


def labels(layout: FrameLayout) -> list[str]:
    """s0 s1 … f0 f1 …, as in pictures of masks; p for padding."""
    count = {"s": 0, "f": 0, "p": 0}
    names = []
    for stream, valid in zip(layout.stream, layout.valid, strict=True):
        kind = "p" if not valid else "f" if stream == FAST else "s"
        names.append(f"{kind}{count[kind]}")
        count[kind] += 1
    return names


def picture(audit: ModelAudit, clip: int | None = None) -> list[Text]:
    """Lines of at most 80 columns; none where the clip has more than `MOST_FRAMES` frames."""
    clip = audit.shown_clip if clip is None else clip
    layout = audit.layouts[clip]
    if layout.num_frames > MOST_FRAMES:
        return []
    mask, found = cells(audit, clip)
    names = labels(layout)
    gap = " " if layout.num_frames <= _WIDE else ""
    width = layout.num_frames * (1 + len(gap))
    head = gap.join(name[0] for name in names)
    lines = [
        Text(f"    {'may be reached':<{max(width, 14)}}    {'was reached':<{width}}".rstrip(), style="bold"),
        Text(f"    {head:<{max(width, 14)}}    {head}", style="dim"),
    ]
    for name, left, right in zip(names, mask, found, strict=True):
        line = Text(f"{name:>3} ", style="dim")
        for part, pad in ((left, max(width, 14) - width + 4), (right, 0)):
            for cell in part:
                line.append(cell + gap, style=_STYLES[cell])
            line.append(" " * pad)
        line.rstrip()
        lines.append(line)
    used = [key for key in LEGEND if any(key in row for row in mask + found)]
    legend = Text("    ", style="dim")
    for key in used:
        legend.append(key, style=_STYLES[key]).append(f" {LEGEND[key]}   ", style="dim")
    legend.rstrip()
    return [*lines, legend]


def write_picture(audit: ModelAudit, path: str | Path, title: str) -> Path:
    """Write mask and measurement beside each other, for every clip of the audit, as a picture.

    Raises:
        ConfigError: a suffix that is no picture format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    order = list(_COLOURS)
    count = audit.layouts[0].num_frames
    side = float(np.clip(0.24 * count + 0.8, 2.6, 7.0))
    figure = Figure(figsize=(2 * side + 0.4, side * len(audit.layouts) + 1.0), layout="constrained")
    if FigureCanvasAgg.get_supported_filetypes().get(Path(path).suffix.lstrip(".").lower()) is None:
        raise ConfigError(f"--output {path} has no suffix of a picture; use .png.")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(audit.layouts), 2, squeeze=False)
    used = set()
    for clip, layout in enumerate(audit.layouts):
        for axes, name, part in zip(grid[clip], ("may be reached", "was reached"), cells(audit, clip), strict=True):
            used |= {cell for row in part for cell in row}
            codes = [[order.index(cell) for cell in row] for row in part]
            axes.imshow(codes, cmap=ListedColormap(list(_COLOURS.values())), vmin=0, vmax=len(order) - 1)
            for i, j in _crosses(part):  # not by colour only
                axes.text(j, i, part[i][j], ha="center", va="center", color="white", fontsize=7, weight="bold")
            _frame_axes(axes, labels(layout))
            axes.set_title(name if len(audit.layouts) == 1 else f"clip {clip}: {name}", fontsize=9)
    patches = [Patch(facecolor=_COLOURS[key], edgecolor="#999999", label=LEGEND[key]) for key in LEGEND if key in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(3, len(patches)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    return Path(path)


def _crosses(part: list[list[str]]) -> list[list[int]]:
    leaks: Tensor = torch.tensor([[cell in (LEAK, SHOWN) for cell in row] for row in part])
    return leaks.nonzero().tolist()


def _frame_axes(axes: object, names: list[str]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.set_xlabel("frame that is seen", fontsize=8)
    axes.set_ylabel("frame that predicts", fontsize=8)
    if len(names) <= MOST_FRAMES:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xticks(np.arange(-0.5, len(names)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(names)), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
