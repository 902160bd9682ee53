"""The check of one shard, and of one sample in it. Runs in worker processes; reads and never writes a shard set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from framestream.pipeline.download import download
from framestream.pipeline.errors import ShardError
from framestream.pipeline.remote import Remote
from framestream.pipeline.sample_table import IndexedSample
from framestream.pipeline.shard_index import WITHOUT_VIDEO, ShardIndex, index_path, index_tar
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shards import RawSample

from .verify_video import Decode, compare, decode_problems

TOLD = 20  # of those are told one by one
_OURS = ("num_frames", "sha256")  # metadata with neither was written by somebody who has no such fields


@dataclass(frozen=True)
class ShardTask:
    """One shard to be checked.

    Attributes:
        path: the tar, local or a URL.
        decode: what to decode of the videos that are decoded.
        share: of the videos that are decoded, chosen by a hash of the key.
        remote: how to reach a URL.
        copy: where a remote shard is put while it is checked.
        num_bytes: of a remote shard, where its storage tells.
    """

    path: str
    decode: Decode
    share: float = 1.0
    remote: Remote = field(default_factory=Remote)
    copy: str = ""
    num_bytes: int | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard.

    Attributes:
        keys: of its samples, whole or not.
        described: samples whose metadata has fields that can be compared with the video.
        bare: samples without such fields, of which `first_bare` is the first.
        decoded: samples of whose videos frames were decoded.
        has_index: whether there is an index file beside it.
        changed: the bytes are not those that an index recorded, which is evidence that no repair may wipe out.
        index_problem: what is wrong with the index file, if anything is; `wanted_index` is what it should hold then.
        num_without_video: keys that have other members only; `without_video` tells of the first of them.
        problems: all else, one sentence each.
    """

    name: str
    num_bytes: int = 0
    sha256: str = ""
    num_samples: int = 0
    keys: tuple[str, ...] = ()
    described: int = 0
    bare: int = 0
    first_bare: str = ""
    decoded: int = 0
    has_index: bool = True
    changed: bool = False
    wanted_index: bytes | None = None
    index_problem: str = ""
    num_without_video: int = 0
    without_video: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class SampleCheck(NamedTuple):
    """What was found in one sample; `problems` are what stands behind its name in a sentence."""

    problems: tuple[str, ...]
    described: bool = False
    bare: bool = False
    decoded: bool = False


class SampleTask(NamedTuple):
    """One sample of a local tar to be checked."""

    path: str
    shard: str
    sample: IndexedSample
    decode: Decode
    share: float


@contextmanager
def local_shard(task: ShardTask) -> Iterator[Path]:
    """The tar as a local file; of a remote one a copy for as long as the block runs.

    Raises:
        ShardError: it is not there or cannot be fetched.
        OSError: no room for the copy.
    """
    if not is_url(task.path):
        yield Path(task.path)
        return
    copy = Path(task.copy)
    try:
        copy.touch()
        try:
            download(task.remote, task.path, copy, task.num_bytes, None)
        except FileNotFoundError as err:
            raise ShardError(f"{task.name} is listed and cannot be found") from err
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def check_shard(task: ShardTask) -> ShardCheck:
    """Check one shard against its index file, its checksums, its metadata and its videos."""
    try:
        with local_shard(task) as path:
            check, index = check_structure(task, path)
            samples = (SampleTask(str(path), task.name, s, task.decode, task.share) for s in index.samples)
            return with_samples(check, ((sample, check_sample(sample)) for sample in samples))
    except (ShardError, OSError) as err:
        return ShardCheck(task.name, problems=(f"{task.name}: it cannot be read ({err}).",))


def with_samples(check: ShardCheck, samples: Iterator[tuple[SampleTask, SampleCheck]]) -> ShardCheck:
    """`check` with what was found in its samples."""
    problems, described, bare, first_bare, decoded = list(check.problems), 0, 0, "", 0
    for task, found in samples:
        problems += [f"{check.name}: sample {task.sample.key!r} {what}" for what in found.problems]
        if found.bare and not bare:
            first_bare = task.sample.key
        described += found.described
        bare += found.bare
        decoded += found.decoded
    return replace(
        check, problems=tuple(problems), described=described, bare=bare, first_bare=first_bare, decoded=decoded
    )


