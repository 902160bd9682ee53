"""Where the members of a shard lie: a walk over its tar headers, and the file that saves walking again.

Definitions, the same for our shards and for those of others. The key of a member is its name up to the first
dot after the last slash (folders stay part of the key, a leading `./` does not), its extension is all behind
that dot in lower case. Members that share a key are one sample, wherever in the tar they stand; where one key
has the same extension twice, the first is used. Members whose last suffix is not in `SAFE_EXTENSIONS` are not
indexed and therefore never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import atomic_write
from .errors import ShardError
from .sample_table import IndexedSample, SampleTable

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts")
SAFE_EXTENSIONS = (*VIDEO_EXTENSIONS, "json", "txt", "npy")
INDEX_VERSION = 1
BLOCK = 512  # bytes; a tar is a row of such blocks
WITHOUT_VIDEO = "has no video (or several) and is left out"  # what a problem of such a sample ends in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """What is in one tar. `sha256` is known where we wrote the tar; `note` is the writer's own remark.

    `cut` says that a walk stopped before the end of the tar. `promised` is how many samples the index beside the tar
    lists, where that one no longer fits the tar and this one was built.
    """

    name: str
    num_bytes: int
    samples: Sequence[IndexedSample]
    problems: tuple[str, ...] = ()
    sha256: str | None = None
    note: Mapping[str, Any] = field(default_factory=dict)
    cut: bool = False
    promised: int | None = None

    def to_bytes(self) -> bytes:
        """The index file: JSON, the same bytes for the same content."""
        content: dict[str, Any] = {
            "version": INDEX_VERSION,
            "shard": self.name,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "samples": [[s.key, {ext: list(place) for ext, place in s.members.items()}] for s in self.samples],
        }
        if self.problems:
            content["problems"] = list(self.problems)
        if self.note:
            content["note"] = dict(self.note)
        if self.cut:
            content["cut"] = True
        if self.promised is not None:
            content["promised"] = self.promised
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return (
            text.encode("utf-8", "surrogatepass") + b"\n"
        )  # names that are no UTF-8 stand there as tarfile reads them

    @staticmethod
    def from_bytes(data: bytes, name: str) -> ShardIndex:
        """Read an index file. Raises ShardError when it is damaged or of a version this code does not know."""
        try:
            content = json.loads(data)
            version = content["version"]
            if version != INDEX_VERSION:
                raise ShardError(
                    f"the index {name} has format version {version!r}, this framestream reads {INDEX_VERSION}: "
                    f"update framestream or delete the index to have it built again"
                )
            num_bytes = int(content["bytes"])
            return ShardIndex(
                str(content["shard"]),
                num_bytes,
                SampleTable(_placed(content["samples"], num_bytes)),
                tuple(map(str, content.get("problems", ()))),
                content.get("sha256"),
                dict(content.get("note", {})),
                content.get("cut") is True,
                int(content["promised"]) if "promised" in content else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
            raise ShardError(
                f"the index {name} is damaged ({err}): delete it to have it built again, or run "
                f"`framestream verify --repair-index`"
            ) from err


def _placed(samples: Any, num_bytes: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples that an index file lists. Raises ValueError and its like where they cannot be."""
    for key, members in samples:
        places = {str(ext): (int(offset), int(size)) for ext, (offset, size) in members.items()}
        if any(offset < BLOCK or size < 0 or offset + size > num_bytes for offset, size in places.values()):
            raise ValueError(f"sample {key!r} lies outside of the tar")
        yield str(key), places


def video_member(members: Mapping[str, Any]) -> str | None:
    """The extension of the sample's video: the first of VIDEO_EXTENSIONS, else the only one like `left.mp4`."""
    for ext in VIDEO_EXTENSIONS:
        if ext in members:
            return ext
    dotted = [ext for ext in members if ext.rpartition(".")[2] in VIDEO_EXTENSIONS]
    return dotted[0] if len(dotted) == 1 else None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name, or None where it has no key or no extension."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, dot, ext = base.partition(".")
    return (folder + slash + stem, ext.lower()) if stem and dot and ext else None


