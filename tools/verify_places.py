"""Where the shards are that are to be verified: folders, on a disk or in remote storage, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from framestream.pipeline.errors import ShardError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shard_writer import FOLDER_INDEX, read_folder_index

from .set_files import REPORT_FILE
from .verify_shard import ShardCheck

P = TypeVar("P")


@dataclass(frozen=True)
class Place:
    """One folder of shards. `path` is local or a URL; `name` is "" for the folder that was named, else its own.

    `shards` has the names of the tars, sorted, and their bytes where a remote listing told them.
    """

    path: str
    name: str
    shards: dict[str, int | None]
    remote: Remote = field(repr=False)

    def said(self, problem: str) -> str:
        """A sentence about this place, as it stands in a report about several."""
        return f"{self.name}: {problem}" if self.name else problem

    def read(self, name: str, parse: Callable[[bytes], P]) -> P | None:
        """A small file of this folder; None where there is none. Raises ShardError as `parse` does."""
        if is_url(self.path):
            return self.remote.read_small(f"{self.path}/{name}", parse)
        try:
            return parse(Path(self.path, name).read_bytes())
        except FileNotFoundError:
            return None

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file of this folder; {} where there is none or it holds no object.

        Raises:
            ShardError: it is damaged.
        """

        def parse(data: bytes) -> dict[str, Any]:
            try:
                content = json.loads(data)
            except (ValueError, RecursionError) as err:
                raise ShardError(f"{name} is damaged ({err})") from err
            return content if isinstance(content, dict) else {}

        return self.read(name, parse) or {}

    def folder_index(self) -> dict[str, dict[str, Any]] | None:
        """What `index.json` says. Raises ShardError where it is damaged."""
        return self.read(FOLDER_INDEX, lambda data: read_folder_index(data, FOLDER_INDEX))


def find_places(root: str, remote: Remote) -> list[Place]:
    """The folders with shards: `root` and those in it.

    Raises:
        ShardError: `root` does not exist, is a file, cannot be listed, or holds no tar.
    """
    places = _remote_places(root, remote) if is_url(root) else _local_places(Path(root), remote)
    if not places:
        raise ShardError(f"folder {root} holds no .tar file, and no folder in it does")
    return places


def _local_places(root: Path, remote: Remote) -> list[Place]:
    if root.is_file():
        raise ShardError(f"{root} is a file: give the folder that holds it")
    if not root.is_dir():
        raise ShardError(f"folder {root} does not exist: check the path")
    places = []
    for folder in [root, *sorted(p for p in root.iterdir() if p.is_dir())]:
        tars = sorted(p.name for p in folder.glob("*.tar") if p.is_file() and not p.name.startswith("."))
        # A folder with an index counts too: all its tars are gone, or it never had any.
        if tars or (folder / FOLDER_INDEX).is_file():
            name = "" if folder == root else folder.name
            places.append(Place(str(folder), name, dict.fromkeys(tars), remote))
    return places


def _remote_places(root: str, remote: Remote) -> list[Place]:
    refused: ShardError | None = None
    try:
        here, inside = remote.glob(f"{root}/*.tar"), remote.glob(f"{root}/*/*.tar")
    except ShardError as err:  # many web servers list no folders, but our own files say what there is
        here, inside, refused = {}, {}, err
    folders: dict[tuple[str, str], dict[str, int | None]] = {}
    for url, size in here.items():
        folder, _, tar = url.rpartition("/")
        folders.setdefault((folder, ""), {})[tar] = size
    for url, size in inside.items():
        folder, _, tar = url.rpartition("/")
        folders.setdefault((folder, folder.rpartition("/")[2]), {})[tar] = size
    places = [Place(folder, name, tars, remote) for (folder, name), tars in folders.items()]
    places = places or _places_by_index(root, remote)
    if refused is not None and not places:
        raise refused
    return places


def _places_by_index(root: str, remote: Remote) -> list[Place]:
    """What the `index.json` of `root` names, or those of the splits that its `report.json` names."""
    here = Place(root, "", {}, remote)
    names = [""] if here.folder_index() is not None else sorted(part(here.json(REPORT_FILE), "splits"))
    places = [Place(f"{root}/{name}".rstrip("/"), name, {}, remote) for name in names]
    return [
        Place(place.path, place.name, dict.fromkeys(sorted(place.folder_index() or {})), remote) for place in places
    ]


def part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside of an object; {} where it is missing or something else."""
    inside = content.get(name)
    return inside if isinstance(inside, dict) else {}


def stray_files(place: Place) -> list[str]:
    """Files of a local folder that belong to no shard."""
    if is_url(place.path):
        return []
    folder = Path(place.path)
    problems = [f"{path.name} was left by a killed run." for path in sorted(folder.glob(".*.tmp"))]
    for path in sorted(folder.glob("*.idx.json")):
        if not path.with_name(path.name.removesuffix(".idx.json") + ".tar").exists():
            problems.append(f"{path.name} has no shard beside it.")
    return problems


def folder_index_problems(place: Place, checks: Sequence[ShardCheck]) -> list[str] | None:
    """What `index.json` says otherwise than the shards; None where there is none."""
    try:
        listed = place.folder_index()
    except ShardError as err:
        return [f"{err}."]
    if listed is None:
        return None
    problems = []
    present = {check.name: check for check in checks}
    for name in sorted(listed.keys() - present.keys()):
        problems.append(f"{name} is listed in {FOLDER_INDEX} and missing.")
    for name, check in present.items():
        entry = listed.get(name)
        if entry is None:
            problems.append(f"{name} is not listed in {FOLDER_INDEX}.")
            continue
        for what, actual in (("bytes", check.num_bytes), ("samples", check.num_samples), ("sha256", check.sha256)):
            if entry[what] != actual:
                problems.append(f"{name} has {what} {actual}, {FOLDER_INDEX} says {entry[what]}.")
    return problems
