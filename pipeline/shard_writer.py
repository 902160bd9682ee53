"""Writing shards: plain ustar tars with the same bytes for the same samples, an index beside each, one for all."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .atomic import atomic_file, atomic_write
from .buffer_file import buffer_file
from .errors import ConfigError, ShardError
from .shard_index import (
    INDEX_VERSION,
    SAFE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    IndexedSample,
    ShardIndex,
    index_path,
)

MAX_KEY_BYTES = 90  # a ustar name holds 100 bytes; the rest is for the extension
FOLDER_INDEX = "index.json"
_COPY_BYTES = 1 << 20  # at a time
_KEY = re.compile(r"[^./\\\x00-\x20\x7f][^./\\\x00-\x1f\x7f]*")


def to_json(content: Mapping[str, Any]) -> bytes:
    """Compact JSON with sorted keys: the same bytes for the same content. Raises ConfigError on other values."""
    try:
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as err:
        raise ConfigError(f"metadata cannot become JSON ({err}): use text, finite numbers, lists, dicts") from err


class _Hashed:
    """A file that hashes what is written through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.written


class TarShard:
    """One shard in the making. Nothing is visible under its name before `close()`; `discard()` leaves no trace."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._context = atomic_file(self.path)
        self._file = _Hashed(self._context.__enter__())
        # tarfile writes front to back and never seeks in this mode, so the tar can be hashed on its way to the disk.
        self._tar = tarfile.TarFile(
            fileobj=self._file,  # type: ignore[arg-type]
            mode="w",
            format=tarfile.USTAR_FORMAT,
            copybufsize=_COPY_BYTES,
        )
        self._samples: dict[str, dict[str, tuple[int, int]]] = {}

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def add(self, key: str, members: Mapping[str, bytes | memoryview]) -> None:
        """Append one sample: extension without dot -> bytes.

        Raises:
            ConfigError: the key has a dot, slash, control character or more than 90 bytes of UTF-8, is already in
                this shard, or an extension is not in SAFE_EXTENSIONS.
        """
        if not _KEY.fullmatch(key) or len(key.encode("utf-8", "surrogateescape")) > MAX_KEY_BYTES:
            raise ConfigError(f"{key!r} cannot be a key: no dots, slashes or control characters, 90 bytes at most")
        if key in self._samples:
            raise ConfigError(f"key {key!r} is already in {self.path.name}: keys have to be unique")
        if unknown := sorted(set(members) - set(SAFE_EXTENSIONS)):
            raise ConfigError(f"sample {key!r}: extension {unknown[0]!r} is none of {', '.join(SAFE_EXTENSIONS)}")
        places = {}
        for ext in sorted(members):
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size = len(members[ext])
            info.mode = 0o644
            self._tar.addfile(info, buffer_file(members[ext]))
            data_blocks = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[ext] = (self._file.written - data_blocks, info.size)
        self._samples[key] = places

    def close(self, note: Mapping[str, Any] | None = None) -> ShardIndex:
        """Finish the tar, put it in place and write its index file beside it."""
        self._tar.close()
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
    if ext not in VIDEO_EXTENSIONS:
        raise ConfigError(f"{ext!r} is no video extension; known are {', '.join(VIDEO_EXTENSIONS)}")
    if "sha256" not in meta:
        meta = {**meta, "sha256": hashlib.sha256(video).hexdigest()}
    members: dict[str, bytes | memoryview] = {ext: video, "json": to_json(meta)}
    if text is not None:
        members["txt"] = text.encode("utf-8", "replace")
    return members
