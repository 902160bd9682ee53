"""Addresses of inputs: what is the path in them, and what is beside it."""

from __future__ import annotations

import os
import posixpath
import re
from urllib.parse import quote, unquote

from framestream.pipeline.redaction import shown_url
from framestream.pipeline.shard_paths import is_url


def is_web(url: str) -> bool:
    """Whether a URL is one of a web server, in which `?` begins a query and names are quoted."""
    return url.startswith(("http://", "https://"))


def local_path(text: str) -> str:
    """A local path without the `file://` that may stand before it."""
    return text.removeprefix("file://").removeprefix("local://")


def absolute(path: str) -> str:
    """A local path from the root on. As for the system, `..` leads out of the folder behind which it stands, also where
    that is a link to a folder elsewhere."""
    path = os.path.join(os.getcwd(), path)
    at = path.rfind("/..")
    while at >= 0 and path[at + 3 : at + 4] not in ("", "/"):  # a name that begins with two dots
        at = path.rfind("/..", 0, at)
    return os.path.abspath(path if at < 0 else os.path.realpath(path[: at + 3]) + path[at + 3 :])


def join_url(url: str, name: str) -> str:
    """The URL of something in the folder `url`; of a chain (`zip://a::s3://b/c.zip`) the first link is the path."""
    head, sep, rest = url.partition("::")
    return f"{head if head.endswith('://') else head.rstrip('/') + '/'}{name}{sep}{rest}"


def relative_url(url: str, path: str) -> str:
    """The URL of what `path` is in the folder of `url`. Raises ValueError, in words, where it leads out of its host."""
    if "::" in path:
        raise ValueError(f"{path} has '::' in it, which means something else in a URL: name it by its whole URL")
    head, sep, rest = _without_query(url).partition("::")
    protocol, _, place = head.partition("://")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(place), quote_web(path) if is_web(url) else path))
    host = place.partition("/")[0] if "/" in place and not sep else ""
    if found.startswith("..") or (host and found.partition("/")[0] != host):
        raise ValueError(f"{path} leads out of {protocol}://{host.rpartition('@')[2]}")
    return f"{protocol}://{found}{sep}{rest}"


def quote_web(path: str) -> str:
    """A path as it stands in a web address; what is quoted already stays as it is."""
    return quote(path, safe="/%~!$&'()*+,;=:@")


def path_in(url: str) -> str:
    """The path in a URL, below the host or bucket, as people read it."""
    links = shown_url(url).split("::")
    path = next(link for link in links if "://" in link).partition("://")[2]
    if len(links) == 1:
        path = path.partition("/")[2] or path
    return unquote(path) if is_web(url) else path


def suffix(path: str) -> str:
    """The extension of a local path or URL, in lower case, with its dot."""
    return os.path.splitext(path_in(path) if is_url(path) else path)[1].lower()


def _without_query(url: str) -> str:
    if is_web(url):
        return re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"\?versionId=[^:]*", "", url)


def split_pattern(url: str) -> tuple[str, list[str]]:
    """The folder in which a pattern begins, and the pattern's parts, one per level; none where it is no pattern."""
    head, sep, rest = _without_query(url).partition("::")
    parts = head.split("/")
    magic = "*[" if is_web(url) else "*?["
    fixed = next((number for number, part in enumerate(parts) if number > 1 and set(part) & set(magic)), None)
    if fixed is None:
        return url, []
    base = "/".join(parts[:fixed])
    return f"{base + '/' if fixed == 2 else base}{sep}{rest}", [part for part in parts[fixed:] if part]


def denied(err: BaseException) -> bool:
    """Whether remote storage refused what was asked of it, rather than not answering."""
    return isinstance(err.__cause__, PermissionError) or getattr(err.__cause__, "status", None) in (401, 403)
