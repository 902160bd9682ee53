"""The end of a sharding run: what has become of every input, in `index.json`, `report.json` and lists beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from typing import Any

from framestream.pipeline.shard_writer import FOLDER_INDEX, folder_index

from .output import Output
from .plan_store import PlanStore
from .set_files import LEFT_OUT_FILE, REJECTS_FILE, REPORT_FILE
from .units import Outcome, in_split

REPORT_VERSION = 2
FIRST_REJECTS = 100


@dataclass(frozen=True)
class ShardReport:
    """What became of every input; also in `report.json`.

    Attributes:
        inputs: found = sampled + rejected + filtered + duplicate.
        filtered: inputs that were not wanted, by rule.
        clips: planned = written + rejected; `dropped` counts by rule what was not planned.
        splits: per split ("" without splits) its samples, shards, bytes and seconds.
        other_files: files that were passed over because they are no videos, by extension.
        with_text: of the inputs that clips are planned of, those with a text.
        num_rejects: lines of `rejects.jsonl`.
        rejects: the first of them, as they stand in `rejects.jsonl`: source, reason, and for clips key, start and end.
    """

    inputs: dict[str, int]
    filtered: dict[str, int]
    clips: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    other_files: dict[str, int]
    with_text: int
    num_rejects: int
    rejects: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {"version": REPORT_VERSION, **{k: v for k, v in asdict(self).items() if k != "rejects"}}


@dataclass
class _Totals:
    shards: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def finish(plan: PlanStore, outcomes: Iterable[tuple[str, Outcome]], output: Output) -> ShardReport:
    """Write the lists, the index of each split, and the report; `outcomes` has split and outcome of every unit."""
    splits = {name: _Totals() for name in plan.splits()}
    lost: list[tuple[str, str]] = []
    for split, outcome in outcomes:
        lost += outcome.lost
        splits[split].seconds += outcome.seconds
        if outcome.samples:
            splits[split].shards.append(
                {
                    "name": outcome.name.rpartition("/")[2] + ".tar",
                    "samples": outcome.samples,
                    "bytes": outcome.num_bytes,
                    "sha256": outcome.sha256,
                }
            )
    accounts = plan.accounts(lost)
    num_rejects = _write_lines(output, REJECTS_FILE, plan.rejects(lost))
    report = ShardReport(
        inputs={
            "found": accounts.found,
            "sampled": accounts.sampled,
            "rejected": accounts.rejected,
            "filtered": sum(accounts.filtered.values()),
            "duplicate": accounts.duplicates,
        },
        filtered=accounts.filtered,
        clips={
            "planned": accounts.clips_planned,
            "written": accounts.clips_written,
            "rejected": accounts.clips_rejected,
            "dropped": accounts.clips_dropped,
        },
        splits={
            name: {
                "samples": sum(shard["samples"] for shard in totals.shards),
                "shards": len(totals.shards),
                "bytes": sum(shard["bytes"] for shard in totals.shards),
                "seconds": round(totals.seconds, 3),
            }
            for name, totals in splits.items()
        },
        other_files=plan.other_files,
        with_text=accounts.with_text,
        num_rejects=num_rejects,
        rejects=list(islice(plan.rejects(lost), FIRST_REJECTS)),
    )
    _write_lines(output, LEFT_OUT_FILE, plan.left_out())
    for name, totals in splits.items():
        output.prepare(name)
        output.write(
            in_split(name, FOLDER_INDEX), folder_index(totals.shards, {"inputs": report.inputs, "clips": report.clips})
        )
    output.write(REPORT_FILE, _json(report.to_json()))
    return report


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _write_lines(output: Output, name: str, records: Iterator[dict[str, Any]]) -> int:
    """One JSON object a line, of which there may be millions; how many there are."""
    numbers = count()
    lines = (
        json.dumps(record, ensure_ascii=False).encode() + b"\n" for record, _ in zip(records, numbers, strict=False)
    )
    output.write_lines(name, lines)
    return next(numbers)
