"""Videos to shards: the work behind `framestream shard`.

Three steps, each a function of the one before: look the inputs up and probe them, plan the clips, make them in
plan order. A shard remembers in its index which stretch of the plan it covers, so a run that was killed goes on
behind the last whole shard and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from framestream.pipeline.atomic import atomic_write
from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.probe import VideoInfo
from framestream.pipeline.shard_index import ShardIndex, index_path
from framestream.pipeline.shard_writer import FOLDER_INDEX, TarShard, sweep_temporary, write_folder_index

from .clips import Clip, Cutting, Plan, digest, plan_clips
from .inputs import Found, find_sources
from .pool import Failure, WorkerPool
from .transcode import ClipTask, Encoding, encoder_version, make_clip, probe_source

PLAN_FILE = ".plan.json"
REPORT_FILE = "report.json"
REJECTS_FILE = "rejects.jsonl"
PLAN_VERSION = 1
PROBE_TIMEOUT_S = 120.0

Progress = Callable[[str, int, int, int], None]  # step, done, of, rejects


@dataclass(frozen=True)
class ShardOptions:
    """Everything that decides the bytes of the result, apart from the inputs."""

    samples_per_shard: int = 256
    prefix: str = "clips"
    cutting: Cutting = field(default_factory=Cutting)
    transcode: Literal["auto", "always", "never"] = "auto"
    encoding: Encoding = field(default_factory=Encoding)

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard is {self.samples_per_shard}, it has to be at least 1")
        if not self.prefix.replace("-", "").replace("_", "").isalnum() or not self.prefix.isascii():
            raise ConfigError(f"prefix {self.prefix!r} has to be made of letters, digits, - and _")
        if self.transcode not in ("auto", "always", "never"):
            raise ConfigError(f"transcode is {self.transcode!r}, it has to be auto, always or never")
        if self.transcode == "never" and (self.cutting.clip_seconds or self._asks_for_encoding):
            raise ConfigError("transcode is never, but clip_seconds, short_side and fps need clips to be encoded anew")

    @property
    def _asks_for_encoding(self) -> bool:
        return self.encoding.short_side is not None or self.encoding.fps is not None

    def encoding_of(self, clip: Clip) -> Encoding | None:
        """How a clip is encoded, None where the file is copied as it is."""
        if self.transcode == "always" or self._asks_for_encoding:
            return self.encoding
        return None if clip.frames is None else self.encoding

    def to_json(self) -> dict[str, Any]:
        options = asdict(self)
        if self.cutting.clip_seconds or self.transcode == "always" or self._asks_for_encoding:
            options["encoder"] = encoder_version()
        return options


@dataclass(frozen=True)
class ShardReport:
    """What became of every input; also in `report.json`.

    Attributes:
        inputs: found = used + rejected + dropped.
        clips: planned = written + rejected; `dropped` counts by rule what was not planned.
        splits: per split ("" without splits) its samples, shards, bytes and seconds.
        rejects: source, reason, and for clips their key, start and end; also in `rejects.jsonl`.
        other_files: files that were passed over because they are no videos, by extension.
    """

    inputs: dict[str, Any]
    clips: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    rejects: list[dict[str, Any]]
    other_files: dict[str, int]


def build_shards(
    inputs: Sequence[str],
    output: str | Path,
    options: ShardOptions | None = None,
    *,
    workers: int = 0,
    timeout_s: float = 600.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShardReport:
    """Shard `inputs` into `output`; the function behind `framestream shard`, whose arguments see there.

    Raises:
        ConfigError: impossible options, no video in the inputs, or an output that belongs to another run.
    """
    from filelock import FileLock, Timeout

    options = options or ShardOptions()
    workers = workers or os.cpu_count() or 1
    if workers < 1 or timeout_s <= 0:
        raise ConfigError(f"workers and timeout have to be positive, got {workers} and {timeout_s:g}")
    progress = progress or (lambda step, done, total, rejects: None)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(
            f"output {folder} cannot be made ({err.strerror}): name a folder that can be written"
        ) from err
    try:
        with FileLock(str(folder / ".lock"), timeout=0):
            return _Run(folder, options, workers, timeout_s, progress).run(inputs, overwrite)
    except Timeout as err:
        raise ConfigError(f"another run is writing to {folder}: wait for it or name another folder") from err
    except OSError as err:
        raise ShardError(f"{folder} cannot be written ({err.strerror or err}); run again to go on from here") from err


class _Run:
    def __init__(self, folder: Path, options: ShardOptions, workers: int, timeout_s: float, progress: Progress) -> None:
        self.folder, self.options, self.workers = folder, options, workers
        self.timeout_s, self.progress = timeout_s, progress
        self.num_rejects = 0

    def run(self, inputs: Sequence[str], overwrite: bool) -> ShardReport:
        found = find_sources(inputs)
        sweep_temporary(self.folder)
        if overwrite:
            self._clear()
        infos = self._probe(found)
        plan = plan_clips(found.sources, infos, self.options.cutting)
        for clip in (clip for clips in plan.splits.values() for clip in clips):
            if self.options.transcode == "never" and clip.frames is not None:
                raise ConfigError(f"transcode is never, but the manifest asks for a part of {clip.source.source}")
        self.num_rejects = len(found.rejects) + len(plan.rejects)
        probed = {s.key: i for s, i in zip(found.sources, infos, strict=True) if isinstance(i, VideoInfo)}
        rejects = found.rejects + plan.rejects
        splits, done = {}, 0
        for split in sorted(plan.splits):
            clips = plan.splits[split]
            step = _Split(self, self.folder / split, clips, probed, done, plan.num_clips)
            indexes = step.write()
            splits[split] = {
                "samples": sum(len(index.samples) for index in indexes),
                "shards": len(indexes),
                "bytes": sum(index.num_bytes for index in indexes),
                "seconds": round(sum(index.note["seconds"] for index in indexes), 3),
            }
            rejects += step.rejects
            done += len(clips)
        return self._report(found, plan, splits, rejects)

    def _probe(self, found: Found) -> list[VideoInfo | str]:
        """Probe all sources, or take what a run with the same inputs and options found; that is kept either way."""
        path = self.folder / PLAN_FILE
        content = {
            "version": PLAN_VERSION,
            "options": self.options.to_json(),
            "sources": [source.to_json() for source in found.sources],
            "rejects": found.rejects,
        }
        content = json.loads(json.dumps(content))  # as it will be read: tuples are lists
        before = self._earlier(path)
        if before is not None:
            if difference := _difference(before, content):
                raise ConfigError(
                    f"{self.folder} holds the shards of another run ({difference}): name another output folder, or "
                    f"set overwrite to remove what is there"
                )
            return [info if isinstance(info, str) else VideoInfo.from_json(info) for info in before["infos"]]
        infos: list[VideoInfo | str] = []
        bad = len(found.rejects)
        with WorkerPool(probe_source, workers=self.workers, timeout_s=PROBE_TIMEOUT_S) as pool:
            for _, result in pool.map(found.sources):
                infos.append(result.reason if isinstance(result, Failure) else result)
                bad += isinstance(result, Failure)
                self.progress("probing", len(infos), len(found.sources), bad)
        content["infos"] = [info if isinstance(info, str) else info.to_json() for info in infos]
        atomic_write(path, json.dumps(content).encode())
        return infos

    def _earlier(self, path: Path) -> dict[str, Any] | None:
        try:
            before = json.loads(path.read_bytes())
            if not isinstance(before, dict) or "infos" not in before:
                raise ValueError("it is incomplete")
            return before
        except FileNotFoundError:
            if foreign := next((p for p in self.folder.glob("**/*.tar")), None):
                raise ConfigError(
                    f"{self.folder} has {foreign.name} from elsewhere: name an empty output folder"
                ) from None
            return None
        except ValueError as err:
            raise ConfigError(f"{path} is damaged ({err}): set overwrite to begin anew") from err

    def _clear(self) -> None:
        """Remove what an earlier run of ours wrote, and only that."""
        try:
            plan = json.loads((self.folder / PLAN_FILE).read_bytes())
            prefix, splits = str(plan["options"]["prefix"]), {str(s["split"]) for s in plan["sources"]}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):  # a damaged plan says nothing: what this run would write has to go
            prefix, splits = self.options.prefix, set()
        for split in splits | {"", "train", "val"}:
            folder = self.folder / split
            for path in _shard_files(folder, prefix):
                path.unlink()
            (folder / FOLDER_INDEX).unlink(missing_ok=True)
            sweep_temporary(folder)
        for name in (REPORT_FILE, REJECTS_FILE, PLAN_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def _report(
        self, found: Found, plan: Plan, splits: dict[str, dict[str, Any]], rejects: list[dict[str, Any]]
    ) -> ShardReport:
        clips_of = Counter(clip.source.key for clips in plan.splits.values() for clip in clips)
        lost_of = Counter(reject["source_key"] for reject in rejects if "source_key" in reject)
        all_lost = sum(lost_of[key] == n for key, n in clips_of.items())
        rejected = len(found.rejects) + len(plan.rejects) + all_lost
        dropped = dict(sorted(plan.dropped_sources.items()))
        if found.repeated:
            dropped["named twice"] = found.repeated
        gap = len(found.sources) - len(plan.rejects) - len(clips_of) - sum(plan.dropped_sources.values())
        if gap:
            dropped["wholly in the gap before the held-out part"] = gap
        report = ShardReport(
            inputs={
                "found": found.num_inputs,
                "used": len(clips_of) - all_lost,
                "rejected": rejected,
                "dropped": dropped,
            },
            clips={
                "planned": plan.num_clips,
                "written": sum(split["samples"] for split in splits.values()),
                "rejected": sum(lost_of.values()),
                "dropped": dict(sorted(plan.dropped_clips.items())),
            },
            splits=splits,
            rejects=[{k: v for k, v in reject.items() if k != "source_key"} for reject in rejects],
            other_files=dict(sorted(found.other_files.items())),
        )
        lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in report.rejects]
        atomic_write(self.folder / REJECTS_FILE, "".join(lines).encode())
        content = {**asdict(report), "version": PLAN_VERSION, "rejects": len(report.rejects)}
        atomic_write(self.folder / REPORT_FILE, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
        return report


class _Split:
    """Writes the shards of one split, those that are missing."""

    def __init__(
        self, run: _Run, folder: Path, clips: list[Clip], infos: Mapping[str, VideoInfo], done: int, total: int
    ) -> None:
        self.run, self.folder, self.clips, self.infos = run, folder, clips, infos
        self.done, self.total = done, total
        self.rejects: list[dict[str, Any]] = []
        self.plan = digest(clips, run.options.to_json())
        self.indexes: list[ShardIndex] = []

    def write(self) -> list[ShardIndex]:
        self.folder.mkdir(exist_ok=True)
        sweep_temporary(self.folder)
        begin = self._keep_finished()
        shard: TarShard | None = None
        seconds, rejects = 0.0, []
        position = begin
        try:
            with WorkerPool(make_clip, workers=self.run.workers, timeout_s=self.run.timeout_s) as pool:
                for task, result in pool.map(self._task(clip) for clip in self.clips[begin:]):
                    position += 1
                    if isinstance(result, Failure):
                        rejects.append(_reject(task.clip, result.reason))
                        self.run.num_rejects += 1
                    else:
                        shard = shard or TarShard(self._path(len(self.indexes)))
                        shard.add(task.clip.key, result.members)
                        seconds += result.seconds
                        if shard.num_samples == self.run.options.samples_per_shard:
                            self._close(shard, begin, position, seconds, rejects)
                            shard, begin, seconds, rejects = None, position, 0.0, []
                    self.run.progress("writing", self.done + position, self.total, self.run.num_rejects)
            if shard is not None:
                self._close(shard, begin, position, seconds, rejects)
                shard, rejects = None, []
        finally:
            if shard is not None:
                shard.discard()
        self.rejects += rejects  # behind the last shard
        write_folder_index(self.folder, self.indexes)
        return self.indexes

    def _task(self, clip: Clip) -> ClipTask:
        return ClipTask(clip, self.infos[clip.source.key], self.run.options.encoding_of(clip))

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.run.options.prefix}-{number:06d}.tar"

    def _close(self, shard: TarShard, begin: int, stop: int, seconds: float, rejects: list[dict[str, Any]]) -> None:
        note = {"plan": self.plan, "clips": [begin, stop], "seconds": round(seconds, 3), "rejects": rejects}
        self.indexes.append(shard.close(note))
        self.rejects += rejects

    def _keep_finished(self) -> int:
        """Take over the whole shards of an earlier run of the same plan; return the first clip that is still to do."""
        begin = 0
        while True:
            path = self._path(len(self.indexes))
            try:
                index = ShardIndex.from_bytes(index_path(path).read_bytes(), str(index_path(path)))
                whole = path.stat().st_size == index.num_bytes
            except (OSError, ShardError):
                break
            if not whole or not self._continues(begin, index):
                break
            self.indexes.append(index)
            self.rejects += index.note["rejects"]
            self.run.num_rejects += len(index.note["rejects"])
            begin = index.note["clips"][1]
        kept = {self._path(number).stem for number in range(len(self.indexes))}
        for path in _shard_files(self.folder, self.run.options.prefix):  # a tar without index, or behind a hole
            if path.name.split(".")[0] not in kept:
                path.unlink()
        self.run.progress("writing", self.done + begin, self.total, self.run.num_rejects)
        return begin

    def _continues(self, begin: int, index: ShardIndex) -> bool:
        """Whether an index is of this plan and goes on at clip `begin`; its note may be damaged."""
        note = index.note
        try:
            first, stop = note["clips"]
            return (
                note["plan"] == self.plan
                and isinstance(stop, int)
                and first == begin
                and stop == begin + len(index.samples) + len(note["rejects"])
                and all({"source", "reason"} <= reject.keys() for reject in note["rejects"])
                and note["seconds"] >= 0.0
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return False


def _shard_files(folder: Path, prefix: str) -> list[Path]:
    """The files in `folder` that are named as our tars and their indexes are; all else there is somebody's own."""
    ours = re.compile(rf"{re.escape(prefix)}-[0-9]{{6,}}\.(tar|idx\.json)")
    return [p for p in folder.glob("*") if ours.fullmatch(p.name) and p.is_file() and not p.is_symlink()]


def _reject(clip: Clip, reason: str) -> dict[str, Any]:
    return {
        "source": clip.source.source,
        "reason": reason,
        "key": clip.key,
        "start": clip.start,
        "end": clip.end,
        "source_key": clip.source.key,
    }


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first thing in which two plans differ, in words; "" when there is none."""
    if before.get("version") != now["version"]:
        return "made by another version of framestream"
    old, new = (_flat(content["options"]) for content in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name)}, now it is {new.get(name)}"
    olds, news = ({s["key"]: s for s in content["sources"]} for content in (before, now))
    for key in [*olds, *news]:
        if key not in news:
            return f"input {olds[key]['source']} is gone"
        if key not in olds:
            return f"input {news[key]['source']} is new"
        if olds[key] != news[key]:
            what = [name for name in news[key] if olds[key].get(name) != news[key][name]]
            return f"the {what[0]} of input {news[key]['source']} has changed"
    if list(olds) != list(news) or before["rejects"] != now["rejects"]:
        return "the inputs come in another order or fail in another way"
    return ""


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        inner: value
        for name, part in options.items()
        for inner, value in (part.items() if isinstance(part, dict) else [(name, part)])
    }
