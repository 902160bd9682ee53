"""What the cells of a manifest's row mean, each by its column; what a cell cannot mean is said with its column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

COLUMNS = ("path", "text", "key", "split", "start", "end")  # all others go to `user`
_SPLIT = re.compile(r"[A-Za-z0-9_-]{1,40}")
_SHOWN = 60  # characters of a cell in a message


def path_of(row: Mapping[str, Any]) -> str:
    """The video's address. Raises ValueError where there is none."""
    name = row.get("path")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"its path is {_shown(name)}, not a text")
    if name is None or not name.strip():
        raise ValueError("it has no path")
    return name


def word(row: Mapping[str, Any], column: str) -> str:
    """A text, or a number as a text; "" for an empty cell. Raises ValueError for anything else."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):  # whole numbers may be of any size
        raise ValueError(f"its {column} is {_shown(value)}, not a text")
    return str(value)


def split_of(row: Mapping[str, Any]) -> str:
    """The split, "" without. Raises ValueError for what names no folder."""
    split = word(row, "split")
    if split and not _SPLIT.fullmatch(split):
        raise ValueError(f"split {_shown(split)} is no plain folder name")
    return split


def part_of(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Start and end in seconds, None for those of the video. Raises ValueError where that is no part of one."""
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"its end ({end:g} s) is not after its start ({start or 0.0:g} s)")
    return start, end


def user_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The other columns. Raises ValueError for one that JSON cannot hold."""
    user = {column: value for column, value in row.items() if column not in COLUMNS and value is not None}
    for column, value in user.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError(
                f"its {_shown(column)} is, or has in it, a number that metadata cannot hold: {_shown(value)}"
            ) from None
    return user


def _seconds(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"its {column} is {_shown(value)}, not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"its {column} is {_shown(value)}, not a time in the video")
    return seconds


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