def index_path(shard: str | Path) -> Path:
    """The index file beside a tar: `clips-000000.tar` -> `clips-000000.idx.json`."""
    path = Path(shard)
    return path.with_name(path.name.removesuffix(".tar") + ".idx.json")


def index_tar(path: str | Path, *, name: str | None = None, promised: ShardIndex | None = None) -> ShardIndex:
    """Build the index by reading the headers only; what is wrong with the tar is told in `problems`.

    A tar cut at any byte, damaged in the middle or not a tar at all gives the samples that are whole. `promised`
    is an index that no longer fits the file: it says what a cut tar once held. Raises ShardError when the file
    cannot be opened.
    """
    name = name or Path(path).name
    try:
        with open(path, "rb") as file:
            return _Walk(name, promised).run(file)
    except OSError as err:
        raise ShardError(f"shard {path} cannot be read ({err.strerror or err})") from err


class _Walk:
    """One pass over the headers of one tar."""

    def __init__(self, name: str, promised: ShardIndex | None) -> None:
        self.name = name
        self.promised = {s.key: s.members for s in promised.samples} if promised else {}
        self.samples: dict[str, dict[str, tuple[int, int]]] = {}
        self.problems: list[str] = []
        self.last_key: str | None = None
        self.half: set[str] = set()
        self.left_out: list[str] = []
        self.cut = False

    def run(self, file: BinaryIO) -> ShardIndex:
        size = os.fstat(file.fileno()).st_size
        end, fault = self._headers(file, size)
        file.seek(end)
        tail = file.read(2 * BLOCK)
        ended = len(tail) >= BLOCK and not any(tail[:BLOCK])
        if not ended or len(tail) < 2 * BLOCK:
            if fault is None and len(tail) >= BLOCK and not ended:
                fault = f"has a damaged header at byte {end}"
            fault = fault or f"is cut at byte {size} (its end marker is missing)"
            if not ended:
                self._suspect_last(more_follows="damaged header" in fault)
        elif any(tail) or _goes_on(file):
            self._suspect_last(more_follows=any(tail))  # an end marker has two blocks, a zeroed header may be one
            self.cut = True
            self.problems.append(f"{self.name} goes on behind its end marker at byte {end}; that part is not read")
        if fault:
            self.cut = True
            lost = len(self.promised.keys() - self.samples.keys())
            self.problems.insert(0, f"{self.name} {fault}" + (f"; {lost} samples behind it are lost" if lost else ""))
        if self.left_out:
            self.problems.append(
                f"{self.name}: {len(self.left_out)} members are links or sparse, {self.left_out[0]!r} first; plain "
                "files alone are read: pack it again, e.g. with tar --dereference --hard-dereference"
            )
        for key in sorted(self.half):
            self.problems.append(f"{self.name}: sample {key!r} is not whole and is left out")
        samples = []
        for key, members in self.samples.items():
            if key in self.half:
                continue
            if video_member(members) is None:
                self.problems.append(f"{self.name}: sample {key!r} {WITHOUT_VIDEO}")
            else:
                samples.append(IndexedSample(key, members))
        if not samples:
            self.problems.append(f"{self.name} holds no usable sample")
        return ShardIndex(self.name, size, SampleTable(samples), tuple(self.problems), cut=self.cut)

    def _headers(self, file: BinaryIO, size: int) -> tuple[int, str | None]:
        """Read all headers; return where the last whole member ends and what stopped the walk, if anything did."""
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header of a large tar
                    if tar.offset <= end or info.size < 0:
                        return end, f"has a damaged header at byte {end}"
                    # The size of a link is that of its target, the size of a sparse member that with its holes.
                    stored = info.size if info.isreg() and not info.issparse() else 0
                    if info.offset_data + stored > size:
                        self._add(info, whole=False)
                        return end, f"is cut at byte {size}"
                    self._add(info, whole=True)
                    end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as err:
            if end == 0 and size >= BLOCK:
                return 0, f"is not a plain tar ({err}); a compressed one has to be unpacked first"
            cut = size - end < 2 * BLOCK or "unexpected end" in str(err)
            return end, f"is cut at byte {size}" if cut else f"has a damaged header at byte {end} ({err})"
        return end, None

    def _add(self, info: tarfile.TarInfo, *, whole: bool) -> None:
        parts = split_name(info.name)
        if "\0" in info.name:
            self.problems.append(
                f"{self.name}: a member is called {info.name[:80]!r}, which is damaged, and is left out"
            )
            return
        if parts is None or info.isdir():
            return  # can belong to no sample
        key, ext = parts
        if not info.isreg() or info.issparse():
            if ext.rpartition(".")[2] in SAFE_EXTENSIONS:
                self.left_out.append(info.name)
            return
        self.last_key = key
        if not whole:
            self.half.add(key)
            self.samples.setdefault(key, {})
        elif ext.rpartition(".")[2] in SAFE_EXTENSIONS:
            members = self.samples.setdefault(key, {})
            if ext in members:
                self.problems.append(f"{self.name}: sample {key!r} has its .{ext} twice; the first is used")
            else:
                members[ext] = (info.offset_data, info.size)

    def _suspect_last(self, *, more_follows: bool) -> None:
        """A tar that stops between two members may have lost the rest of its last sample.

        `more_follows`: a member did follow whose header is damaged, so it might have had the same key.
        """
        key = self.last_key
        if key is None or key in self.half or key not in self.samples:
            return
        others = [set(m) for k, m in self.samples.items() if k != key]
        expected = set(self.promised[key]) if key in self.promised else set().union(*others)
        unknown = more_follows and not expected
        if unknown or not expected <= set(self.samples[key]):
            self.half.add(key)


