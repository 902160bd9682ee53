"""Writing shards: plain ustar tars with the same bytes for the same samples, an index beside each, one for all."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, runtime_checkable

from .atomic import atomic_file, atomic_write
from .early_sync import EarlySync
from .errors import ConfigError, SampleError, ShardError
from .shard_index import (
    INDEX_VERSION,
    SAFE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    IndexedSample,
    ShardIndex,
    index_path,
)

MAX_KEY_BYTES = 90  # a ustar name holds 100 bytes; the rest is for the extension
MAX_MEMBER_BYTES = (8 << 30) - 1  # what the size field of a ustar header can say
FOLDER_INDEX = "index.json"
_BLOCK_BYTES = 1 << 20  # hashed and written at a time, so that they are still in the processor's cache
_KEY = re.compile(r"[^./\\\x00-\x20\x7f][^./\\\x00-\x1f\x7f]*")


def to_json(content: Mapping[str, Any]) -> bytes:
    """Compact JSON with sorted keys: the same bytes for the same content. Raises ConfigError on other values."""
    try:
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as err:
        raise ConfigError(f"metadata cannot become JSON ({err}): use text, finite numbers, lists, dicts") from err


@runtime_checkable
class StreamedMember(Protocol):
    """A member that is read when it is written."""

    @property
    def num_bytes(self) -> int: ...

    def blocks(self) -> Iterator[bytes | memoryview]:
        """All of its bytes, in order; each block is good until the next. Raises SampleError where it cannot be had."""
        ...


class _Hashed:
    """A file that hashes what is written through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sync = EarlySync(file.fileno())
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self.digest.update(block)
            self._file.write(block)
            self._sync.wrote(len(block))
        self.written += len(view)

    def mark(self) -> tuple[int, Any]:
        """This point of the file, for `back_to`."""
        return self.written, self.digest.copy()

    def back_to(self, mark: tuple[int, Any]) -> None:
        """Take back all that was written since."""
        self.written, self.digest = mark
        self._file.seek(self.written)
        self._file.truncate()

    def pad(self, multiple: int) -> None:
        """Fill it up with zeros to a multiple of so many bytes."""
        self.write(bytes(-self.written % multiple))

    def close(self) -> None:
        """The end of writing; the file itself stays open."""
        self._sync.close()