def check_structure(task: ShardTask, path: Path) -> tuple[ShardCheck, ShardIndex]:
    """All about the tar that can be said without looking into its samples, and what is in it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    index = index_tar(path, name=task.name)
    sha256 = digest.hexdigest()
    without = [f"{problem}." for problem in index.problems if problem.endswith(WITHOUT_VIDEO)]
    check = ShardCheck(
        task.name,
        index.num_bytes,
        sha256,
        len(index.samples),
        tuple(sample.key for sample in index.samples),
        num_without_video=len(without),
        without_video=tuple(without[:TOLD]),
        problems=tuple(f"{problem}." for problem in index.problems if not problem.endswith(WITHOUT_VIDEO)),
    )
    before, fault, has_index = None, "", True
    try:
        before = _stored_index(task)
        has_index = before is not None
        fault = _index_fault(task, before, index, sha256)
    except ShardError as err:
        fault = f"{err}."
    if before is not None and _records_others(before, index, sha256):
        return replace(check, changed=True, index_problem=fault), index
    if not fault:
        return check, index
    # The writer's own remark stays where it was about these very bytes.
    note = before.note if before is not None and before.sha256 == sha256 else {}
    wanted = ShardIndex(task.name, index.num_bytes, index.samples, index.problems, sha256, note).to_bytes()
    return replace(check, has_index=has_index, wanted_index=wanted, index_problem=fault), index


def _stored_index(task: ShardTask) -> ShardIndex | None:
    """The index file beside the tar; None where there is none. Raises ShardError where it is damaged."""
    name = index_path(task.name).name
    if is_url(task.path):
        url = f"{task.path.rpartition('/')[0]}/{name}"
        return task.remote.read_small(url, lambda data: ShardIndex.from_bytes(data, name))
    try:
        return ShardIndex.from_bytes(index_path(task.path).read_bytes(), name)
    except FileNotFoundError:
        return None


def _records_others(stored: ShardIndex, actual: ShardIndex, sha256: str) -> bool:
    """Whether an index file was made for other bytes."""
    return stored.num_bytes != actual.num_bytes or stored.sha256 not in (None, sha256)


def _index_fault(task: ShardTask, stored: ShardIndex | None, actual: ShardIndex, sha256: str) -> str:
    """What is wrong with an index file, in a sentence; "" when it is right."""
    tar, name = task.name, index_path(task.name).name
    if stored is None:
        return f"{tar} has no {name} beside it; `--repair-index` writes it."
    if stored.num_bytes != actual.num_bytes:
        return f"{tar} has {actual.num_bytes} bytes, {name} was made for {stored.num_bytes}: its bytes have changed."
    if stored.samples != actual.samples:
        return f"{name} does not list what is in {tar}."
    if stored.sha256 not in (None, sha256):
        return f"{tar} has not the sha256 that {name} says: its bytes have changed."
    return ""


def check_sample(task: SampleTask) -> SampleCheck:
    """Check one sample: its metadata, its checksum, its packets, and that it decodes."""
    try:
        members = {}
        with open(task.path, "rb") as file:
            for ext, (offset, size) in task.sample.members.items():
                if ext != "npy":
                    file.seek(offset)
                    members[ext] = file.read(size)
        raw = RawSample(task.sample.key, task.shard, members)
        decode = task.decode if chosen(raw.key, task.share) else "none"
        described = any(name in raw.meta for name in _OURS)
        damaged = bool(raw.meta_error) and "json" in members
        problems = [f"has no usable metadata: {raw.meta_error}."] if damaged else []
        info = compare(raw, described, problems)
        if info is not None and decode != "none":
            problems += decode_problems(raw, info, decode)
        bare = not (described or damaged)
        return SampleCheck(tuple(problems), described, bare, info is not None and decode != "none")
    except Exception as err:  # codecs may raise anything; it is this sample's problem and not its neighbours'
        return SampleCheck((f"cannot be checked ({type(err).__name__}: {err}).",))


def chosen(key: str, share: float) -> bool:
    """Whether a sample is among the `share` of all that are decoded: the same at every run, on every machine."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
