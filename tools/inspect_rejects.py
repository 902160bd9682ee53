"""What did not become a sample, as `framestream shard` wrote it down beside the shards: report.json, rejects.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .inspect_text import shown
from .set_files import REJECTS_FILE, REPORT_FILE

MAX_GROUPS = 1000  # of reasons that are told apart; the file may have a million lines
MAX_EXAMPLES = 3
OTHER = "other reasons"
_LONGEST = 4000  # characters of a reason that are looked at
_HEX = re.compile(r"\b(?:0x)?[0-9a-f]{12,}\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass
class Reason:
    """Rejects of one cause. `examples` are (source, reason) as they stand in the file."""

    reason: str
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Account:
    """What became of the inputs.

    Attributes:
        inputs: (name, number) of what report.json says under `inputs`.
        rules: (rule, number) of what was left out by a rule.
        reasons: of the rejects, the most frequent first.
        rejected: rejects in all.
        damaged_lines: lines of rejects.jsonl that are none.
        missing: names of the files that are not there or cannot be used, and why.
    """

    inputs: list[tuple[str, int]] = field(default_factory=list)
    rules: list[tuple[str, int]] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    rejected: int = 0
    damaged_lines: int = 0
    missing: dict[str, str] = field(default_factory=dict)


def read_account(folder: Path) -> Account:
    """Read both files of a folder; what is missing or damaged is said in `missing` and costs nothing else."""
    missing: dict[str, str] = {}
    report: Any = {}
    try:
        report = json.loads((folder / REPORT_FILE).read_bytes())
        if not isinstance(report, dict):
            raise ValueError("it holds no object")
    except OSError as err:
        report, missing[REPORT_FILE] = {}, "is not there" if isinstance(err, FileNotFoundError) else str(err.strerror)
    except (ValueError, RecursionError) as err:
        report, missing[REPORT_FILE] = {}, f"is damaged ({shown(err, 100)})"
    reasons: list[Reason] = []
    damaged = 0
    try:
        with open(folder / REJECTS_FILE, encoding="utf-8", errors="replace") as lines:
            reasons, damaged = group_rejects(lines)
    except OSError as err:
        missing[REJECTS_FILE] = "is not there" if isinstance(err, FileNotFoundError) else str(err.strerror)
    return Account(
        inputs=list(_numbers(report.get("inputs"))),
        rules=list(_rules(report)),
        reasons=reasons,
        rejected=sum(group.count for group in reasons),
        damaged_lines=damaged,
        missing=missing,
    )


def group_rejects(lines: Iterable[str]) -> tuple[list[Reason], int]:
    """Rejects by cause, the most frequent first, and the number of lines that are none."""
    groups: dict[str, Reason] = {}
    damaged = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            reject = json.loads(line)
            source, reason = str(reject["source"]), str(reject["reason"])
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
            continue
        names = (source, source.rpartition("/")[2], str(reject.get("key") or ""))
        cause = cause_of(reason, names)
        if cause not in groups and len(groups) >= MAX_GROUPS:
            cause = OTHER
        group = groups.setdefault(cause, Reason(cause))
        group.count += 1
        if len(group.examples) < MAX_EXAMPLES:
            group.examples.append((shown(source, 120), shown(reason)))
    return sorted(groups.values(), key=lambda group: (-group.count, group.reason)), damaged


def cause_of(reason: str, names: Iterable[str] = ()) -> str:
    """A reason without what differs from input to input: its `names` become …, its numbers N."""
    reason = reason[:_LONGEST]
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 2:  # shorter ones stand in other words
            reason = reason.replace(name, "…")
    return shown(_NUMBER.sub("N", _HEX.sub("N", reason)))


def _numbers(content: Any) -> Iterator[tuple[str, int]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield shown(name, 80).replace("_", " "), value


def _rules(report: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """`filtered` of the report; before there were filters, `dropped` of its inputs and clips."""
    inputs, clips = report.get("inputs"), report.get("clips")
    yield from _numbers(report.get("filtered"))
    yield from _numbers(inputs.get("dropped") if isinstance(inputs, Mapping) else None)
    for rule, number in _numbers(clips.get("dropped") if isinstance(clips, Mapping) else None):
        yield f"clips: {rule}", number
