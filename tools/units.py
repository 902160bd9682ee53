"""One shard is one unit of work: its clips out of the plan, made and written without regard to any other shard.

What has become of a unit stands in the note of the shard's index file, so a unit is finished when that is there.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import Any

from framestream.pipeline.atomic import TEMP_SUFFIX
from framestream.pipeline.errors import ConfigError, SampleError, ShardError
from framestream.pipeline.remote import Remote, disk_full
from framestream.pipeline.shard_index import ShardIndex
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import FOLDER_INDEX, TarShard

from .making import ClipTask, MadeClip, known_clip
from .output import Output
from .plan_store import PlannedShard, PlanStore
from .pool import Failure, WorkerPool
from .set_files import LISTS
from .shard_options import ShardOptions
from .side_by_side import side_by_side
from .whole_file import Stoppable

NOTE_VERSION = 2
COPIED_AT_ONCE = 4  # shards of whole files, each of which a remote output has to keep as a temporary file meanwhile


@dataclass(frozen=True)
class Unit:
    """A shard to be made. `name` is that of its files in the output, without extension: `train/clips-000000`."""

    name: str
    digest: str
    tasks: tuple[ClipTask, ...]


@dataclass(frozen=True)
class Outcome:
    """What has become of a unit: a shard, or nothing where every clip of it was lost.

    Attributes:
        name: of the unit.
        samples, num_bytes, sha256: of the shard; sha256 is "" where there is none.
        seconds: of video in it.
        lost: key and reason of each clip that could not be made.
    """

    name: str
    samples: int
    num_bytes: int
    sha256: str
    seconds: float
    lost: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Step:
    """What has happened in making units.

    Attributes:
        clips: so many are done.
        lost: of these, so many could not be made.
        outcome: of a unit that is finished.
        unfetched: why a unit was given up: what it needs could not be fetched. It can be made later.
    """

    clips: int = 0
    lost: int = 0
    outcome: Outcome | None = None
    unfetched: str = ""


def in_split(split: str, name: str) -> str:
    """How the output calls a file of a split; "" is the output itself."""
    return f"{split}/{name}" if split else name


def unit_name(options: ShardOptions, shard: PlannedShard) -> str:
    return in_split(shard.split, f"{options.prefix}-{shard.number:06d}")


def units_of(plan: PlanStore, shards: Iterable[PlannedShard], options: ShardOptions, remote: Remote) -> Iterator[Unit]:
    """The units of these shards, one at a time."""
    for shard in shards:
        tasks = (
            ClipTask(clip, info, options.encodes(clip.frames is not None), options.encoding, remote)
            for clip, info in plan.clips_of(shard.split, shard.number)
        )
        yield Unit(unit_name(options, shard), shard.digest, tuple(tasks))


def write_units(
    units: Iterable[Unit], output: Output, pool: WorkerPool[Any, Any], *, reject_unfetched: bool = False
) -> Iterator[Step]:
    """Make units. A unit of nothing but whole files of which all is known is copied here, several side by side, in
    threads; the clips of others are made in `pool`, and written here one unit after the other.

    A clip whose decoder crashes or hangs is lost, and nothing else is. A unit of which a source could not be fetched
    is given up, or with `reject_unfetched` its clips are lost.
    """
    with tempfile.TemporaryDirectory(prefix="framestream-") as scratch:
        folders = (Path(scratch, str(number)) for number in count())
        for whole, some in groupby(units, key=_is_copied):
            if whole:
                stopped = threading.Event()
                copies = (_copied(unit, output, next(folders), reject_unfetched, stopped) for unit in some)
                yield from side_by_side(copies, min(pool.workers + 1, COPIED_AT_ONCE), stopped)
            else:
                yield from _made(some, output, pool, next(folders), reject_unfetched)


def _is_copied(unit: Unit) -> bool:
    return all(task.is_known for task in unit.tasks)


def _copied(
    unit: Unit, output: Output, scratch: Path, reject_unfetched: bool, stopped: threading.Event
) -> Generator[Step, None, None]:
    """Write a unit of files that are copied whole."""
    results = ((task, _copy_of(task, stopped)) for task in unit.tasks)
    yield from _written(unit, results, output, scratch, reject_unfetched)
    with suppress(OSError):  # what is in it goes with the folder around it
        scratch.rmdir()


def _copy_of(task: ClipTask, stopped: threading.Event) -> MadeClip | Failure:
    try:
        made = known_clip(task)
    except SampleError as err:
        return Failure(str(err))
    members = {e: m if isinstance(m, bytes) else Stoppable(m, stopped) for e, m in made.members.items()}
    return replace(made, members=members)


def _made(
    units: Iterable[Unit], output: Output, pool: WorkerPool[Any, Any], scratch: Path, reject_unfetched: bool
) -> Iterator[Step]:
    """Make units in `pool`, clips of several at a time, and write their shards one after the other."""
    begun: deque[Unit] = deque()

    def tasks() -> Iterator[ClipTask]:
        for unit in units:
            begun.append(unit)
            yield from unit.tasks

    results = pool.map(tasks())
    for first in results:
        unit = begun.popleft()
        own = chain([first], islice(results, len(unit.tasks) - 1))
        yield from _written(unit, own, output, scratch, reject_unfetched)


def _written(
    unit: Unit,
    results: Iterator[tuple[ClipTask, MadeClip | Failure]],
    output: Output,
    scratch: Path,
    reject_unfetched: bool,
) -> Iterator[Step]:
    """Write the shard of a unit out of what has become of its clips."""
    scratch.mkdir(exist_ok=True)
    with _writing(unit, output, scratch, reject_unfetched) as writer:
        try:
            for task, result in results:
                yield Step(1, writer.add(task, result))
            unfetched = writer.unfetched
            outcome = None if unfetched else writer.close()
        except OSError as err:
            if not (disk_full(err) and is_url(output.place)):
                raise
            raise ConfigError(
                f"{tempfile.gettempdir()} has no room for {unit.name}.tar, which is made there before it is sent: free "
                "some, or name another folder for temporary files with TMPDIR, and run again to go on"
            ) from err
    yield Step(outcome=outcome, unfetched=unfetched)


@dataclass
class _Writer:
    unit: Unit
    output: Output
    scratch: Path
    reject_unfetched: bool
    tar: TarShard | None = None
    seconds: float = 0.0
    lost: list[tuple[str, str]] = field(default_factory=list)
    unfetched: str = ""

    def add(self, task: ClipTask, result: MadeClip | Failure) -> int:
        """Keep a clip; return 1 where it is lost."""
        if isinstance(result, Failure):
            if result.storage and not self.reject_unfetched:
                self.unfetched = self.unfetched or result.reason
                return 0
            self.lost.append((task.clip.key, result.reason))
            return 1
        if self.unfetched:
            return 0
        if self.tar is None:
            self.tar = self.output.tar(f"{self.unit.name}.tar", self.scratch)
        try:
            self.tar.add(task.clip.key, result.members)
        except SampleError as err:  # of a file that is read only now
            self.lost.append((task.clip.key, str(err)))
            return 1
        self.seconds += result.seconds
        return 0

    def close(self) -> Outcome:
        lost = tuple(self.lost)
        note = {
            "version": NOTE_VERSION,
            "digest": self.unit.digest,
            "seconds": round(self.seconds, 3),
            "lost": [list(each) for each in lost],
        }
        tar, self.tar = self.tar, None
        if tar is None or not tar.num_samples:  # an empty tar would only be in the readers' way
            if tar is not None:
                tar.discard()
            self.output.write(_lost_file(self.unit.name), json.dumps(note, ensure_ascii=False).encode() + b"\n")
            return Outcome(self.unit.name, 0, 0, "", 0.0, lost)
        index = self.output.publish(tar, f"{self.unit.name}.tar", note)
        return _outcome(self.unit.name, index)


@contextmanager
def _writing(unit: Unit, output: Output, scratch: Path, reject_unfetched: bool) -> Iterator[_Writer]:
    writer = _Writer(unit, output, scratch, reject_unfetched)
    try:
        yield writer
    finally:
        if writer.tar is not None:
            writer.tar.discard()


def files_of(name: str) -> tuple[str, str, str]:
    """Names of a unit's tar, of its index file, and of what stands for them where every clip was lost."""
    return f"{name}.tar", f"{name}.idx.json", _lost_file(name)


