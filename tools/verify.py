"""`framestream verify`: read everything again and say what does not agree."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from framestream.pipeline.errors import ConfigError, FramestreamError, SampleError, ShardError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.shard_index import ShardIndex, index_path, index_tar
from framestream.pipeline.shard_writer import FOLDER_INDEX, read_folder_index, repair_folder_index
from framestream.pipeline.shards import RawSample

from .pool import Failure, WorkerPool

Decode = Literal["none", "sample", "all"]
CHUNK = 64  # frames decoded at a time
TIMEOUT_S = 3600.0  # for one shard
_CHECKED = ("num_frames", "key_frames", "width", "height", "codec", "rotation")


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard. `keys` are those of its samples, whole or not."""

    name: str
    num_bytes: int = 0
    sha256: str = ""
    keys: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass
class VerifyReport:
    """What was found. `problems` has one sentence each, in order of the shards."""

    checks: list[tuple[Path, ShardCheck]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_repaired: int = 0

    @property
    def num_samples(self) -> int:
        return sum(len(check.keys) for _, check in self.checks)


@dataclass(frozen=True)
class ShardTask:
    """One shard to be checked."""

    path: Path
    decode: Decode


def verify_folder(
    folder: str | Path,
    *,
    decode: Decode = "sample",
    repair_index: bool = False,
    workers: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> VerifyReport:
    """Check the shards of `folder` and of the folders in it; the function behind `framestream verify`.

    Raises:
        ConfigError: an unknown `decode`.
        ShardError: the folder does not exist, is a file, or holds no tar.
    """
    if decode not in ("none", "sample", "all"):
        raise ConfigError(f"decode is {decode!r}, it has to be none, sample or all")
    if workers < 0:
        raise ConfigError(f"workers is {workers}, it has to be at least 0")
    root = Path(folder)
    if root.is_file():
        raise ShardError(f"{root} is a file: give the folder that holds it")
    if not root.is_dir():
        raise ShardError(f"folder {root} does not exist: check the path")
    folders = [p for p in [root, *sorted(p for p in root.iterdir() if p.is_dir())] if any(_shards(p))]
    if (root / FOLDER_INDEX).exists() and root not in folders:
        folders.insert(0, root)  # all its tars are gone, or it never had any
    if not folders:
        raise ShardError(f"folder {root} holds no .tar file, and no folder in it does")
    report = VerifyReport()
    if repair_index:
        for place in folders:
            report.num_repaired += len(repair_folder_index(place))
    tasks = [ShardTask(path, decode) for place in folders for path in _shards(place)]
    with WorkerPool(check_shard, workers=workers or os.cpu_count() or 1, timeout_s=TIMEOUT_S) as pool:
        for task, result in pool.map(tasks):
            if isinstance(result, Failure):
                result = ShardCheck(
                    task.path.name, problems=(f"{task.path.name}: checking it failed ({result.reason})",)
                )
            report.checks.append((task.path.parent, result))
            report.problems += _placed(root, task.path.parent, result.problems)
            if progress:
                progress(len(report.checks), len(tasks), len(report.problems))
    for place in folders:
        checks = [check for parent, check in report.checks if parent == place]
        report.problems += _placed(root, place, _folder_problems(place, checks))
    return report


def _shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.tar") if p.is_file() and not p.name.startswith("."))


def _placed(root: Path, place: Path, problems: Sequence[str]) -> list[str]:
    return list(problems) if place == root else [f"{place.relative_to(root)}: {problem}" for problem in problems]


def _folder_problems(folder: Path, checks: Sequence[ShardCheck]) -> list[str]:
    """What does not agree between the shards of one folder and its `index.json`."""
    problems = []
    seen: dict[str, str] = {}
    for check in checks:
        for key in check.keys:
            if key in seen:
                where = f"{seen[key]} and {check.name}" if seen[key] != check.name else f"{check.name} twice"
                problems.append(f"key {key!r} is in {where}.")
            seen[key] = check.name
    problems += [f"{path.name} was left by a killed run." for path in sorted(folder.glob(".*.tmp"))]
    for path in sorted(folder.glob("*.idx.json")):
        if not path.with_name(path.name.removesuffix(".idx.json") + ".tar").exists():
            problems.append(f"{path.name} has no shard beside it.")
    try:
        listed = read_folder_index((folder / FOLDER_INDEX).read_bytes(), FOLDER_INDEX)
    except FileNotFoundError:
        return [*problems, f"there is no {FOLDER_INDEX}; `--repair-index` writes it."]
    except ShardError as err:
        return [*problems, f"{err}."]
    present = {check.name: check for check in checks}
    for name in sorted(listed.keys() - present.keys()):
        problems.append(f"{name} is listed in {FOLDER_INDEX} and missing.")
    for name, check in present.items():
        entry = listed.get(name)
        if entry is None:
            problems.append(f"{name} is not listed in {FOLDER_INDEX}.")
            continue
        for what, actual in (("bytes", check.num_bytes), ("samples", len(check.keys)), ("sha256", check.sha256)):
            if entry[what] != actual:
                problems.append(f"{name} has {what} {actual}, {FOLDER_INDEX} says {entry[what]}.")
    return problems


def check_shard(task: ShardTask) -> ShardCheck:
    """Check one shard against its index file, its checksums, its metadata and its videos."""
    path = task.path
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    index = index_tar(path)
    problems = [f"{problem}." for problem in index.problems]
    problems += _index_problems(path, index, digest.hexdigest())
    with open(path, "rb") as file:
        for sample in index.samples:
            members = {}
            for ext, (offset, size) in sample.members.items():
                file.seek(offset)
                members[ext] = file.read(size)
            raw = RawSample(sample.key, path.name, members)
            problems += [f"{path.name}: sample {sample.key!r} {what}" for what in _checked(raw, task.decode)]
    keys = tuple(sample.key for sample in index.samples)
    return ShardCheck(path.name, index.num_bytes, digest.hexdigest(), keys, tuple(problems))


def _index_problems(path: Path, actual: ShardIndex, sha256: str) -> Iterator[str]:
    place = index_path(path)
    try:
        index = ShardIndex.from_bytes(place.read_bytes(), place.name)
    except FileNotFoundError:
        yield f"{path.name} has no {place.name} beside it; `--repair-index` writes it."
        return
    except ShardError as err:
        yield f"{err}."
        return
    if index.num_bytes != actual.num_bytes:
        yield f"{path.name} has {actual.num_bytes} bytes, {place.name} was made for {index.num_bytes}."
    elif index.samples != actual.samples:
        yield f"{place.name} does not list what is in {path.name}."
    if index.sha256 not in (None, sha256):
        yield f"{path.name} has not the sha256 that {place.name} says: its bytes have changed."


def _checked(sample: RawSample, decode: Decode) -> Iterator[str]:
    try:
        yield from _sample_problems(sample, decode)
    except Exception as err:  # codecs may raise anything; it is this sample's problem and not its neighbours'
        yield f"cannot be checked ({type(err).__name__}: {err})."


def _sample_problems(sample: RawSample, decode: Decode) -> Iterator[str]:
    if sample.meta_error:
        yield f"has no usable metadata: {sample.meta_error}."
    recorded = sample.meta.get("sha256")
    if recorded is not None and recorded != hashlib.sha256(sample.video).hexdigest():
        yield f"has a .{sample.video_ext} whose sha256 is not the one in its .json: its bytes have changed."
    try:
        info = probe_video(sample.video, name=sample.key, packets=True)
    except SampleError as err:
        yield f"has no readable video: {err}"
        return
    claimed = sample.info
    if claimed is None:
        if not sample.meta_error:
            yield "has metadata that does not describe its video (num_frames, fps, width, …)."
    else:
        for name in _CHECKED:
            if getattr(claimed, name) != getattr(info, name):
                yield f"has {name} {getattr(info, name)}, its .json says {getattr(claimed, name)}."
        if "packets" in sample.meta and (claimed.packets is None or not claimed.packets.same_packets(info.packets)):
            yield "has packets other than its .json says: its bytes have changed, or its .json is damaged there."
    if decode != "none":
        yield from _decode_problems(sample, info, decode)


def _decode_problems(sample: RawSample, info: VideoInfo, decode: Decode) -> Iterator[str]:
    from framestream.pipeline.decode import open_decoder

    wanted = sorted({0, info.num_frames - 1}) if decode == "sample" else range(info.num_frames)
    try:
        with open_decoder(sample.video, backend="pyav", info=info, name=sample.key, timeout_s=600.0) as decoder:
            for begin in range(0, len(wanted), CHUNK):
                decoder.frames_at(wanted[begin : begin + CHUNK])
    except SampleError as err:
        yield f"does not decode: {err}"


def verify(
    folder: str,
    *,
    decode: Literal["none", "sample", "all"] = "sample",
    repair_index: bool = False,
    workers: int = 0,
) -> int:
    """Check a folder of shards: read every byte again and compare all that is said twice.

    Checked are the structure of the tars, the checksum of every shard (index.json) and of every video (its .json),
    the index files against the tars, that keys are unique, the metadata against the videos, and that the videos
    decode. A folder with train/ and val/ inside is checked with both. Nothing is changed without --repair-index.

    Examples:
        framestream verify shards
        framestream verify shards --decode all

    Args:
        folder: the folder that holds the shards, or folders of shards.
        decode: decode the first and the last frame of every video (sample), every frame (all), or none.
        repair_index: first write all index files anew from what is in the tars.
        workers: processes; 0 takes one per CPU core.

    Returns:
        Exit code: 0 when everything agrees, 1 when something does not, 2 when there is nothing to check.
    """
    from rich.console import Console
    from rich.table import Table

    from .shard import progress_bar

    console = Console(stderr=True)
    try:
        with progress_bar(console, "problems") as progress:
            report = verify_folder(
                folder,
                decode=decode,
                repair_index=repair_index,
                workers=workers,
                progress=lambda done, total, bad: progress("checking", done, total, bad),
            )
    except FramestreamError as err:
        print(f"framestream verify: {err}", file=sys.stderr)
        return 2
    table = Table("shards in", "shards", "samples", "MB", "problems")
    for place in dict.fromkeys(parent for parent, _ in report.checks):
        checks = [check for parent, check in report.checks if parent == place]
        named = _placed(Path(folder), place, [""])[0]
        bad = sum(p.startswith(named) for p in report.problems) if named else len(report.problems)
        megabytes = f"{sum(check.num_bytes for check in checks) / 1e6:.1f}"
        table.add_row(str(place), str(len(checks)), str(sum(len(c.keys) for c in checks)), megabytes, str(bad))
    Console().print(table)
    if repair_index:
        print(f"wrote the index files of {report.num_repaired} shards anew")
    for problem in report.problems:
        print(problem)
    print("everything agrees" if not report.problems else f"{len(report.problems)} problems")
    return 1 if report.problems else 0
