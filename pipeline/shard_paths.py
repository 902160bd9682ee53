"""What a `shards` argument means: paths, folders, lists, globs, brace patterns and URLs to single tars."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from .errors import ConfigError, ShardError
from .remote import Remote
from .shard_writer import FOLDER_INDEX, read_folder_index

MAX_EXPANSION = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
SHELL_OPENER = re.compile(r"\s*(pipe|exec|shell|sh|cmd):|\s*\||.*\|\s*$", re.DOTALL)

ShardsArgument = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def is_url(path: str) -> bool:
    """Whether `path` has to be fetched: `s3://…` is, `file:///…` and `/a/b` are not."""
    return "://" in path and _URL.match(path) is not None and not path.startswith(("file://", "local://"))


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{x,y}` -> x, y. Raises ConfigError above a million."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    body = match.group(1)
    if span := _RANGE.fullmatch(body):
        first, last = int(span.group(1)), int(span.group(2))
        if last < first or last - first >= MAX_EXPANSION:
            raise ConfigError(f"{{{body}}} in {pattern!r} counts no range of 1 to {MAX_EXPANSION} shards")
        options: Sequence[str] = [str(i).zfill(len(span.group(1))) for i in range(first, last + 1)]
    elif "," in body:
        options = body.split(",")
    else:
        raise ConfigError(f"{{{body}}} in {pattern!r} is neither a range like {{000..012}} nor a list like {{a,b}}")
    for option in options:
        yield from expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


class Found(NamedTuple):
    """A tar that was named, with its bytes where finding it told them."""

    path: str
    num_bytes: int | None


@dataclass
class Resolved:
    """What a `shards` argument names: tars in order, and the folders that were taken as a whole."""

    tars: list[Found] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


def resolve(shards: ShardsArgument, remote: Remote | None = None) -> Resolved:
    """The tars that `shards` names, in order: a list keeps its order, folders and globs are sorted by name.

    A local tar costs one `stat`, or its share of one walk over its folder; a remote one its share of one listing.

    Raises:
        ConfigError: nothing named, a shell opener, an impossible pattern, or one shard named twice.
        ShardError: a path that does not exist, or a folder or glob without tars.
    """
    if not isinstance(shards, (str, os.PathLike, Iterable)):
        raise ConfigError(
            f"shards is {shards!r}; give a folder, a tar, a list, a glob, a {{000..012}} pattern or a URL"
        )
    items = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    if not items:
        raise ConfigError("no shards were named: give a folder, a tar, a list, a glob, a {000..012} pattern or a URL")
    found = Resolved()
    for item in items:
        if not isinstance(item, (str, os.PathLike)):
            raise ConfigError(f"shards are named by strings or paths, not by {type(item).__name__} ({item!r})")
        text = os.fspath(item)
        if SHELL_OPENER.match(text):
            raise ConfigError(f"{text!r} asks for a shell command; framestream reads files and fsspec URLs only")
        text = text.removeprefix("file://")
        literal = "{" not in text or (not is_url(text) and os.path.exists(text))
        for path in [text] if literal else expand_braces(text):
            if is_url(path):
                _add_remote(path, remote or Remote(), found)
            else:
                _add_local(path, found)
            if len(found.tars) > MAX_EXPANSION:
                raise ConfigError(f"{text!r} names more than {MAX_EXPANSION} shards")
    seen: set[str] = set()
    for path, _ in found.tars:
        if path in seen:
            raise ConfigError(f"shard {path} is named twice: name it once, every epoch reads each shard once")
        seen.add(path)
    return found


def _add_local(text: str, found: Resolved) -> None:
    path = str(Path(text).expanduser())
    try:
        stat = os.stat(path)
    except OSError:
        if not glob.has_magic(text):
            raise ShardError(f"shard {text} does not exist: check the path") from None
        matches = sorted(p for p in glob.glob(os.path.expanduser(text), recursive=True) if os.path.isfile(p))
        if not matches:
            raise ShardError(f"no file matches {text}: check the pattern") from None
        found.tars += [Found(p, os.stat(p).st_size) for p in matches]
        return
    if not S_ISDIR(stat.st_mode):
        found.tars.append(Found(path, stat.st_size))
        return
    with os.scandir(path) as entries:
        tars = sorted(
            Found(entry.path, entry.stat().st_size)
            for entry in entries
            if entry.name.endswith(".tar") and entry.name[0] != "." and entry.is_file()
        )
    if not tars:
        inside = sorted({p.parent.name for p in Path(path).glob("*/*.tar")})
        hint = f"there are shards in {', '.join(inside)}: name one of these folders" if inside else "name another one"
        raise ShardError(f"folder {text} holds no .tar file; {hint}")
    found.tars += tars
    found.folders.add(path)


def _add_remote(url: str, remote: Remote, found: Resolved) -> None:
    if glob.has_magic(url):
        tars = remote.glob(url)
    elif url.endswith(".tar"):
        found.tars.append(Found(url, None))
        return
    else:
        tars = _remote_folder(url.rstrip("/"), remote)
        found.folders.update(path.rpartition("/")[0] for path in tars)
    if not tars:
        raise ShardError(f"{url} holds no .tar file: check the address")
    found.tars += [Found(path, size) for path, size in tars.items()]


def _remote_folder(url: str, remote: Remote) -> dict[str, int | None]:
    """The tars of a remote folder; from its index.json where the server lists no folders, as many web servers do."""
    refused: ShardError | None = None
    try:
        if tars := remote.glob(url + "/*.tar"):
            return tars
    except ShardError as err:
        refused = err
    name = f"{url}/{FOLDER_INDEX}"
    listed = remote.read_small(name, lambda data: read_folder_index(data, name))
    if listed is None and refused is not None:
        raise refused
    return {f"{url}/{tar}": None for tar in sorted(listed or ())}
