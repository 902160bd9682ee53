"""The files below a folder, or those that match a pattern, on this machine or in remote storage.

One folder is listed at a time, and only its names are held. The order is that of the names: first the files of a
folder, then what is below each of its folders, so it is the same on every machine and storage. Names that begin with a
dot are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

from .trees import Listing, Tree, Unusable

MAX_DEPTH = 100  # of folders in each other: web servers follow links in a circle for ever


class File(NamedTuple):
    """A file as its listing has it; see `framestream.tools.inputs.Source` for the fields."""

    path: str
    relative: str
    size: int
    version: str
    text_file: str | None


class Folder(NamedTuple):
    """A folder: where it is, and what it is called below the input that led to it."""

    path: str
    relative: str = ""


def walk(tree: Tree, root: Folder) -> Iterator[File | Unusable]:
    """All files below a folder. Links to folders are followed once, and not into what is walked anyway.

    Raises:
        OSError: the folder itself cannot be listed.
        ShardError: remote storage does not answer.
    """
    for folder, listing in _descend(tree, root):
        if isinstance(listing, Unusable):
            yield listing
        else:
            yield from _files(tree, folder, listing)


def matching(tree: Tree, root: Folder, pattern: Sequence[str]) -> Iterator[File | Unusable]:
    """The files below `root` that match `pattern`, one part per level, and all below folders that match.

    `**` stands for any number of levels. What is not there is passed over.

    Raises:
        OSError: the folder that the input begins with cannot be listed.
        ShardError: remote storage does not answer.
    """
    try:
        if pattern[0] != "**":
            yield from _match(tree, root, tree.listing(root.path), pattern)
        elif set(pattern) == {"**"}:
            yield from walk(tree, root)
        else:
            yield from _anywhere(tree, root, pattern[1:])
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as err:
        if not root.relative:
            raise
        yield Unusable(root.relative, str(err.strerror or err))


def _anywhere(tree: Tree, root: Folder, pattern: Sequence[str]) -> Iterator[File | Unusable]:
    """What matches in `root` or in any folder below it."""
    taken: list[str] = []  # folders that match the last part: all that is in them is found at once
    for folder, listing in _descend(tree, root, taken):
        if isinstance(listing, Unusable):
            yield listing
            continue
        yield from _match(tree, folder, listing, pattern)
        if len(pattern) == 1:
            taken[:] = [name for name in listing.folders if fnmatchcase(name, pattern[0])]


def _match(tree: Tree, folder: Folder, listing: Listing, pattern: Sequence[str]) -> Iterator[File | Unusable]:
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        yield from matching(tree, folder, pattern)
        return
    for file in _files(tree, folder, listing, first):
        if not rest or isinstance(file, Unusable):
            yield file
    for name in listing.folders:
        if fnmatchcase(name, first):
            child = _child(tree, folder, name)
            yield from matching(tree, child, rest or ["**"])


def _files(tree: Tree, folder: Folder, listing: Listing, pattern: str = "*") -> Iterator[File | Unusable]:
    """The files in a folder that match, with the text files beside them, and what cannot be reached there."""
    for _, group in groupby(listing.files, key=lambda file: file[0].partition(".")[0]):
        alike = list(group)  # a text has the name of its file up to the first dot, so the two come together
        texts = {name for name, *_ in alike if name.endswith(".txt")}
        for name, size, version in alike:
            if fnmatchcase(name, pattern):
                text = os.path.splitext(name)[0] + ".txt"
                text_file = tree.join(folder.path, text) if text in texts and text != name else None
                yield File(tree.join(folder.path, name), _below(folder, tree.label(name)), size, version, text_file)
    for unusable in listing.unusable:
        yield replace(unusable, source=_below(folder, unusable.source))


def _child(tree: Tree, folder: Folder, name: str) -> Folder:
    return Folder(tree.join(folder.path, name), _below(folder, tree.label(name)))


def _below(folder: Folder, name: str) -> str:
    return f"{folder.relative}/{name}" if folder.relative else name


def _descend(tree: Tree, root: Folder, taken: Sequence[str] = ()) -> Iterator[tuple[Folder, Listing | Unusable]]:
    """A folder and all below it, each with its listing or why there is none; not into those that are `taken` then.

    The files of a listing have to be taken before the next one is asked for.
    """
    real = tree.true_place(root.path)
    followed = {real}  # what links have led to: folders of which all is walked
    pending: list[Iterator[tuple[Folder, str]]] = [iter([(root, real)])]
    while pending:
        folder, real = next(pending[-1], (None, ""))
        if folder is None:
            pending.pop()
            continue
        if len(pending) > MAX_DEPTH:
            yield folder, Unusable(folder.relative, f"lies in more than {MAX_DEPTH} folders, which are not entered")
            continue
        try:
            listing = tree.listing(folder.path)
        except OSError as err:
            if folder is root:
                raise
            yield folder, Unusable(folder.relative, str(err.strerror or err))
            continue
        yield folder, listing
        names = [name for name in listing.folders if name not in taken]
        pending.append(_children(tree, folder, real, names, followed))


def _children(
    tree: Tree, folder: Folder, real: str, names: Sequence[str], followed: set[str]
) -> Iterator[tuple[Folder, str]]:
    """The folders in a folder that are to be entered, with their true places."""
    for name in names:
        child = _child(tree, folder, name)
        if tree.is_link(child.path):
            place = tree.true_place(child.path)
            if not _is_walked(place, followed):
                followed.add(place)
                yield child, place
        elif (place := tree.join(real, name)) not in followed:
            yield child, place


def _is_walked(place: str, followed: set[str]) -> bool:
    """Whether a folder is met anyway: it is, or lies in, one that is walked, and no part between is hidden."""
    while place not in followed:
        place, name = os.path.split(place)
        if name.startswith(".") or not name:
            return False
    return True
