"""Whether the numbers of a sharding run add up, and are those of the shards and lists that it has left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ShardError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import FOLDER_INDEX

from .plan_place import PLAN_FILE
from .set_files import LEFT_OUT_FILE, REJECTS_FILE, REPORT_FILE
from .verify_places import Place, part
from .verify_shard import ShardCheck

_SUMS = {
    "inputs": ("found", ("sampled", "rejected", "filtered", "duplicate")),
    "clips": ("planned", ("written", "rejected")),
}


def total_problems(root: str, remote: Remote, checks: Sequence[tuple[Place, ShardCheck]]) -> Iterator[str]:
    """What does not add up in `report.json`, and what the shards and lists beside it say otherwise.

    Nothing where there is no report. Numbers that it does not have are not compared.
    """
    place = Place(root, "", {}, remote)
    try:
        report = place.json(REPORT_FILE)
    except ShardError as err:
        yield f"{err}."
        return
    yield from sum_problems(REPORT_FILE, report)
    inputs, clips = part(report, "inputs"), part(report, "clips")
    samples = sum(check.num_samples for _, check in checks)
    if clips.get("written", samples) != samples:
        yield f"the shards hold {samples} samples, {REPORT_FILE} says {clips['written']} clips written."
    yield from _split_problems(report, checks)
    of_inputs, of_clips = _numbers(inputs, "rejected", "filtered", "duplicate"), _numbers(clips, "rejected")
    if of_inputs and of_clips:
        rejected, filtered, duplicate = of_inputs
        yield from _list_problems(
            place, rejected, filtered + duplicate, *of_clips, *(_numbers(report, "num_rejects") or [])
        )


def has_report(root: str, remote: Remote) -> bool:
    """Whether there is a report of a run; also where that cannot be told, which is said where it is read."""
    try:
        return Place(root, "", {}, remote).read(REPORT_FILE, bytes) is not None
    except ShardError:
        return True


def has_plan(root: str, remote: Remote) -> bool:
    """Whether there is a plan of `framestream shard`."""
    if not is_url(root):
        return Path(root, PLAN_FILE).exists()
    try:
        remote.size(f"{root}/{PLAN_FILE}")
    except ShardError:
        return False
    return True


def missing_report(places: Sequence[Place]) -> Iterator[str]:
    """What is wrong with a set that has no report: what `index.json` says of a whole run is a copy out of one."""
    try:
        if any(part(place.json(FOLDER_INDEX), "inputs") for place in places):
            yield f"there is no {REPORT_FILE}, although the run that wrote {FOLDER_INDEX} wrote one, too."
    except ShardError:
        return  # told where each of them is checked


def sum_problems(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    """Counts of inputs and clips in a file that do not add up: each has exactly one fate."""
    for kind, (whole, fates) in _SUMS.items():
        counts = part(content, kind)
        numbers = _numbers(counts, whole, *fates)
        if numbers and numbers[0] != sum(numbers[1:]):
            told = " + ".join(f"{counts[fate]} {fate}" for fate in fates)
            yield f"{name} says {counts[whole]} {kind} {whole}, which are not {told}."


def copy_problems(place: Place, root: str) -> Iterator[str]:
    """What `index.json` of a folder says of the run otherwise than the report of the run, which it repeats."""
    try:
        index, report = place.json(FOLDER_INDEX), Place(root, "", {}, place.remote).json(REPORT_FILE)
    except ShardError:
        return  # told where each of them is checked
    yield from sum_problems(FOLDER_INDEX, index)
    for kind in _SUMS:
        if part(index, kind) and part(report, kind) and index[kind] != report[kind]:
            yield f"{FOLDER_INDEX} counts other {kind} than {REPORT_FILE}: they are of two runs."


def _split_problems(report: Mapping[str, Any], checks: Sequence[tuple[Place, ShardCheck]]) -> Iterator[str]:
    splits = part(report, "splits")
    for name in sorted(splits):
        inside = [check for place, check in checks if place.name == name]
        actual = {
            "shards": len(inside),
            "samples": sum(check.num_samples for check in inside),
            "bytes": sum(check.num_bytes for check in inside),
        }
        for what, number in actual.items():
            claimed = part(splits, name).get(what, number)
            if claimed != number:
                where = f"{name} has" if name else "the folder has"
                yield f"{where} {what} {number}, {REPORT_FILE} says {claimed}."


def _list_problems(
    place: Place, inputs_rejected: int, inputs_left_out: int, clips_rejected: int, num_rejects: int | None = None
) -> Iterator[str]:
    """The lists have one line for each reject, and for each input that was left out."""
    of_clips, of_inputs, problem = _lines(place, REJECTS_FILE)
    yield from problem
    if not problem and of_clips != clips_rejected:
        yield f"{REJECTS_FILE} lists {of_clips} clips, {REPORT_FILE} says {clips_rejected} clips rejected."
    if not problem and num_rejects not in (None, of_clips + of_inputs):
        yield f"{REJECTS_FILE} has {of_clips + of_inputs} lines, {REPORT_FILE} says {num_rejects}."
    # An input of which every clip was rejected is rejected too, and is listed by its clips.
    if not problem and not of_inputs <= inputs_rejected <= of_inputs + of_clips:
        yield f"{REJECTS_FILE} lists {of_inputs} inputs, {REPORT_FILE} says {inputs_rejected} inputs rejected."
    _, left_out, problem = _lines(place, LEFT_OUT_FILE)
    yield from problem
    if not problem and left_out != inputs_left_out:
        yield f"{LEFT_OUT_FILE} lists {left_out} inputs, {REPORT_FILE} says {inputs_left_out} filtered or duplicate."


def _numbers(counts: Mapping[str, Any], *names: str) -> list[int] | None:
    """Those counts; None where one is missing or no number."""
    numbers = [counts[name] for name in names if isinstance(counts.get(name), int)]
    return numbers if len(numbers) == len(names) else None


def _lines(place: Place, name: str) -> tuple[int, int, list[str]]:
    """Lines of a list about clips, those about inputs, and what is wrong with the list."""
    of_clips, of_inputs, damaged = 0, 0, 0
    try:
        for line in _read_lines(place, name):
            try:
                about_clip = "key" in dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                damaged += 1
                continue
            of_clips += about_clip
            of_inputs += not about_clip
    except FileNotFoundError:
        return 0, 0, [f"there is no {name} beside {REPORT_FILE}."]
    except (ShardError, OSError) as err:
        return 0, 0, [f"{name} cannot be read ({err})."]
    return of_clips, of_inputs, [f"{damaged} lines of {name} are no JSON objects."] if damaged else []


def _read_lines(place: Place, name: str) -> Iterator[bytes]:
    if is_url(place.path):
        content = place.read(name, bytes)
        if content is None:
            raise FileNotFoundError(name)
        yield from content.splitlines()
        return
    with open(Path(place.path, name), "rb") as file:
        yield from file
