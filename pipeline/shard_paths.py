"""What a `shards` argument means: paths, folders, lists, globs, brace patterns and URLs to single tars."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, ShardError

MAX_EXPANSION = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
_REFUSED = re.compile(r"\s*(pipe|exec|shell|sh|cmd):|\s*\||.*\|\s*$", re.DOTALL)

ShardsArgument = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def is_url(path: str) -> bool:
    """Whether `path` has to be fetched: `s3://…` is, `file:///…` and `/a/b` are not."""
    return _URL.match(path) is not None and not path.startswith(("file://", "local://"))


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


def filesystem(url: str, storage_options: Mapping[str, Any] | None) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it. Raises ConfigError for an unknown or missing one."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **dict(storage_options or {}))
    except (ValueError, ImportError, TypeError) as err:
        raise ConfigError(f"{url} cannot be opened by fsspec ({err}): check protocol and options") from err


def resolve(shards: ShardsArgument, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """The tars that `shards` names, in order: a list keeps its order, folders and globs are sorted by name.

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
    found: list[str] = []
    for item in items:
        if not isinstance(item, (str, os.PathLike)):
            raise ConfigError(f"shards are named by strings or paths, not by {type(item).__name__} ({item!r})")
        text = os.fspath(item)
        if _REFUSED.match(text):
            raise ConfigError(f"{text!r} asks for a shell command; framestream reads files and fsspec URLs only")
        text = text.removeprefix("file://") if text.startswith("file://") else text
        literal = not is_url(text) and os.path.exists(text)
        for path in [text] if literal else expand_braces(text):
            found += _remote(path, storage_options) if is_url(path) else _local(path)
            if len(found) > MAX_EXPANSION:
                raise ConfigError(f"{text!r} names more than {MAX_EXPANSION} shards")
    seen: set[str] = set()
    for path in found:
        if path in seen:
            raise ConfigError(f"shard {path} is named twice: name it once, every epoch reads each shard once")
        seen.add(path)
    return found


def _local(text: str) -> list[str]:
    path = Path(text).expanduser()
    if path.is_dir():
        tars = sorted(str(p) for p in path.glob("*.tar") if p.is_file() and not p.name.startswith("."))
        if tars:
            return tars
        inside = sorted({p.parent.name for p in path.glob("*/*.tar")})
        hint = f"there are shards in {', '.join(inside)}: name one of these folders" if inside else "name another one"
        raise ShardError(f"folder {text} holds no .tar file; {hint}")
    if path.exists():
        return [str(path)]
    if glob.has_magic(text):
        tars = sorted(p for p in glob.glob(os.path.expanduser(text), recursive=True) if os.path.isfile(p))
        if tars:
            return tars
        raise ShardError(f"no file matches {text}: check the pattern")
    raise ShardError(f"shard {text} does not exist: check the path")


def _remote(url: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    fs, path = filesystem(url, storage_options)
    pattern = path if glob.has_magic(path) else path.rstrip("/") + "/*.tar"
    try:
        tars = sorted(fs.unstrip_protocol(p) for p in fs.glob(pattern))
    except Exception as err:  # each fsspec backend raises its own kinds
        raise ShardError(f"{url} cannot be listed ({type(err).__name__}: {err}): check the address and access") from err
    if not tars:
        raise ShardError(f"{url} holds no .tar file: check the address")
    return tars
