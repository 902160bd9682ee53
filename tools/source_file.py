"""The bytes of a source, local or remote, without more of it in memory than is looked at.

Small files are read as they are. Large ones are mapped: a copy in memory would be of an hour of video. Remote ones are
downloaded to a temporary file without a name, which ends with its last user, and the last one is kept, because the
clips of one source are made one after the other.
"""

from __future__ import annotations

import mmap
import os
import stat
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from framestream.pipeline.download import download
from framestream.pipeline.errors import ConfigError, FramestreamError, SampleError, ShardError, StorageError
from framestream.pipeline.redaction import shown_url, without_secrets
from framestream.pipeline.remote import Remote, disk_full
from framestream.pipeline.shard_paths import is_url

from .remote_text import read_at_most
from .trees import local_version, size_and_version

if TYPE_CHECKING:
    from .inputs import Source

MAX_TEXT_BYTES = 1 << 20  # of a file beside a video
IN_MEMORY = 64 << 20  # bytes of a file up to which it is read rather than mapped
_DESCRIPTORS = "/proc/self/fd"


@dataclass(frozen=True)
class SourceFile:
    """An open source.

    Attributes:
        data: all of it; of a large file a view of its map, of which only what is looked at takes memory. It may be
            used for longer than the block.
        size: bytes.
        path: by which it can be opened again, for as long as this object lives, with a position of its own.
    """

    data: bytes | memoryview
    size: int
    path: str
    owner: object = field(default=None, repr=False)  # of a temporary file, which ends with it


@contextmanager
def opened(source: Source, remote: Remote) -> Iterator[SourceFile]:
    """Open a source for the length of the block.

    A local file that is cut short while it is mapped ends the process, as it does for all who map files; one that
    changes in any other way is found out, at the latest at the end of the block.

    Raises:
        SampleError: it is not there, cannot be read, or is not the file that was listed; also at the end of the block.
        ConfigError: there is no room for it among the temporary files, or the package for its storage is not installed.
    """
    if is_url(source.path):
        yield _remote_file(source, remote)
        return
    try:
        file, before = open_regular(source.path)
    except (OSError, ValueError) as err:
        raise unreadable(source, err) from err
    with file:
        check_listed(source, before.st_size, local_version(before))
        try:
            data = _contents(file, before.st_size)
        except (OSError, ValueError) as err:
            raise unreadable(source, err) from err
        yield SourceFile(data, before.st_size, source.path)
        try:
            after = os.stat(source.path)
        except OSError as err:
            raise unreadable(source, err) from err
        if _identity(before) != _identity(after):
            raise SampleError(f"{source.source} was written to while it was read: it was changed")


def read_text(source: Source, remote: Remote) -> str | None:
    """What is said about a source: its text, or what its text file holds (UTF-8); None where neither is given.

    Raises:
        SampleError: the text file cannot be read.
    """
    if source.text is not None or source.text_file is None:
        return source.text
    try:
        if is_url(source.text_file):
            data = read_at_most(source.text_file, remote, MAX_TEXT_BYTES)
        else:
            regular = os.path.isfile(source.text_file) or not os.path.exists(source.text_file)
            if not regular:
                raise ValueError("it is no regular file")
            if os.stat(source.text_file).st_size > MAX_TEXT_BYTES:
                raise ValueError(f"it has more than {MAX_TEXT_BYTES} bytes")
            data = Path(source.text_file).read_bytes()
        return data.decode("utf-8-sig").strip()
    except (ConfigError, StorageError):
        raise
    except (OSError, ValueError, FramestreamError) as err:
        name = os.path.basename(source.text_file)
        why = without_secrets(_words(err), source.text_file)
        raise SampleError(f"{source.source}: its text {shown_url(name)} cannot be read ({why})") from err


@contextmanager
def fetched(url: str, remote: Remote) -> Iterator[str]:
    """The path of a remote file that is downloaded for the length of the block.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: remote storage does not answer.
        ConfigError: there is no room for it among the temporary files.
    """
    with closing(_Downloaded(url, remote, stat_remote(url, remote)[0])) as file:
        yield file.path


def stat_remote(url: str, remote: Remote) -> tuple[int, str]:
    """Bytes and version of a remote file, as `size_and_version` gives them.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ShardError: remote storage does not answer.
    """
    fs, path = remote.filesystem(url)

    def ask() -> dict[str, Any]:
        fs.invalidate_cache()  # a listing from before may speak of an older version
        return fs.info(path)

    info = remote.call(url, ask)
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{shown_url(url)} is a folder")
    return size_and_version(info)


