"""The check of a whole set of shards: every shard in worker processes, then what they say of each other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from framestream.pipeline.atomic import atomic_write
from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_index import index_path
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import FOLDER_INDEX, folder_index

from .cores import usable_cores
from .pool import Failure, WorkerPool
from .verify_keys import Keys
from .verify_places import Place, find_places, folder_index_problems, stray_files
from .verify_shard import (
    SampleCheck,
    SampleTask,
    ShardCheck,
    ShardTask,
    check_sample,
    check_shard,
    check_structure,
    local_shard,
    with_samples,
)
from .verify_totals import copy_problems, has_plan, has_report, missing_report, total_problems
from .verify_video import Decode

TIMEOUT_S = 3600.0  # for one shard
CLIP_TIMEOUT_S = 600.0  # for one clip of a shard that could not be checked as a whole

Progress = Callable[[int, int, int], None]  # shards done, of, problems


@dataclass
class VerifyReport:
    """What was found. `problems` has one sentence each, in order of the shards; `notices` are none."""

    checks: list[tuple[Place, ShardCheck]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    num_repaired: int = 0

    @property
    def num_samples(self) -> int:
        return sum(check.num_samples for _, check in self.checks)

    @property
    def num_decoded(self) -> int:
        """Samples of whose videos frames were decoded."""
        return sum(check.decoded for _, check in self.checks)


def verify_folder(
    folder: str | Path,
    *,
    decode: Decode = "sample",
    decode_share: float = 1.0,
    repair_index: bool = False,
    workers: int = 0,
    timeout_s: float = TIMEOUT_S,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check the shards of `folder`, a path or URL, and of the folders in it: the work of `framestream verify`.

    Args:
        timeout_s: seconds for one shard; one that takes longer, or kills its process, is checked again clip by clip.
        storage_options: for the fsspec file system of a URL.
        progress: called with the shards that are done, all shards, and the problems so far.

    The other arguments are those of the command.

    Raises:
        ConfigError: an impossible option, or `repair_index` for a URL.
        ShardError: the folder does not exist, is a file, or holds no tar.
    """
    if decode not in ("none", "sample", "all"):
        raise ConfigError(f"decode is {decode!r}, it has to be none, sample or all")
    if not 0.0 <= decode_share <= 1.0:
        raise ConfigError(f"decode_share is {decode_share}, it has to be from 0 to 1")
    if workers < 0 or timeout_s <= 0:
        raise ConfigError(f"workers has to be at least 0 and the timeout above 0, got {workers} and {timeout_s:g}")
    root = str(folder).removeprefix("file://")
    root = root if root == "/" else root.rstrip("/")
    if repair_index and is_url(root):
        raise ConfigError(f"{root} is remote and nothing is written there: repair a local copy and upload its indexes")
    remote = Remote(dict(storage_options or {}))
    places = find_places(root, remote)
    reported = has_report(root, remote)
    unfinished = not reported and has_plan(root, remote)
    job = _Job(places, VerifyReport(), repair_index, workers or usable_cores(), timeout_s, progress, unfinished)
    with tempfile.TemporaryDirectory(prefix="framestream-verify-") as scratch, Keys() as keys:
        tasks = [
            ShardTask(f"{place.path}/{name}", decode, decode_share, remote, f"{scratch}/{number}-{name}", size)
            for number, (place, name, size) in enumerate((p, *shard) for p in places for shard in p.shards.items())
        ]
        job.check_shards(tasks, keys)
        repeated = keys.problems()
        for number, place in enumerate(places):
            job.check_place(place, repeated.get(number, ()))
            job.report.problems += map(place.said, copy_problems(place, root))
    job.report.problems += total_problems(root, remote, job.report.checks)
    if not reported:
        job.report.problems += missing_report(places)
    if unfinished:
        job.report.problems.append(
            "a run of `framestream shard` has not come to its end here: give the same command once more, or the parts "
            "that are missing; it makes the other shards, and writes index.json and report.json."
        )
    return job.report


