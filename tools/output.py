"""Where shards are written: a local folder, or any place that fsspec can write to. A file with a final name is whole.

Locally a file is written under a temporary name, synced and renamed. Remote files are made in a local folder first.
Object stores show an object only when all of it has arrived; elsewhere it is uploaded under a temporary name and moved.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from framestream.pipeline.atomic import TEMP_SUFFIX, atomic_file, atomic_write
from framestream.pipeline.errors import ConfigError, StorageError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_index import ShardIndex, index_path
from framestream.pipeline.shard_paths import SHELL_OPENER, is_url
from framestream.pipeline.shard_writer import TarShard

from .urls import absolute

READERS = 16  # requests at a time
_WHOLE_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2")


class Output(Protocol):
    """A folder of shards, read and written by names relative to it (`train/clips-000000.tar`). Picklable."""

    @property
    def place(self) -> str:
        """How messages call it."""

    @property
    def identity(self) -> str:
        """Tells places apart that have the same name on different servers."""

    def begin(self) -> None:
        """Make the output itself. Raises ConfigError where nothing can be written to it."""

    def prepare(self, folder: str) -> None:
        """Make `folder` ("" for the output itself)."""

    def sizes(self, folder: str) -> dict[str, int]:
        """The files in `folder` by their names in it, with their bytes; {} where there is no such folder."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where it does not exist."""

    def write(self, name: str, data: bytes) -> None:
        """A small file, as a whole or not at all."""

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        """A file of any size, as a whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    def tar(self, name: str, scratch: Path) -> TarShard:
        """A tar in the making, for `publish`; `scratch` is a local folder for what must not be seen yet."""

    def publish(self, shard: TarShard, name: str, note: Mapping[str, Any]) -> ShardIndex:
        """Finish a tar: it appears under its name, then its index file beside it."""


def open_output(place: str | Path, remote: Remote) -> Output:
    """The output that `place` names. Raises ConfigError where it cannot be made or its protocol is unknown."""
    text = os.fspath(place)
    if not text or SHELL_OPENER.match(text):
        raise ConfigError(f"output {text!r} is no place to write to: name a folder, or a bucket such as s3://…")
    if not is_url(text):
        return LocalOutput(Path(absolute(os.path.expanduser(text.removeprefix("file://")))))
    if text.startswith(("http://", "https://")):
        raise ConfigError(f"output {text} cannot be written over HTTP: name a folder, or a bucket such as s3://…")
    remote.filesystem(text)
    return RemoteOutput(text.rstrip("/"), remote)


def read_all(output: Output, names: Iterable[str | None]) -> Iterator[bytes | None]:
    """Read many small files, in order, a bounded number ahead; None for None."""
    source = iter(names)

    def read(name: str | None) -> bytes | None:
        return None if name is None else output.read(name)

    with ThreadPoolExecutor(READERS) as threads:

        def begin(count: int) -> Iterator[Future[bytes | None]]:
            for name in islice(source, count):
                yield threads.submit(read, name)

        ahead = deque(begin(2 * READERS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(begin(1))


@dataclass(frozen=True)
class LocalOutput:
    """A folder on this machine, or shared by several."""

    folder: Path

    @property
    def place(self) -> str:
        return str(self.folder)

    @property
    def identity(self) -> str:
        return str(self.folder)

    def begin(self) -> None:
        self.prepare("")

    def prepare(self, folder: str) -> None:
        try:
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(
                f"output {self.folder / folder} cannot be made ({err.strerror}): name a folder that can be written"
            ) from err

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file(follow_symlinks=False)}
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        atomic_write(self.folder / name, data)

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        with atomic_file(self.folder / name) as file:
            file.writelines(lines)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def tar(self, name: str, scratch: Path) -> TarShard:
        path = self.folder / name
        for left in path.parent.glob(f".{path.stem}.*{TEMP_SUFFIX}"):  # by a run that was killed at this shard
            left.unlink(missing_ok=True)
        return TarShard(path)

    def publish(self, shard: TarShard, name: str, note: Mapping[str, Any]) -> ShardIndex:
        return shard.close(note)


@dataclass(frozen=True)
class RemoteOutput:
    """A place behind an fsspec URL."""

    url: str
    remote: Remote

    @property
    def place(self) -> str:
        return self.url

    @property
    def identity(self) -> str:
        options = self.remote.storage_options
        server = options.get("endpoint_url") or (options.get("client_kwargs") or {}).get("endpoint_url")
        return f"{self.url} {server or ''}"

    def prepare(self, folder: str) -> None:
        fs, path = self.remote.filesystem(self._url(folder))
        if self._protocol not in _WHOLE_OBJECTS:
            self.remote.call(self.url, lambda: fs.makedirs(path, exist_ok=True))

    def begin(self) -> None:
        self.prepare("")
        # That a bucket does not exist is to be known before a night's work.
        name = f".{os.urandom(8).hex()}{TEMP_SUFFIX}"
        try:
            self.write(name, b"")
            self.remove(name)
        except (FileNotFoundError, StorageError) as err:
            raise ConfigError(
                f"nothing can be written to {self.url} ({err}): check that the bucket exists, its name and your rights"
            ) from err

    def sizes(self, folder: str) -> dict[str, int]:
        url = self._url(folder)
        fs, path = self.remote.filesystem(url)

        def ask() -> dict[str, int]:
            fs.invalidate_cache()
            entries = fs.ls(path, detail=True)
            return {
                os.path.basename(entry["name"]): int(entry.get("size") or 0)
                for entry in entries
                if entry["type"] == "file" and entry["name"].rstrip("/") != path.rstrip("/")
            }

        try:
            return self.remote.call(url, ask)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        return self.remote.read_small(self._url(name), bytes)

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda fs, target: fs.pipe_file(target, data))

    def write_lines(self, name: str, lines: Iterable[bytes]) -> None:
        with tempfile.NamedTemporaryFile(prefix="framestream-") as file:
            file.writelines(lines)
            file.flush()
            self.upload(Path(file.name), name)

    def upload(self, path: Path, name: str) -> None:
        """A local file becomes `name`."""
        self._put(name, lambda fs, target: fs.put_file(str(path), target))

    def download(self, name: str, path: Path) -> bool:
        """`name` becomes the local file `path`; False where it does not exist."""
        url = self._url(name)
        fs, source = self.remote.filesystem(url)
        try:
            self.remote.call(url, lambda: fs.get_file(source, str(path)))
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        return True

    def _put(self, name: str, put: Callable[[Any, str], None]) -> None:
        url = self._url(name)
        fs, target = self.remote.filesystem(url)
        if self._protocol in _WHOLE_OBJECTS:
            self.remote.call(url, lambda: put(fs, target), doing="written")
            return
        parent, _, base = target.rpartition("/")
        temporary = f"{parent}/.{base}.{os.getpid()}-{os.urandom(4).hex()}{TEMP_SUFFIX}"

        def move() -> None:
            put(fs, temporary)
            fs.mv(temporary, target)

        self.remote.call(url, move, doing="written")

    def remove(self, name: str) -> None:
        url = self._url(name)
        fs, path = self.remote.filesystem(url)
        try:
            self.remote.call(url, lambda: fs.rm_file(path))
        except FileNotFoundError:
            return

    def tar(self, name: str, scratch: Path) -> TarShard:
        return TarShard(scratch / os.path.basename(name))

    def publish(self, shard: TarShard, name: str, note: Mapping[str, Any]) -> ShardIndex:
        index = shard.close(note)
        beside = index_path(shard.path)
        try:
            self.upload(shard.path, name)
            self.upload(beside, os.path.join(os.path.dirname(name), beside.name))
        finally:
            shard.path.unlink()
            beside.unlink()
        return index

    @property
    def _protocol(self) -> str:
        return self.url.partition("://")[0]

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url
