"""What `framestream shard` is given: files, folders, globs and manifests, here or in remote storage, to source videos.

Inputs are listed one after the other and none is kept, so there may be any number of them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.protocols import check_protocol
from framestream.pipeline.redaction import shown_url, without_secrets
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import SHELL_OPENER, is_url
from framestream.pipeline.shards import VIDEO_EXTENSIONS

from .folders import File, Folder, matching, walk
from .manifest_row import part_of, path_of, split_of, user_of, word
from .manifests import MANIFESTS, manifest_rows
from .source_file import MAX_TEXT_BYTES, stat_remote
from .trees import LocalTree, RemoteTree, Tree, Unusable, local_version, readable
from .urls import absolute, denied, is_web, local_path, path_in, relative_url, split_pattern, suffix

OTHER_TABLES = (".tsv", ".json", ".xls", ".xlsx", ".arrow", ".feather")  # which people have their captions in
_SLUG_LENGTH = 60


@dataclass(frozen=True)
class Source:
    """One video to be sharded: a file, or the part of it that a manifest's row names.

    Attributes:
        path: where it is: a local path or an fsspec URL.
        source: how reports and metadata call it: the path below the folder that was given, or as the manifest says.
        key: of ASCII letters, digits, `_` and `-`; other sources may ask for the same one.
        text: what is said about it; None where nothing is, or `text_file` says it.
        text_file: URL of a file with the text, or path of one that cannot be read; None without.
        split: what the manifest says, else "".
        start, end: seconds; None for the file's own.
        user: the manifest's other columns, as JSON can hold them.
        size: bytes as the listing says; -1 where it does not say.
        version: modification time or entity tag as the listing says, with its kind; "" where it does not say.
        sha256: of all its bytes, in hexadecimal, once that was found out; "" before.
    """

    path: str
    source: str
    key: str
    text: str | None = None
    text_file: str | None = None
    split: str = ""
    start: float | None = None
    end: float | None = None
    user: Mapping[str, Any] = field(default_factory=dict, compare=False)  # dicts have no hash
    size: int = -1
    version: str = ""
    sha256: str = ""


def list_inputs(
    inputs: Sequence[str], *, remote: Remote | None = None, other_files: Counter[str] | None = None
) -> Iterator[Source | Unusable]:
    """Look all inputs up, in the order given; folders recursively and sorted.

    An input is a video, a folder, a glob (`**` for any number of folders) or a manifest (csv, jsonl, ndjson, parquet),
    as a path or as an fsspec URL. Manifest rows name videos by URL, by absolute path, or by a path relative to the
    manifest. What is named twice comes twice.

    Args:
        remote: how to talk to remote storage.
        other_files: counts the files that were passed over because they are no videos, by extension.
    Raises:
        ConfigError: there is no input, one does not exist, or a manifest cannot be read.
        ShardError: remote storage does not answer, or refuses an input.
    """
    if not inputs:
        raise ConfigError("no input was named: give video files, folders, globs or manifests (csv, jsonl, parquet)")
    lister = _Lister(remote or Remote(), Counter() if other_files is None else other_files)
    for text in map(os.fspath, inputs):
        if SHELL_OPENER.match(text):
            raise ConfigError(
                f"{shown_url(text)!r} asks for a shell command; framestream reads files and fsspec URLs only"
            )
        yield from lister.remote_input(text) if is_url(text) else lister.local_input(text)


def by_extension(other_files: Mapping[str, int]) -> str:
    """Files that are no videos, in words."""
    return ", ".join(f"{n} {ext or 'without extension'}" for ext, n in sorted(other_files.items()))


def nothing_found(inputs: Sequence[str], other_files: Mapping[str, int]) -> str:
    """The sentence for inputs without a single video."""
    others = by_extension(other_files)
    return (
        f"there is no video in {', '.join(shown_url(os.fspath(each)) for each in inputs)}"
        + (f" (only other files: {others})" if others else "")
        + f"; videos end in {_extensions()}"
    )


class _Lister:
    def __init__(self, remote: Remote, other_files: Counter[str]) -> None:
        self.remote, self.other_files = remote, other_files
        self.protocols: set[str] = set()  # of URLs in manifests, those that were found to be usable

    def local_input(self, text: str) -> Iterator[Source | Unusable]:
        path = absolute(os.path.expanduser(local_path(text)))  # for workers and runs in other folders
        if os.path.isdir(path):
            yield from self._folder(LocalTree(), path)
        elif suffix(path) in MANIFESTS and os.path.isfile(path):
            yield from self._manifest(path)
        elif os.path.lexists(path):
            yield self._named(path)
        else:
            parts = path.split(os.sep)
            fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
            base = os.sep.join(parts[:fixed]) or (os.sep if fixed else os.curdir)
            yield from self._matches(text, LocalTree(), base, parts[fixed:])

    def remote_input(self, url: str) -> Iterator[Source | Unusable]:
        check_protocol(url)  # raises ConfigError for what fsspec does not know, without connecting
        tree = RemoteTree(self.remote, web=is_web(url))
        base, pattern = split_pattern(url)
        if pattern:
            yield from self._matches(url, tree, base, pattern)
        elif suffix(url) in MANIFESTS:
            yield from self._manifest(url)
        elif suffix(url)[1:] in VIDEO_EXTENSIONS and (source := self._named_url(url)):
            yield source
        else:
            yield from self._folder(tree, url)

    def _folder(self, tree: Tree, path: str) -> Iterator[Source | Unusable]:
        try:
            yield from self._videos(walk(tree, Folder(path)))
        except FileNotFoundError as err:
            raise _missing(path) from err
        except OSError as err:
            raise ConfigError(
                f"input {shown_url(path)} cannot be listed ({err.strerror or err}): check access rights"
            ) from err

    def _matches(self, text: str, tree: Tree, base: str, pattern: Sequence[str]) -> Iterator[Source | Unusable]:
        files = matching(tree, Folder(base), [part for part in pattern if part]) if pattern else iter(())
        try:
            first = next(files, None)
        except OSError as err:
            raise ConfigError(f"input {shown_url(text)} cannot be listed ({err.strerror or err})") from err
        if first is None:
            raise _missing(text)
        yield from self._videos(chain([first], files))

    def _videos(self, files: Iterator[File | Unusable]) -> Iterator[Source | Unusable]:
        for file in files:
            if isinstance(file, Unusable):
                yield file
            elif suffix(file.path)[1:] not in VIDEO_EXTENSIONS:
                self.other_files[readable(suffix(file.path))] += 1
            else:
                key = slug(os.path.splitext(file.relative)[0])
                source = Source(
                    file.path, file.relative, key, text_file=file.text_file, size=file.size, version=file.version
                )
                yield source if is_url(file.path) else _with_facts(source)

    def _named(self, path: str) -> Source | Unusable:
        name = readable(os.path.basename(path))
        ext = suffix(path)
        if ext in OTHER_TABLES:
            raise ConfigError(f"input {name} is no manifest that can be read: make it CSV, JSONL or Parquet")
        if ext[1:] not in VIDEO_EXTENSIONS:
            return Unusable(name, f"{ext or 'no extension'} is none of {_extensions()}")
        return _with_facts(Source(path, name, slug(os.path.splitext(name)[0]), text_file=_sidecar(path)))

    def _named_url(self, url: str) -> Source | None:
        """A remote video that was named itself, None where there is no such file, though there may be a folder."""
        try:
            size, version = stat_remote(url, self.remote)
        except FileNotFoundError:
            return None
        name = posixpath.basename(path_in(url))
        return Source(
            url, name, slug(os.path.splitext(name)[0]), text_file=self._text_beside(url), size=size, version=version
        )

    def _text_beside(self, url: str) -> str | None:
        if is_web(url) and "?" in url:
            return None  # signed: another file would need another signature
        head, sep, rest = url.partition("::")
        text = os.path.splitext(head)[0] + ".txt" + sep + rest
        try:
            stat_remote(text, self.remote)
        except FileNotFoundError:
            return None
        except ShardError as err:
            if denied(err):  # as S3 says of what is not there to those who must not list
                return None
            raise
        return text

    def _manifest(self, path: str) -> Iterator[Source | Unusable]:
        name = posixpath.basename(path_in(path)) if is_url(path) else os.path.basename(path)
        for number, row in manifest_rows(path, suffix(path), self.remote):
            where = f"{readable(name)} row {number}"
            if isinstance(row, str):
                yield Unusable(where, without_secrets(row))
                continue
            try:
                source = self._of_row(path, row)
            except ValueError as err:
                yield Unusable(where, without_secrets(str(err), str(row.get("path"))))
                continue
            yield source if is_url(source.path) else _with_facts(source)

    def _of_row(self, manifest: str, row: Mapping[str, Any]) -> Source:
        """One row of a manifest. Raises ValueError, in words, when it cannot be used."""
        name = path_of(row)
        ext = suffix(name)[1:]
        if ext not in VIDEO_EXTENSIONS:
            raise ValueError(f"{name}: {ext or 'no extension'} is none of {', '.join(VIDEO_EXTENSIONS)}")
        split, (start, end) = split_of(row), part_of(row)
        path = self._place(manifest, name)
        text = word(row, "text") or None
        shown = path_in(name) if is_url(name) else name
        key = word(row, "key") or os.path.splitext(shown)[0].lstrip("/.")
        beside = None if text is not None or is_url(path) else _sidecar(path)
        return Source(path, readable(shown_url(name)), slug(key), text, beside, split, start, end, user_of(row))

    def _place(self, manifest: str, name: str) -> str:
        """Where a row's video is. Raises ValueError for a URL that cannot be used."""
        if not is_url(name):
            path = os.path.expanduser(local_path(name))
            if not is_url(manifest) or os.path.isabs(path):
                return os.path.join(os.path.dirname(manifest), path)
            return relative_url(manifest, path)
        protocol = "::".join(part.partition("://")[0] for part in name.split("::"))
        if protocol not in self.protocols:
            try:
                check_protocol(name)  # without connecting, as some kinds do when they are made
            except ConfigError as err:
                if isinstance(err.__cause__, (ImportError, TypeError)):  # true of all rows: to be mended first
                    raise
                raise ValueError(str(err)) from None
            self.protocols.add(protocol)
        return name