@dataclass(frozen=True)
class _Kept:
    path: str
    size: int
    version: str
    remote: Remote
    file: SourceFile


_kept: _Kept | None = None  # the last remote source of this process


def _remote_file(source: Source, remote: Remote) -> SourceFile:
    global _kept
    kept = _kept
    if kept is not None and (kept.path, kept.size, kept.version, kept.remote) == (
        source.path, source.size, source.version, remote,
    ):  # fmt: skip
        return kept.file
    kept = _kept = None  # its room may be needed
    try:
        try:
            size, version = stat_remote(source.path, remote)
        except ConfigError as err:  # one bad address is no reason to end the run, a package that lacks is one
            if isinstance(err.__cause__, ImportError):
                raise
            raise SampleError(f"{source.source} cannot be read ({err})") from err
        check_listed(source, size, version)
        downloaded = _Downloaded(source.path, remote, size)
        check_listed(source, downloaded.size, "")
        with open(downloaded.path, "rb", buffering=0) as reader:
            file = SourceFile(_contents(reader, downloaded.size), downloaded.size, downloaded.path, downloaded)
    except FileNotFoundError as err:
        raise SampleError(f"{source.source} does not exist: it was removed, or its address is wrong") from err
    except (OSError, ValueError, ShardError) as err:
        if isinstance(err, (ConfigError, StorageError)):  # nothing is wrong with this source
            raise
        raise unreadable(source, err) from err
    _kept = _Kept(source.path, source.size, source.version, remote, file)
    return file


class _Downloaded:
    """A remote file in a temporary file, which ends when this is closed or forgotten.

    Args:
        size: bytes, -1 where that is not known.
    Raises: as `fetched` does.
    """

    def __init__(self, url: str, remote: Remote, size: int) -> None:
        file, self.path = _temporary()
        self.close = weakref.finalize(self, file.close)
        try:
            self.size = download(remote, url, Path(self.path), size if size >= 0 else None, None)
        except OSError as err:
            if not disk_full(err):
                raise
            raise ConfigError(
                f"{tempfile.gettempdir()} has no room for {shown_url(url)} ({size if size >= 0 else 'unknown'} bytes) "
                "while it is read: free some, or name another folder for temporary files with TMPDIR, and run again to "
                "go on"
            ) from err


def _temporary() -> tuple[IO[bytes], str]:
    """A file that ends when it is closed, and a path by which it can be opened."""
    try:
        if os.path.isdir(_DESCRIPTORS):
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            return file, f"{_DESCRIPTORS}/{file.fileno()}"
        named = tempfile.NamedTemporaryFile(prefix="framestream-", buffering=0)  # noqa: SIM115
        return named, named.name
    except OSError as err:
        raise ConfigError(f"no temporary file can be made ({err}): name a folder for them with TMPDIR") from err


def open_regular(path: str) -> tuple[FileIO, os.stat_result]:
    """A file, which the caller closes, and what it was when it was opened. Raises OSError, or ValueError where it is no
    regular file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a pipe would wait for its other end
        raise ValueError("it is no regular file")
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    return file, os.fstat(file.fileno())


def _contents(file: FileIO, size: int) -> bytes | memoryview:
    if size > IN_MEMORY:
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    data = file.read(size + 1) if size else b""
    while len(data) < size:  # one call may bring less
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    if len(data) != size:
        raise ValueError("its length changed while it was read: it was changed")
    return data


def check_listed(source: Source, size: int, version: str) -> None:
    """Compare with the listing, where both say something. Versions of two kinds say nothing about each other.

    Raises:
        SampleError: it is another file.
    """
    if source.size >= 0 and size >= 0 and size != source.size:
        raise SampleError(f"{source.source} has {size} bytes, it had {source.size} at the start: it was changed")
    if source.version != version and source.version.partition(" ")[0] == version.partition(" ")[0]:
        raise SampleError(f"{source.source} is of another version than at the start: it was changed")


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def unreadable(source: Source, err: Exception) -> SampleError:
    """That a source cannot be read, and why."""
    return SampleError(f"{source.source} cannot be read ({without_secrets(_words(err), source.path)})")


def _words(err: Exception) -> str:
    return str(getattr(err, "strerror", None) or err)
