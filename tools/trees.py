"""Folders of this machine and of remote storage, listed one at a time."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote

from framestream.pipeline.errors import ShardError
from framestream.pipeline.redaction import shown_url
from framestream.pipeline.remote import Remote

from .urls import denied, join_url

_UNSORTED_BUCKETS = "--x-s3"  # S3 Express One Zone
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "modified")

T = TypeVar("T")


@dataclass(frozen=True)
class Unusable:
    """An input that cannot be used, as its listing already shows: how it is called, and why, in words."""

    source: str
    reason: str


Named = tuple[str, int, str]  # a file in a folder: name, size, version


class Listing(NamedTuple):
    """What is in a folder, by name: files, the names of folders, and what cannot be reached.

    The files are to be taken first and once: they may come page by page, and with them all else.
    """

    files: Iterator[Named]
    folders: list[str]
    unusable: list[Unusable]


class Tree(Protocol):
    """Folders and files somewhere."""

    def listing(self, path: str) -> Listing:
        """What is in a folder. Raises OSError for one that is not there or must not be read, ShardError else."""
        ...

    def join(self, path: str, name: str) -> str: ...

    def label(self, name: str) -> str:
        """A name as people read it."""
        ...

    def true_place(self, path: str) -> str:
        """The folder behind all links on the way to it."""
        ...

    def is_link(self, path: str) -> bool: ...


class LocalTree:
    """Folders of this machine. Sizes and versions are asked for file by file, by those who want them."""

    def listing(self, path: str) -> Listing:
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else files).append(entry.name)
        return Listing(((name, -1, "") for name in sorted(files)), sorted(folders), [])

    def join(self, path: str, name: str) -> str:
        return os.path.join(path, name)

    def label(self, name: str) -> str:
        return readable(name)

    def true_place(self, path: str) -> str:
        return os.path.realpath(path)

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def readable(name: str) -> str:
    """A file name as text that JSON can hold, also where the name is no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class RemoteTree:
    """Folders of remote storage, with all requests tried again where that helps.

    S3 is asked page by page, since a folder there may hold a million objects; fsspec gives all others in one piece.
    """

    def __init__(self, remote: Remote, *, web: bool) -> None:
        self.remote, self.web = remote, web
        self._answered: tuple[str, Callable[[], Any]] | None = None  # the first question that was not refused

    def listing(self, path: str) -> Listing:
        fs, inside = self.remote.filesystem(path)
        found = Listing(iter(()), [], [])
        if hasattr(fs, "call_s3") and (pages := self._pages(fs, path)):
            first = next(pages)
            if not first:
                raise FileNotFoundError(f"{shown_url(path)} is not there")
            return found._replace(files=self._in_order(path, chain([first], pages), inside.strip("/"), found))
        if self.web:
            inside = inside.rstrip("/") + "/"  # that is how web servers call folders

        def ask() -> list[dict[str, Any]]:
            fs.invalidate_cache()
            try:
                return fs.ls(inside, detail=True)
            finally:
                fs.invalidate_cache()  # it would keep all folders, and they are listed once

        files = sorted(self._files(self._asked(path, ask), inside.strip("/"), found))
        return Listing(iter(files), sorted(found.folders), found.unusable)

    def _asked(self, path: str, ask: Callable[[], T]) -> T:
        """The answer. Raises PermissionError for a folder that is refused while others are not, ShardError else."""
        try:
            answer = self.remote.call(path, ask)
        except ShardError as err:
            if not denied(err):
                raise
            if self._answered is not None:
                self.remote.call(*self._answered)  # refused, too, where credentials have expired meanwhile
            raise PermissionError(str(err)) from err
        self._answered = self._answered or (path, ask)
        return answer

    def _pages(self, fs: Any, path: str) -> Iterator[list[dict[str, Any]]] | None:
        """What is in a folder of S3, in the form in which fsspec tells it; None where that is not sorted by name."""
        bucket, folder, _ = fs.split_path(path.rstrip("/"))
        if not bucket or bucket.endswith(_UNSORTED_BUCKETS):
            return None
        settings = {"Bucket": bucket, "Prefix": f"{folder}/" if folder else "", "Delimiter": "/", **fs.req_kw}

        def pages() -> Iterator[list[dict[str, Any]]]:
            more = True
            while more:
                page = self._asked(path, partial(fs.call_s3, "list_objects_v2", **settings))
                objects = [{"name": f"{bucket}/{each['Key']}", **each} for each in page.get("Contents", ())]
                folders = [f"{bucket}/{each['Prefix']}" for each in page.get("CommonPrefixes", ())]
                yield objects + [{"name": name, "type": "directory"} for name in folders]
                more = page.get("IsTruncated", False)
                settings["ContinuationToken"] = page.get("NextContinuationToken")

        return pages()

    def _in_order(
        self, path: str, pages: Iterator[list[dict[str, Any]]], inside: str, found: Listing
    ) -> Iterator[Named]:
        last = ""
        for page in pages:
            for file in self._files(page, inside, found):
                if file[0] < last:
                    name = shown_url(path)
                    raise ShardError(f"{name} is not listed in the order of names, as S3 does: name a manifest instead")
                last = file[0]
                yield file

    def _files(self, entries: Sequence[Mapping[str, Any]], inside: str, found: Listing) -> Iterator[Named]:
        """The files among the entries of the folder `inside`; what else there is goes into `found`."""
        for entry in entries:
            is_folder = entry.get("type") == "directory"
            parent, _, name = str(entry["name"]).removesuffix("/").rpartition("/")
            if self.web and (parent.strip("/") != inside or re.search(r"[?#]", name)):
                continue  # a link on the page that leads elsewhere, or sorts it
            if parent.strip("/") != inside or not name:
                if is_folder:
                    reason = "is a folder without a name, which cannot be listed: rename what is in it"
                    found.unusable.append(Unusable("/", reason))
                continue  # the empty object that stands for the folder itself
            if self.web:
                name = html.unescape(name)  # fsspec takes addresses from pages as they are written there
            if name.startswith("."):
                continue
            if "::" in name:
                found.unusable.append(Unusable(name, "has '::' in its name, which means something else in a URL"))
            elif is_folder:
                found.folders.append(name)
            else:
                yield name, *size_and_version(entry)

    def join(self, path: str, name: str) -> str:
        return join_url(path, name)

    def label(self, name: str) -> str:
        return unquote(name) if self.web else name

    def true_place(self, path: str) -> str:
        return path

    def is_link(self, path: str) -> bool:
        return False


def size_and_version(entry: Mapping[str, Any]) -> tuple[int, str]:
    """Bytes (-1: untold) and version ("": untold) of a file by what fsspec says; a version begins with its kind."""
    size = entry.get("size", entry.get("Size"))
    for name in _VERSIONS:
        if value := entry.get(name):
            kind = name.lower().replace("-", "").replace("_", "")
            text = value.isoformat() if isinstance(value, date) else str(value).removeprefix("W/").strip('"')
            return (-1 if size is None else int(size)), f"{kind} {text}"
    return (-1 if size is None else int(size)), ""


def local_version(facts: os.stat_result) -> str:
    """The version of a local file, of the same form."""
    return f"mtime {facts.st_mtime_ns}"