def _goes_on(file: BinaryIO) -> bool:
    """Whether anything but zeros follows."""
    while chunk := file.read(1 << 20):
        if any(chunk):
            return True
    return False


def load_index(path: str | Path, cache_dir: Path) -> ShardIndex:
    """The index of a local tar: from the file beside it, from the cache, or by walking the tar (then stored).

    A stored index counts only when it was made for as many bytes as the tar has now. A new one is stored beside a
    whole tar that has none, and in `cache_dir` when the folder cannot be written or the tar has faults.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as err:
        raise ShardError(f"shard {path} cannot be read ({err.strerror or err})") from err
    promised = None
    note: str | None = None
    for place in (index_path(path), _cached_index(path, cache_dir)):
        try:
            index = ShardIndex.from_bytes(place.read_bytes(), str(place))
        except OSError:
            continue
        except ShardError as err:
            note = note or str(err)
            continue
        in_cache = place.parent != path.parent
        if index.num_bytes == stat.st_size and (not in_cache or index.note.get("mtime_ns") == stat.st_mtime_ns):
            return replace(index, promised=len(promised.samples)) if promised is not None else index
        if not in_cache:
            promised = index
    index = index_tar(path, promised=promised)
    problems = list(index.problems)
    if promised is not None:
        problems.insert(0, f"{path.name} has {stat.st_size} bytes, its index was made for {promised.num_bytes}")
    if note:
        problems.insert(0, note)
    index = replace(index, problems=tuple(problems))
    _store(index, path, cache_dir, stat.st_mtime_ns)
    return replace(index, promised=len(promised.samples)) if promised is not None else index


def _cached_index(path: Path, cache_dir: Path) -> Path:
    return cache_dir / "index" / (hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32] + ".idx.json")


def _store(index: ShardIndex, path: Path, cache_dir: Path, mtime_ns: int) -> None:
    beside = index_path(path)
    if not index.problems and not beside.exists():
        try:
            atomic_write(beside, index.to_bytes())
            return
        except OSError:
            log.debug("cannot write %s, the index goes to the cache", beside)
    cached = _cached_index(path, cache_dir)
    noted = replace(index, note={"mtime_ns": mtime_ns})
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(cached, noted.to_bytes())
    except OSError as err:
        log.warning("the index of %s cannot be stored (%s); it is built again at every start", path, err)