def _with_facts(source: Source) -> Source | Unusable:
    """A local source with its size, version and text: a text that changes later is then noticed as the video is."""
    try:
        facts = os.stat(source.path)
        if not os.path.isfile(source.path):
            raise OSError("it is no regular file")
    except (OSError, ValueError) as err:
        return Unusable(source.source, f"cannot be read ({getattr(err, 'strerror', None) or err})")
    source = replace(source, size=facts.st_size, version=local_version(facts))
    with suppress(OSError, UnicodeDecodeError):  # what cannot be read is said when the source is probed
        if source.text_file is not None and _is_text(source.text_file):
            text = Path(source.text_file).read_text("utf-8-sig").strip()
            source = replace(source, text=text, text_file=None)
    return source


def _is_text(path: str) -> bool:
    """Whether a file can be read as a text: a pipe would wait for its other end, and a device never ends."""
    return os.path.isfile(path) and os.path.getsize(path) <= MAX_TEXT_BYTES


def _sidecar(path: str) -> str | None:
    """The text file beside a local video, None where there is none."""
    text = os.path.splitext(path)[0] + ".txt"
    return text if os.path.isfile(text) else None


def _missing(text: str) -> ConfigError:
    return ConfigError(f"input {shown_url(text)} does not exist, or there is nothing in it: check the path")


def _extensions() -> str:
    return " ".join("." + ext for ext in VIDEO_EXTENSIONS)


def slug(name: str) -> str:
    """A key made of a relative path: ASCII letters, digits, `_`, `-`; a short hash where that lost something."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", unicodedata.normalize("NFKD", name)).strip("_")
    if plain and name.isascii() and len(plain) <= _SLUG_LENGTH:
        return plain
    return f"{plain[:_SLUG_LENGTH]}-{_short_hash(name)}".lstrip("-_")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
