"""Manifests: CSV, JSON lines or Parquet, read row by row, so that their length does not matter."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, TextIO

from framestream.pipeline.errors import ConfigError, FramestreamError
from framestream.pipeline.redaction import shown_url
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_paths import is_url

from .source_file import fetched

MANIFESTS = (".csv", ".jsonl", ".ndjson", ".parquet")
MAX_NESTING = 32  # of lists and objects in a row
MAX_LINE = 16 << 20  # characters; what is longer is cut, so its row is found to be damaged
_BATCH = 1024  # rows of Parquet at a time

Row = tuple[int, Mapping[str, Any] | str]


def manifest_rows(path: str, kind: str, remote: Remote) -> Iterator[Row]:
    """Yield (row number from 1, row, or what is wrong with it in words).

    A row maps columns to what JSON can hold. A remote manifest is downloaded to a temporary file.

    Args:
        path: a local path or an fsspec URL.
        kind: one of `MANIFESTS`.
    Raises:
        ConfigError: the file as a whole cannot be read, or has no column `path`.
        ShardError: remote storage does not answer.
    """
    if not is_url(path):
        yield from _checked(path, path, kind)
        return
    try:
        with fetched(path, remote) as local:
            yield from _checked(local, shown_url(path), kind)
    except FileNotFoundError as err:
        raise ConfigError(f"input {shown_url(path)} does not exist: check the path") from err


def _checked(path: str, name: str, kind: str) -> Iterator[Row]:
    try:
        for number, row in _rows(path, name, kind):
            if isinstance(row, str):
                yield number, row
                continue
            try:
                yield number, _plain(row)
            except ValueError as err:
                yield number, str(err)
    except FramestreamError:
        raise
    except OSError as err:
        raise ConfigError(f"manifest {name} cannot be read ({err.strerror or err})") from err


def _rows(path: str, name: str, kind: str) -> Iterator[Row]:
    if kind == ".parquet":
        yield from _parquet_rows(path, name)
        return
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from _csv_rows(_lines(file), name) if kind == ".csv" else _jsonl_rows(_lines(file))


def _lines(file: TextIO) -> Iterator[str]:
    """Lines of text, each no longer than `MAX_LINE`."""
    while line := file.readline(MAX_LINE):
        rest = line
        while len(rest) == MAX_LINE and not rest.endswith(("\n", "\r")):
            rest = file.readline(MAX_LINE)
        yield line


def _jsonl_rows(lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            yield number, f"it is no JSON ({err})"
            continue
        yield number, row if isinstance(row, dict) else f"it is a {type(row).__name__}, not an object"


def _csv_rows(lines: Iterator[str], name: str) -> Iterator[Row]:
    reader = csv.DictReader(lines, strict=True)  # else a quote that is not closed takes in the rows behind it
    try:
        columns = reader.fieldnames or ()
    except csv.Error as err:
        raise ConfigError(f"manifest {name} is no readable CSV ({err})") from err
    if "path" not in columns:
        shown = ", ".join(columns or "-").encode("utf-8", "backslashreplace").decode()
        raise ConfigError(f"manifest {name} has no column 'path', only {shown}")
    number = 0
    while True:
        number += 1
        before = reader.reader.line_num  # its own is only that of rows which could be read
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as err:  # the reader goes on behind it
            yield number, f"it is no readable CSV ({err}{_span(before, reader.reader.line_num)})"
            continue
        extra = row.pop(None, None)  # type: ignore[call-overload]
        if extra is None:
            yield number, row
        else:
            yield number, f"it has {len(extra)} cells more than the header{_span(before, reader.reader.line_num)}"


def _span(before: int, last: int) -> str:
    """Which lines a row takes, where these are several."""
    return "" if last <= before + 1 else f"; it takes the lines {before + 1} to {last}: is a quote in it not closed?"


def _parquet_rows(path: str, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as err:
        raise ConfigError(f"manifest {name} is Parquet: `pip install pyarrow`, or use CSV or JSONL") from err
    number = 0
    try:
        # Column chunks are as long as a file's writer wanted: they are read piece by piece.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if "path" not in columns:
                raise ConfigError(f"manifest {name} has no column 'path', only {', '.join(columns)}")
            if twice := sorted({column for column in columns if columns.count(column) > 1}):
                raise ConfigError(f"manifest {name} has the column {twice[0]!r} twice: rename one of them")
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in _rows_of(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as err:
        raise ConfigError(f"manifest {name} is no readable Parquet ({err})") from err


def _rows_of(batch: Any) -> Iterator[Mapping[str, Any] | str]:
    """The rows of a record batch; one with a value that Python cannot hold (a time in the year 30000) costs itself."""
    try:
        rows: list[Mapping[str, Any] | str] = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = []
        for at in range(len(batch)):
            try:
                rows += batch.slice(at, 1).to_pylist()
            except (ValueError, OverflowError) as err:
                rows.append(f"it has a value that cannot be read ({err})")
    yield from rows


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