class TarShard:
    """One shard in the making. Nothing is visible under its name before `close()`; `discard()` leaves no trace."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._context = atomic_file(self.path)
        self._file = _Hashed(self._context.__enter__())
        self._samples: dict[str, dict[str, tuple[int, int]]] = {}

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def add(self, key: str, members: Mapping[str, bytes | memoryview | StreamedMember]) -> None:
        """Append one sample: extension without dot -> bytes.

        Raises:
            SampleError: a member that is streamed cannot be had, or one has more than 8 GiB; the shard is as it was
                before.
            ConfigError: the key has a dot, slash, control character or more than 90 bytes of UTF-8, is already in
                this shard, or an extension is not in SAFE_EXTENSIONS.
        """
        if not _KEY.fullmatch(key) or len(key.encode("utf-8", "surrogateescape")) > MAX_KEY_BYTES:
            raise ConfigError(f"{key!r} cannot be a key: no dots, slashes or control characters, 90 bytes at most")
        if key in self._samples:
            raise ConfigError(f"key {key!r} is already in {self.path.name}: keys have to be unique")
        if unknown := sorted(set(members) - set(SAFE_EXTENSIONS)):
            raise ConfigError(f"sample {key!r}: extension {unknown[0]!r} is none of {', '.join(SAFE_EXTENSIONS)}")
        mark = self._file.mark()
        try:
            self._samples[key] = {ext: self._append(f"{key}.{ext}", members[ext]) for ext in sorted(members)}
        except SampleError:
            self._file.back_to(mark)
            raise

    def _append(self, name: str, member: bytes | memoryview | StreamedMember) -> tuple[int, int]:
        """Write one member; where its bytes begin, and how many they are."""
        info = tarfile.TarInfo(name)
        info.size = member.num_bytes if isinstance(member, StreamedMember) else len(member)
        info.mode = 0o644
        if info.size > MAX_MEMBER_BYTES:
            raise SampleError(
                f"{name} has {info.size} bytes, and a tar holds files below 8 GiB: cut it, or encode it anew"
            )
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT, tarfile.ENCODING, "surrogateescape"))
        start = self._file.written
        for block in member.blocks() if isinstance(member, StreamedMember) else [member]:
            self._file.write(block)
        if self._file.written - start != info.size:
            raise SampleError(f"{name}: {self._file.written - start} bytes came of it, expected {info.size}")
        self._file.pad(tarfile.BLOCKSIZE)
        return start, info.size

    def close(self, note: Mapping[str, Any] | None = None) -> ShardIndex:
        """Finish the tar, put it in place and write its index file beside it."""
        try:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.pad(tarfile.RECORDSIZE)
            self._file.close()
        except BaseException:
            self.discard()
            raise
        self._context.__exit__(None, None, None)
        index = ShardIndex(
            self.path.name,
            self._file.written,
            tuple(IndexedSample(key, places) for key, places in self._samples.items()),
            sha256=self._file.digest.hexdigest(),
            note=note or {},
        )
        atomic_write(index_path(self.path), index.to_bytes())
        return index

    def discard(self) -> None:
        """Give the unfinished tar up."""
        with suppress(OSError):  # the file goes, whatever the disk says of it
            self._file.close()
        self._context.__exit__(ShardError, ShardError(f"{self.path.name} was given up"), None)


def folder_index(shards: Sequence[Mapping[str, Any]], more: Mapping[str, Any] | None = None) -> bytes:
    """The content of an `index.json`: format version and, per shard, its `name`, `samples`, `bytes` and `sha256`.

    Args:
        more: what the writer has to say of the set as a whole; readers pass over it.
    """
    content = {
        **(more or {}),
        "version": INDEX_VERSION,
        "num_samples": sum(shard["samples"] for shard in shards),
        "shards": list(shards),
    }
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def write_folder_index(folder: Path, indexes: Sequence[ShardIndex], more: Mapping[str, Any] | None = None) -> None:
    """Write `index.json` of these shards; see `folder_index`."""
    shards = [{"name": i.name, "samples": len(i.samples), "bytes": i.num_bytes, "sha256": i.sha256} for i in indexes]
    atomic_write(folder / FOLDER_INDEX, folder_index(shards, more))


def read_folder_index(data: bytes, name: str) -> dict[str, dict[str, Any]]:
    """Parse an `index.json`: shard name -> {samples, bytes, sha256}. Raises ShardError when damaged or too new."""
    try:
        content = json.loads(data)
        if content["version"] != INDEX_VERSION:
            raise ShardError(
                f"{name} has format version {content['version']!r}, this framestream reads {INDEX_VERSION}: update it"
            )
        listed: dict[str, dict[str, Any]] = {
            str(entry["name"]): {
                "samples": int(entry["samples"]),
                "bytes": int(entry["bytes"]),
                "sha256": None if entry["sha256"] is None else str(entry["sha256"]),
            }
            for entry in content["shards"]
        }
        if any(shard["samples"] < 0 for shard in listed.values()):
            raise ValueError("a shard has fewer than 0 samples")
        return listed
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ShardError(f"{name} is damaged ({err!r}): run `framestream verify --repair-index`") from err


class ShardWriter:
    """Writes samples into `{prefix}-000000.tar`, `-000001.tar`, … of `samples_per_shard` samples each.

    The same samples in the same order give the same bytes. A shard appears under its name when it is whole;
    `finish()` (called on leaving the `with` block without an error) writes the last one and `index.json`.

        with ShardWriter("shards", samples_per_shard=100) as writer:
            writer.write("clip-0", video_bytes, "mp4", {"user": {"score": 3}}, text="a dog")

    Raises:
        ConfigError: `samples_per_shard` below 1, an impossible prefix, or shards of that prefix already there.
    """

    def __init__(self, output_dir: str | Path, prefix: str = "clips", samples_per_shard: int = 256) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard is {samples_per_shard}, it has to be at least 1")
        if not _KEY.fullmatch(prefix):
            raise ConfigError(f"prefix {prefix!r} is no plain file name without dots")
        self.folder = Path(output_dir)
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        if next(self.folder.glob(f"{prefix}-*.tar"), None) is not None:
            raise ConfigError(f"{self.folder} already has shards named {prefix}-*.tar: choose another folder or prefix")
        self._indexes: list[ShardIndex] = []
        self._keys: set[str] = set()
        self._shard: TarShard | None = None

    def write(
        self,
        key: str,
        video: bytes,
        ext: str = "mp4",
        meta: Mapping[str, Any] | None = None,
        text: str | None = None,
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        """Append one sample: `KEY.<ext>`, `KEY.json`, `KEY.txt` when `text` is given, and `extra` members (npy)."""
        if key in self._keys:
            raise ConfigError(f"key {key!r} was written before: keys have to be unique in {self.folder}")
        members = sample_members(video, ext, meta or {}, text)
        members.update(extra or {})
        if self._shard is None:
            self._shard = TarShard(self.folder / f"{self.prefix}-{len(self._indexes):06d}.tar")
        self._shard.add(key, members)
        self._keys.add(key)
        if self._shard.num_samples == self.samples_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._indexes.append(self._shard.close())
            self._shard = None

    def finish(self) -> None:
        """Close the last shard and write `index.json`."""
        self._close_shard()
        write_folder_index(self.folder, self._indexes)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._shard is not None:
            self._shard.discard()


def sample_members(
    video: bytes | memoryview, ext: str, meta: Mapping[str, Any], text: str | None
) -> dict[str, bytes | memoryview]:
    """The members of one sample, by extension; the metadata gets the video's `sha256` where it has none.

    Raises:
        ConfigError: `ext` is no video extension.
    """
    ext = ext.lower().lstrip(".")
    if "sha256" not in meta:
        meta = {**meta, "sha256": hashlib.sha256(video).hexdigest()}
    return {ext: video, **described(ext, meta, text)}


def described(ext: str, meta: Mapping[str, Any], text: str | None) -> dict[str, bytes]:
    """The members of a sample that stand beside a video of this extension.

    Raises:
        ConfigError: `ext` is no video extension, or `meta` cannot become JSON.
    """
    if ext not in VIDEO_EXTENSIONS:
        raise ConfigError(f"{ext!r} is no video extension; known are {', '.join(VIDEO_EXTENSIONS)}")
    members = {"json": to_json(meta)}
    if text is not None:
        members["txt"] = text.encode("utf-8", "replace")
    return members
