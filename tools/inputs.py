"""What `framestream shard` is given: files, folders, globs and manifests, to a list of source videos."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.shards import VIDEO_EXTENSIONS

MANIFESTS = (".csv", ".jsonl", ".ndjson", ".parquet")
COLUMNS = ("path", "text", "key", "split", "start", "end")  # of a manifest; all others go to `user`
MAX_NESTING = 32  # of lists and objects in a row
_SLUG_LENGTH = 60
_SPLIT = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class Source:
    """One video to be sharded: a file, or the part of it that a manifest's row names.

    Attributes:
        path: where it is.
        source: how reports and metadata call it: the path below the folder that was given.
        key: unique, of letters, digits, `_` and `-`.
        start, end: seconds; None for the file's own.
    """

    path: str
    source: str
    key: str
    text: str | None = None
    split: str = ""
    start: float | None = None
    end: float | None = None
    user: Mapping[str, Any] = field(default_factory=dict, compare=False)  # dicts have no hash
    size: int = 0
    mtime_ns: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Found:
    """All inputs: those to use, those that cannot be (`rejects`: source, reason), and what was passed over."""

    sources: list[Source] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    repeated: int = 0
    other_files: Counter[str] = field(default_factory=Counter)

    @property
    def num_inputs(self) -> int:
        return len(self.sources) + len(self.rejects) + self.repeated


def find_sources(inputs: Sequence[str]) -> Found:
    """Look all inputs up, in the order given; folders recursively and sorted.

    Raises:
        ConfigError: an input does not exist, is a URL, is a manifest that cannot be read, or there is no video.
    """
    found = Found()
    seen: set[tuple[str, float | None, float | None]] = set()
    for row in _rows(inputs, found):
        place = (os.path.abspath(row.path), row.start, row.end)
        if place in seen:
            found.repeated += 1
            continue
        seen.add(place)
        try:
            stat = os.stat(row.path)
            if not os.path.isfile(row.path):
                raise OSError("it is no regular file")
        except (OSError, ValueError) as err:
            reason = f"cannot be read ({getattr(err, 'strerror', None) or err})"
            found.rejects.append({"source": row.source, "reason": reason})
            continue
        found.sources.append(replace(row, size=stat.st_size, mtime_ns=stat.st_mtime_ns))
    if not found.num_inputs:
        others = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in sorted(found.other_files.items()))
        raise ConfigError(
            f"there is no video in {', '.join(map(str, inputs))}"
            + (f" (only other files: {others})" if others else "")
            + f"; videos end in {' '.join('.' + ext for ext in VIDEO_EXTENSIONS)}"
        )
    found.sources = _unique_keys(found)
    return found


def _rows(inputs: Sequence[str], found: Found) -> Iterator[Source]:
    if not inputs:
        raise ConfigError("no input was named: give video files, folders, globs or manifests (csv, jsonl, parquet)")
    for text in map(os.fspath, inputs):
        if is_url(text):
            raise ConfigError(f"{text} is a URL; copy the videos to a local folder first, URLs are read as shards only")
        path = os.path.expanduser(text)
        if os.path.isdir(path):
            yield from _folder(path, found)
        elif os.path.splitext(path)[1].lower() in MANIFESTS and os.path.isfile(path):
            yield from _manifest(Path(path), found)
        elif os.path.lexists(path):
            yield from _file(path, os.path.basename(path), found, named=True)
        else:
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ConfigError(f"input {text} does not exist: check the path")
            for match in matches:
                if os.path.isdir(match):
                    yield from _folder(match, found)
                else:
                    yield from _file(match, os.path.basename(match), found)


def _folder(folder: str, found: Found) -> Iterator[Source]:
    def refuse(err: OSError) -> None:
        found.rejects.append({"source": _readable(os.path.relpath(err.filename, folder)), "reason": str(err.strerror)})

    entered: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in entered:  # a link back into what was seen
            folders[:] = []
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                path = os.path.join(parent, name)
                yield from _file(path, os.path.relpath(path, folder), found)


def _file(path: str, relative: str, found: Found, *, named: bool = False) -> Iterator[Source]:
    stem, ext = os.path.splitext(path)
    source = _readable(Path(relative).as_posix())
    if ext.lower().lstrip(".") not in VIDEO_EXTENSIONS:
        if named:
            reason = f"{ext or 'no extension'} is none of {' '.join('.' + e for e in VIDEO_EXTENSIONS)}"
            found.rejects.append({"source": source, "reason": reason})
        else:
            found.other_files[_readable(ext.lower())] += 1
        return
    yield Source(path, source, slug(os.path.splitext(source)[0]), _sidecar(Path(stem + ".txt")))


def _sidecar(path: Path) -> str | None:
    """The text beside a video, None where there is none to be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _readable(name: str) -> str:
    """A file name as text that JSON can hold, also where the name is no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def slug(name: str) -> str:
    """A key made of a relative path: ASCII letters, digits, `_`, `-`; a short hash where that lost something."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", unicodedata.normalize("NFKD", name)).strip("_")
    if plain and name.isascii() and len(plain) <= _SLUG_LENGTH:
        return plain
    return f"{plain[:_SLUG_LENGTH]}-{_short_hash(name)}".lstrip("-_")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _unique_keys(found: Found) -> list[Source]:
    """Keys that several sources would share get a hash of the whole name, and a number where even that is equal."""
    counts = Counter(source.key for source in found.sources)
    taken: set[str] = {key for key, n in counts.items() if n == 1}
    unique = []
    for source in found.sources:
        key = source.key
        if counts[key] > 1:
            base = f"{key}-{_short_hash(source.source)}"
            key, number = base, 2
            while key in taken:
                key, number = f"{base}-{number}", number + 1
            taken.add(key)
        unique.append(replace(source, key=key))
    return unique


