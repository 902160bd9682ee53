"""The page docs/conformance.md, from what `write_conformance.py` has measured and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bare_readers import BARE_READERS, is_silent
from colour_reference import CASES
from conformance import REASONS, TOLERANCE
from video_kinds import KINDS, SECTIONS

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"


@dataclass
class Column:
    """One reader of one release: how it is found, and what was measured.

    Attributes:
        reader: the backend that it serves.
        path: a folder to look for it in first, "" for the environment's own.
        version: of the package, and of the FFmpeg in it.
        guarded, bare: by name of a kind or a colour case, what it did as a backend and by itself.
    """

    reader: str
    path: str = ""
    version: dict[str, str] = field(default_factory=dict)
    guarded: dict[str, str] = field(default_factory=dict)
    bare: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.version['name']} {self.version['version']}"


def cells_of(page: str) -> dict[str, dict[str, str]]:
    """What the tables of the page say: name of a kind or colour case -> title of a column -> cell."""
    found: dict[str, dict[str, str]] = {}
    titles: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] in ("kind", "stored as"):
            titles = [title.strip("`") for title in cells[1:]]
        elif cells and cells[0] in (*KINDS, *CASES):
            found[cells[0]] = dict(zip(titles, cells[1:], strict=True))
    return found


def page_of(columns: list[Column]) -> str:
    """The page, from what was measured. Columns of the same backend are shown as one, and have to agree."""
    backends: dict[str, Column] = {}
    for column in columns:
        first = backends.setdefault(column.reader, column)
        apart = [name for name in KINDS if column.guarded[name] != first.guarded[name]]
        if apart:
            raise SystemExit(f"{column.title} and {first.title} behave unlike each other: {', '.join(apart)}")
    bare = [column for column in columns if column.bare and column.reader in BARE_READERS]
    parts = [_head(backends, bare)]
    for section, kinds in SECTIONS.items():
        parts.append(f"## {section}\n\n" + _table("kind", list(kinds), backends, bare))
    parts.append(_colours(backends, bare))
    parts.append(_reasons(backends, bare))
    parts.append(_foot(columns))
    return "\n\n".join(parts) + "\n"


def _head(backends: dict[str, Column], bare: list[Column]) -> str:
    lines = [
        "# Conformance: every reader against every kind of video",
        "",
        f"{len(KINDS)} kinds of video, each a clip whose frames carry their index in their pixels; mp4, where the name",
        "tells no other container. Frames were asked for in order, in a random order with repeats, the first and the",
        "last, and one by one.",
        "",
    ]
    for reader, column in backends.items():
        exact = sum(column.guarded[kind] == "exact" for kind in KINDS)
        refused = sum(column.guarded[kind].startswith("refused") for kind in KINDS)
        said = f"exact on all {exact}" if exact == len(KINDS) else f"exact on {exact}, refuses {refused}"
        odd = len(KINDS) - exact - refused
        lines.append(f"- `{reader}`: {said}" + (f", **{odd} not as expected**." if odd else "."))
    for column in bare:
        silent = sum(is_silent(column.bare[kind]) for kind in KINDS)
        failed = sum(column.bare[kind] != "right" for kind in KINDS) - silent
        lines.append(
            f"- {column.title} unguarded: silently wrong on {silent} (wrong frames, or another number of them)"
            + (f", nothing but errors on {failed} more." if failed else ".")
        )
    lines += [
        "",
        "The columns in code letters are the backends of `open_decoder`: exact, or a `DecodeError` with the reason,",
        "here in short, that names the backend which gets it right; `auto` decodes every kind. The other columns are",
        "what readers do when they are used directly: how many frames came out wrong at least once, and whether some",
        "reads (errors) or all (error) failed. They are why there are refusals.",
    ]
    return "\n".join(lines)


def _table(corner: str, names: list[str], backends: dict[str, Column], bare: list[Column]) -> str:
    titles = [corner, *(f"`{reader}`" for reader in backends), *(column.title for column in bare)]
    rows = [titles, ["---"] * len(titles)]
    for name in names:
        said = [column.guarded[name] for column in backends.values()] + [column.bare[name] for column in bare]
        rows.append([name, *said])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _colours(backends: dict[str, Column], bare: list[Column]) -> str:
    mean, worst = TOLERANCE["pyav"]
    other = max(TOLERANCE[reader] for reader in TOLERANCE if reader != "pyav")
    text = f"""## Colours

Mean and worst difference, of 255, from what BT.601, BT.709 and BT.2020 say that the stored values look like. They are
computed from the standards' own numbers, and the pictures (flat patches and smooth ramps) are coded without loss, so
that what is seen is the reader's conversion alone. Tolerance: `pyav` {mean:g} / {worst:g}, which is what rounding to 8
bits costs; the others {other[0]:g} / {other[1]:g}, because they repeat the chroma of 4:2:0 instead of interpolating
it. A wrong matrix shows as 3.7 / 31, a wrong range as more.

Where a stream names no matrix, players take BT.709 above 576 lines and BT.601 below, and so do we; the other readers
always take BT.601. What `framestream shard` encodes is tagged. A matrix that FFmpeg cannot convert by (YCgCo, ICtCp) is
refused by all.
"""
    return text + "\n" + _table("stored as", list(CASES), backends, bare)


def _reasons(backends: dict[str, Column], bare: list[Column]) -> str:
    lines = ["## Reasons", "", "| in short | as the error says it |", "| --- | --- |"]
    lines += [f"| {short} | {reason} |" for short, reason in sorted(REASONS.items())]
    lines += ["", "Refused although the reader gets this very clip right, because nothing tells it from others:", ""]
    for reader, column in backends.items():
        releases = [other for other in bare if other.reader == reader]
        wider = [
            kind
            for kind in KINDS
            if column.guarded[kind].startswith("refused") and all(other.bare[kind] == "right" for other in releases)
        ]
        if releases and wider:
            lines.append(f"- `{reader}`: {', '.join(wider)}.")
    return "\n".join(lines)


def _foot(columns: list[Column]) -> str:
    lines = ["## Measured with", ""]
    for column in columns:
        ffmpeg = column.version["ffmpeg"]
        lines.append(f"- {column.title}: libavcodec {ffmpeg}" if "," not in ffmpeg else f"- {column.title}: {ffmpeg}")
    lines += [
        "",
        "Again, after a change of a reader or of a refusal (`tests/test_conformance.py` holds the page to its tables):",
        "",
        "    pip install --no-deps --target OTHER decord2",
        "    .venv/bin/python tests/write_conformance.py --decord2 OTHER --torchcodec FOLDER",
        "",
        "Not among the kinds: pictures that are turned by their own codec (display orientation SEI) and not by the",
        "container, edit lists with a pause in their middle, and videos whose size or codec settings change in their",
        "middle, which are refused.",
    ]
    return "\n".join(lines)