def _lost_file(name: str) -> str:
    return os.path.join(os.path.dirname(name), f".{os.path.basename(name)}.lost.json")


def our_files(names: Iterable[str], prefix: str) -> list[str]:
    """Those file names that units of this prefix have; all others in the output are somebody's own."""
    unit = rf"{re.escape(prefix)}-[0-9]{{6,}}"
    ours = re.compile(rf"{unit}\.(tar|idx\.json)|\.{unit}\.lost\.json")
    return [name for name in names if ours.fullmatch(name)]


def unfinished(names: Iterable[str], prefix: str) -> list[str]:
    """Those file names under which a killed run left half a file: of a unit, or of what stands beside the shards."""
    unit = rf"\.?{re.escape(prefix)}-[0-9]{{6,}}\.(tar|idx\.json|lost\.json)"
    lists = "|".join(re.escape(name) for name in (FOLDER_INDEX, *LISTS))
    ours = re.compile(rf"\.({unit}|{lists})\.[0-9a-f-]+{re.escape(TEMP_SUFFIX)}")
    return [name for name in names if ours.fullmatch(name)]


def finished(shard: PlannedShard, name: str, tar_bytes: int | None, index: bytes | None) -> Outcome | None:
    """What became of a unit, out of its index file (or, with `tar_bytes` None, of the file that stands for it).

    None where it is not finished: a file is missing, damaged, cut, or of another plan.
    """
    if index is None:
        return None
    try:
        if tar_bytes is None:
            note = json.loads(index)
            outcome = Outcome(name, 0, 0, "", 0.0, _lost(note))
        else:
            parsed = ShardIndex.from_bytes(index, name)
            if parsed.num_bytes != tar_bytes or parsed.problems:
                return None
            note, outcome = parsed.note, _outcome(name, parsed)
        whole = note["digest"] == shard.digest and note["version"] == NOTE_VERSION
    except (ShardError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return outcome if whole and outcome.samples + len(outcome.lost) == shard.num_clips else None


def _outcome(name: str, index: ShardIndex) -> Outcome:
    seconds = float(index.note["seconds"])
    if not 0.0 <= seconds < float("inf"):
        raise ValueError(f"{name} has {seconds} s")
    return Outcome(name, len(index.samples), index.num_bytes, index.sha256 or "", seconds, _lost(index.note))


def _lost(note: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((str(key), str(reason)) for key, reason in note["lost"])