def _manifest(path: Path, found: Found) -> Iterator[Source]:
    for number, row in _manifest_rows(path):
        where = f"{_readable(path.name)} row {number}"
        if isinstance(row, str):
            found.rejects.append({"source": where, "reason": row})
            continue
        try:
            yield _source(path, _plain(row))
        except ValueError as err:
            found.rejects.append({"source": where, "reason": str(err)})


def _plain(cell: Any, depth: int = 0) -> Any:
    """A row of a manifest, or what is in it, as JSON can hold it. Raises ValueError, in words, when it cannot."""
    if depth > MAX_NESTING:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
    if isinstance(cell, str):
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise ValueError(f"it has text that is no Unicode: {cell[:60]!a}") from None
        return cell
    if cell is None or isinstance(cell, (bool, int, float)):
        return cell
    if isinstance(cell, (date, time)):
        return cell.isoformat()
    if isinstance(cell, timedelta):
        return cell.total_seconds()
    if isinstance(cell, Decimal):
        number = float(cell)
        return number if Decimal(repr(number)) == cell else str(cell)  # text where a number would lose digits
    if isinstance(cell, (list, tuple)):
        return [_plain(item, depth + 1) for item in cell]
    if isinstance(cell, Mapping):
        return {_plain(str(name), depth + 1): _plain(item, depth + 1) for name, item in cell.items()}
    raise ValueError(f"it has a value of the kind {type(cell).__name__}, which metadata cannot hold")


def _source(manifest: Path, row: Mapping[str, Any]) -> Source:
    """One row of a manifest. Raises ValueError, in words, when it cannot be used."""
    name = row.get("path")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("it has no path")
    if is_url(name):
        raise ValueError(f"{name} is a URL; copy it to a local folder first")
    ext = os.path.splitext(name)[1].lower().lstrip(".")
    if ext not in VIDEO_EXTENSIONS:
        raise ValueError(f"{name}: {ext or 'no extension'} is none of {', '.join(VIDEO_EXTENSIONS)}")
    split = str(row.get("split") or "")
    if split and not _SPLIT.fullmatch(split):
        raise ValueError(f"split {split!r} is no plain folder name")
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"its end ({end:g} s) is not after its start ({start or 0.0:g} s)")
    path = manifest.parent / os.path.expanduser(name)
    text = row.get("text")
    if text is None or text == "":
        text = _sidecar(path.with_suffix(".txt"))
    key = str(row.get("key") or "") or os.path.splitext(name)[0].lstrip("/.")
    user = {k: v for k, v in row.items() if k not in COLUMNS and v is not None}
    json.dumps(user, allow_nan=False)  # raises ValueError for what the metadata could not hold
    return Source(str(path), _readable(name), slug(key), None if text is None else str(text), split, start, end, user)


def _seconds(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"its {column} is {value!r}, not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"its {column} is {value!r}, not a time in the video")
    return seconds


def _manifest_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """(row number from 1, row or what is wrong with it). Raises ConfigError when the file as a whole is unusable."""
    try:
        if path.suffix.lower() == ".csv":
            yield from _csv_rows(path)
        elif path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
        else:
            with open(path, encoding="utf-8-sig", errors="replace") as lines:
                yield from _jsonl_rows(lines)
    except OSError as err:
        raise ConfigError(f"manifest {path} cannot be read ({err.strerror or err})") from err


def _jsonl_rows(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            yield number, f"it is no JSON ({err})"
            continue
        yield number, row if isinstance(row, dict) else f"it is a {type(row).__name__}, not an object"


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise ConfigError(f"manifest {path} has no column 'path', only {', '.join(reader.fieldnames or '-')}")
            for number, row in enumerate(reader, start=1):
                extra = row.pop(None, None)  # type: ignore[call-overload]
                yield number, row if extra is None else f"it has {len(extra)} cells more than the header"
    except csv.Error as err:
        raise ConfigError(f"manifest {path} is no readable CSV ({err})") from err


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as err:
        raise ConfigError(f"manifest {path} is Parquet: `pip install pyarrow`, or use CSV or JSONL") from err
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "path" not in file.schema_arrow.names:
                raise ConfigError(f"manifest {path} has no column 'path', only {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, ValueError, OverflowError) as err:  # the latter: times that Python cannot hold
        raise ConfigError(f"manifest {path} is no readable Parquet ({err})") from err
