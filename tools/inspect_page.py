"""The page of `framestream inspect`: one self-contained HTML file, no script, no request, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import inspect_figures as figures
from .inspect_clips import Sheet
from .inspect_mask import MaskFacts
from .inspect_rejects import Account
from .inspect_summary import KINDS, MARKS, NUMBERS, Facts
from .inspect_text import counted, harmless, long_time, shown, size
from .inspect_timing import Timing
from .pages import page_environment

MAX_KINDS = 8  # rows of a table of kinds; the others are one row
MAX_REASONS = 20  # groups of rejects
FAR_KEY_FRAMES = 32  # frames from key frame to key frame above which reading single frames is dear


@dataclass(frozen=True)
class Inspection:
    """All that the page shows.

    Attributes:
        target: what was asked for, in words.
        facts: of each split.
        sheets: a few clips.
        timing: of the loader; None where it gave no clip.
        workers: that an epoch is estimated for.
        mask: of the chosen settings; None where no clip could be made.
        account: of the inputs; None where the target is no folder.
        image_size: pixels that the model sees.
        settings: (name, value) of the sampling and the mask.
        versions: (name, version).
        created: date and time.
    """

    target: str
    facts: Sequence[Facts]
    sheets: Sequence[Sheet]
    timing: Timing | None
    workers: int
    mask: MaskFacts | None
    account: Account | None
    image_size: int
    settings: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    created: str


def headline(facts: Sequence[Facts]) -> str:
    """What there is, in one line."""
    samples, seconds = sum(each.samples for each in facts), sum(each.seconds for each in facts)
    about = "" if all(each.whole for each in facts) else "about "
    length = f", {about}{long_time(seconds)} of video" if any(each.described for each in facts) else ""
    return f"{counted(samples, 'clip')}{length}"


def findings(seen: Inspection) -> list[str]:
    """What is worth a look before training, one sentence each."""
    facts, said = seen.facts, []
    read = sum(each.read for each in facts)
    for mark, advice in (
        ("unreadable", "`framestream verify` says what is wrong with the shards."),
        ("damaged_json", "They serve with empty metadata; `framestream verify` names them."),
        ("undescribed", "Their videos are looked at anew every time they are read."),
        ("short", "Their missing frames repeat the first one, masked out."),
    ):
        if number := sum(each.marks[mark] for each in facts):
            said.append(f"{_share(number, read)} samples are {_are(mark)}. {advice}")
    without = sum(each.marks["no_text"] for each in facts)
    if 0 < without < read:
        said.append(f"{_share(without, read)} samples are without a text, and the others have one.")
    gop, side = (_pooled(facts, name) for name in ("gop", "side"))
    if len(gop) and np.median(gop) > FAR_KEY_FRAMES:
        said.append(
            f"Half of the videos have a key frame only every {np.median(gop):.0f} frames or less often, and all frames "
            "from there on have to be decoded to read one: `framestream shard --gop 16` writes videos that read faster."
        )
    if len(side) and np.median(side) >= 1.5 * seen.image_size:
        said.append(
            f"Half of the videos are {np.median(side):.0f} pixels or more on their short side, and the model sees "
            f"{seen.image_size}: `framestream shard --short-side {seen.image_size}` writes smaller ones."
        )
    failed = sum(sheet.clip is None for sheet in seen.sheets)
    if failed == len(seen.sheets):
        said.append(f"None of the {counted(failed, 'clip')} that were decoded for this page can be used.")
    elif failed:
        said.append(f"{failed} of {len(seen.sheets)} clips that were decoded for this page cannot be used.")
    if problems := sum(each.num_problems for each in facts):
        said.append(f"{counted(problems, 'problem')} of the shards are worked round; they are listed at the end.")
    if seen.mask is not None and seen.mask.leaking:
        said.append(f"The mask {seen.mask.rule} lets {counted(seen.mask.leaking, 'frame')} see what they predict.")
    return said


def _are(mark: str) -> str:
    return {"unreadable": "unreadable", "undescribed": "described by metadata of another kind"}.get(mark, MARKS[mark])


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}"


def _pooled(facts: Sequence[Facts], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(each.numbers[name]) for each in facts])


def _charts(facts: Sequence[Facts]) -> Iterator[dict[str, Any]]:
    """Each of `NUMBERS` in words, and as a chart where the values differ."""
    from markupsafe import Markup

    for name, (title, unit) in NUMBERS.items():
        series = [(each.name, np.asarray(each.numbers[name])) for each in facts if len(each.numbers[name])]
        if not series:
            continue
        drawn = series if len(series) <= figures.MAX_OVERLAID else [("", _pooled(facts, name))]
        pooled = _pooled(facts, name)
        varied = pooled.min() < pooled.max()
        yield {
            "title": title,
            "words": [(split, len(values), figures.spelled(values, unit)) for split, values in series],
            "svg": Markup(figures.histogram(name, title, unit, drawn)) if varied else "",
            "splits": [split for split, _ in drawn] if varied and len(drawn) > 1 else [],
        }


def _kinds(facts: Sequence[Facts]) -> Iterator[dict[str, Any]]:
    """Each of `KINDS` as rows of (kind, [number and share in each split])."""
    for name, title in KINDS.items():
        total = sum((each.kinds[name] for each in facts), start=type(facts[0].kinds[name])())
        if not total:
            continue
        ranked = sorted(total, key=lambda kind: (-total[kind], kind))
        common, rare = (ranked, []) if len(ranked) <= MAX_KINDS else (ranked[: MAX_KINDS - 1], ranked[MAX_KINDS - 1 :])
        rows = [(kind, [each.kinds[name][kind] for each in facts]) for kind in common]
        if rare:
            rows.append((f"{len(rare):,} others", [sum(each.kinds[name][k] for k in rare) for each in facts]))
        sums = [max(1, each.kinds[name].total()) for each in facts]
        yield {
            "title": title,
            "rows": [(kind, [(n, n / whole) for n, whole in zip(row, sums, strict=True)]) for kind, row in rows],
        }


def _epoch(seen: Inspection) -> dict[str, Any] | None:
    """An epoch of the training split, or of everything where none is called so; of that only one split was timed."""
    if seen.timing is None:
        return None
    chosen = [each for each in seen.facts if each.name == "train"] or list(seen.facts)
    samples = sum(each.samples for each in chosen)
    if chosen[0].name == "train":
        part = "the split train"
    elif len(chosen) > 1:
        timed = f"the split {seen.timing.split}" if seen.timing.split else "the part outside of folders"
        part = f"the {len(chosen)} splits, of which only {timed} was timed"
    else:
        part = counted(samples, "clip")
    return {"time": long_time(seen.timing.epoch(samples, seen.workers)), "samples": samples, "part": part}


def render_page(seen: Inspection) -> str:
    """The whole page as a string."""
    from markupsafe import Markup

    environment = page_environment(
        finalize=lambda value: harmless(value) if type(value) is str else value  # Markup is our own
    )
    environment.filters |= {"size": size, "long_time": long_time, "counted": counted, "shown": shown}
    mask = seen.mask
    return environment.get_template("inspect.html.j2").render(
        seen=seen,
        headline=headline(seen.facts),
        findings=findings(seen),
        charts=list(_charts(seen.facts)),
        kinds=list(_kinds(seen.facts)),
        marks=[(text, [each.marks[mark] for each in seen.facts]) for mark, text in MARKS.items()],
        timelines=["" if s.clip is None else Markup(figures.timeline(s.key, s.clip)) for s in seen.sheets],
        mask_svg="" if mask is None else Markup(figures.mask_picture(mask.rule, mask.layout, mask.mask, mask.leaking)),
        epoch=_epoch(seen),
        max_reasons=MAX_REASONS,
        all_read=all(each.whole for each in seen.facts),
    )