@dataclass
class _Job:
    places: Sequence[Place]
    report: VerifyReport
    repair_index: bool
    workers: int
    timeout_s: float
    progress: Progress | None
    unfinished: bool  # a run that makes more shards is still to be ended
    recorded: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def check_shards(self, tasks: Sequence[ShardTask], keys: Keys) -> None:
        """Check all shards, and those once more, clip by clip, whose check killed or stopped its process."""
        numbers = [number for number, place in enumerate(self.places) for _ in place.shards]
        checks: dict[str, ShardCheck] = {}
        failed = []
        self._tell(checks, len(tasks))  # from here on the rate is measured
        with WorkerPool(check_shard, workers=self.workers, timeout_s=self.timeout_s) as pool:
            for (task, result), number in zip(pool.map(tasks), numbers, strict=True):
                if isinstance(result, Failure):
                    Path(task.copy).unlink(missing_ok=True)
                    failed.append((number, task))
                else:
                    checks[task.path] = self._taken(result, number, keys)
                    self._tell(checks, len(tasks))
        for number, task in failed:
            checks[task.path] = self._taken(self._by_clip(task), number, keys)
            self._tell(checks, len(tasks))
        for task, number in zip(tasks, numbers, strict=True):
            place, check = self.places[number], checks[task.path]
            self.report.checks.append((place, check))
            self.report.problems += map(place.said, check.problems)

    def _tell(self, checks: Mapping[str, ShardCheck], total: int) -> None:
        if self.progress:
            self.progress(len(checks), total, sum(len(check.problems) for check in checks.values()))

    def _taken(self, check: ShardCheck, number: int, keys: Keys) -> ShardCheck:
        """Keep what is needed of a check, which is not its keys, and write its index file if that is asked for."""
        keys.add(number, check.name, check.keys)
        entry = self._entries(self.places[number]).get(check.name) if self.repair_index else None
        if (
            entry
            and check.sha256
            and (entry["bytes"] != check.num_bytes or entry["sha256"] not in (None, check.sha256))
        ):
            check = replace(check, changed=True)
        if self.repair_index and check.wanted_index is not None and not check.changed:
            atomic_write(index_path(Path(self.places[number].path, check.name)), check.wanted_index)
            self.report.num_repaired += 1
            check = replace(check, index_problem="", has_index=True)
        return replace(check, keys=(), wanted_index=None)

    def _entries(self, place: Place) -> dict[str, dict[str, Any]]:
        """What `index.json` of a folder recorded before any repair; {} where it cannot be read."""
        if place.path not in self.recorded:
            try:
                self.recorded[place.path] = place.folder_index() or {}
            except ShardError:
                self.recorded[place.path] = {}
        return self.recorded[place.path]

    def _by_clip(self, task: ShardTask) -> ShardCheck:
        """A check in which a clip that crashes or hangs its decoder costs nothing but itself."""
        try:
            with local_shard(task) as path:
                check, index = check_structure(task, path)
                samples = (SampleTask(str(path), task.name, s, task.decode, task.share) for s in index.samples)
                limit = min(CLIP_TIMEOUT_S, self.timeout_s)
                with WorkerPool(check_sample, workers=self.workers, timeout_s=limit) as pool:
                    return with_samples(check, ((sample, _told(result)) for sample, result in pool.map(samples)))
        except (ShardError, OSError) as err:
            return ShardCheck(task.name, problems=(f"{task.name} cannot be read ({err}).",))

    def check_place(self, place: Place, repeated: Iterable[str]) -> None:
        """What does not agree in one folder, apart from what is wrong in its shards."""
        checks = [check for at, check in self.report.checks if at is place]
        problems = [*repeated, *stray_files(place)]
        listed = folder_index_problems(place, checks)
        bare = [check for check in checks if check.bare]
        foreign = bool(bare) and not any(check.described for check in checks)
        if self.repair_index and not self.unfinished and listed != [] and self._repaired(place, checks):
            problems += folder_index_problems(place, checks) or ()  # of shards whose bytes have changed
        elif listed is not None:
            problems += listed
        elif not foreign and not self.unfinished:
            problems.append(f"there is no {FOLDER_INDEX}; `--repair-index` writes it.")
        problems += [c.index_problem for c in checks if c.index_problem and (c.has_index or not foreign)]
        if not foreign:
            problems += [sentence for check in checks for sentence in _without_video(check)]
        if bare and not foreign:
            number, first = sum(check.bare for check in bare), bare[0]
            problems.append(
                f"{number} samples have no metadata about their video, {first.first_bare!r} in {first.name} first."
            )
        self.report.problems += map(place.said, problems)
        self.report.notices += map(place.said, _notices(checks) if foreign else [])

    def _repaired(self, place: Place, checks: Sequence[ShardCheck]) -> bool:
        """Write `index.json` out of what was found, but for shards whose bytes have changed: what it recorded of them
        stays. What it said of the set as a whole stays, too, where it can be read. False where it cannot be written.
        """
        entries = self._entries(place)
        if not all(check.sha256 and (check.name in entries or not check.changed) for check in checks):
            return False
        try:
            before = place.json(FOLDER_INDEX)
        except ShardError:
            before = {}
        shards = [
            {"name": c.name, **entries[c.name]}
            if c.changed
            else {"name": c.name, "samples": c.num_samples, "bytes": c.num_bytes, "sha256": c.sha256}
            for c in checks
        ]
        more: dict[str, Any] = {kind: before[kind] for kind in ("inputs", "clips") if kind in before}
        content, path = folder_index(shards, more), Path(place.path, FOLDER_INDEX)
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, content)
            self.report.num_repaired += 1
        return True


def _notices(checks: Sequence[ShardCheck]) -> Iterator[str]:
    """What the owner of shards that others wrote should know."""
    yield (
        "these shards were not written by framestream: no checksums, frame counts or packets stand beside the "
        "videos, so that there was nothing to compare them with"
    )
    without = sum(check.num_without_video for check in checks)
    if without:
        yield f"{without} samples have no video and are left out; some tools keep failed downloads like that"
    missing = sum(not check.has_index for check in checks)
    if missing:
        yield f"{missing} shards have no index file; the loader makes it at first use, or `--repair-index` does now"


def _without_video(check: ShardCheck) -> Iterator[str]:
    yield from check.without_video
    if check.num_without_video > len(check.without_video):
        yield f"{check.name}: {check.num_without_video - len(check.without_video)} more samples have no video."


def _told(result: SampleCheck | Failure) -> SampleCheck:
    return SampleCheck((f"cannot be checked: it {result.reason}.",)) if isinstance(result, Failure) else result
