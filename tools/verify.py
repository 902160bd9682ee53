"""`framestream verify`: read everything again and say what does not agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from framestream.pipeline.errors import FramestreamError

from .progress import Output, reporting
from .verify_places import Place
from .verify_set import VerifyReport, verify_folder
from .verify_shard import ShardCheck

__all__ = ["VerifyReport", "verify", "verify_folder"]

INTERRUPTED = 130  # exit code


def verify(
    folder: str,
    *,
    decode: Literal["none", "sample", "all"] = "sample",
    decode_share: float = 1.0,
    repair_index: bool = False,
    workers: int = 0,
    storage_options: dict[str, Any] | None = None,
    log: Output = "auto",
) -> int:
    """Check a folder of shards: read every byte again and compare all that is said twice.

    Checked are the structure of the tars, the checksum of every shard (index.json) and of every video (its .json),
    the index files against the tars, that keys are unique, the metadata and packets against the videos, that the
    videos decode, and that the numbers in report.json add up to what is there. A folder with train/ and val/ inside
    is checked with both. Of shards that others wrote is checked what can be. Nothing is changed without
    --repair-index, and then only index files that are missing or wrong.

    Examples:
        framestream verify shards
        framestream verify shards --decode all --decode-share 0.05
        framestream verify s3://bucket/shards --workers 8

    Args:
        folder: the folder that holds the shards, or folders of shards; also a URL, from which each shard is fetched
            into a temporary file while it is checked.
        decode: decode the first and the last frame of every video (sample), every frame (all), or none.
        decode_share: decode only this share of the videos, from 0 to 1; a second run decodes the same ones.
        repair_index: write index files that are missing or wrong from what is in the tars.
        workers: processes; 0 takes one per CPU core.
        storage_options: settings of the storage that a URL names, as JSON; they are passed to fsspec.
        log: progress as a bar (on a terminal), as plain lines, as JSON lines, or nothing but problems (quiet).

    Returns:
        Exit code: 0 when everything agrees, 1 when something does not, 2 when there is nothing to check or the
        request is impossible, 130 when it was interrupted.
    """
    with reporting("verify", log, counted="problems") as reporter:
        try:
            report = verify_folder(
                folder,
                decode=decode,
                decode_share=decode_share,
                repair_index=repair_index,
                workers=workers,
                storage_options=storage_options,
                progress=lambda done, total, bad: reporter.step("checking", done, total, bad),
            )
        except FramestreamError as err:
            reporter.error(str(err))
            return 2
        except KeyboardInterrupt:
            changed = "the index files written so far are whole" if repair_index else "nothing was changed"
            reporter.error(f"stopped; {changed}")
            return INTERRUPTED
        if log == "quiet":
            for problem in report.problems:
                reporter.error(problem)
        reporter.end(summary(report, decode, repair_index), facts(report))
    return 1 if report.problems else 0


def summary(report: VerifyReport, decode: str, repaired: bool) -> list[str]:
    """The report in lines: what was checked, what should be known, every problem, and the verdict."""
    lines = []
    for place, checks in _by_place(report):
        size = sum(check.num_bytes for check in checks) / 1e6
        samples = sum(check.num_samples for check in checks)
        lines.append(f"{place.path}: {len(checks)} shards, {samples} samples, {size:.1f} MB")
    if decode != "none":
        frames = "first and last frame" if decode == "sample" else "all frames"
        lines.append(f"{frames} of {report.num_decoded} of {report.num_samples} videos were decoded")
    if repaired:
        lines.append(f"{report.num_repaired} index files were written anew")
    lines += [f"note: {notice}" for notice in report.notices]
    lines += report.problems
    if any(check.changed for _, check in report.checks):
        lines.append(
            "shards whose bytes have changed have to be copied again; or remove such a tar and its .idx.json, and the "
            "same `framestream shard` command makes it anew"
        )
    return [*lines, f"{len(report.problems)} problems" if report.problems else "everything agrees"]


def facts(report: VerifyReport) -> dict[str, Any]:
    """The report for programs."""
    return {
        "shards": len(report.checks),
        "samples": report.num_samples,
        "bytes": sum(check.num_bytes for _, check in report.checks),
        "decoded": report.num_decoded,
        "repaired": report.num_repaired,
        "notices": report.notices,
        "problems": report.problems,
    }


def _by_place(report: VerifyReport) -> list[tuple[Place, Sequence[ShardCheck]]]:
    places: dict[str, tuple[Place, list[ShardCheck]]] = {}
    for place, check in report.checks:
        places.setdefault(place.path, (place, []))[1].append(check)
    return list(places.values())
