"""What a run writes down as it goes: one JSON object per line, and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl and TensorBoard; only where `active`. On resume, lines after the checkpoint are dropped."""

    def __init__(self, output: Path, resumed_from: int, tensorboard: bool, active: bool) -> None:
        self._file, self._board = None, None
        if not active:
            return
        path = output / METRICS_FILE
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_from]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=resumed_from + 1)

    def write(self, step: int, **values: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"train/{name}", value, step)
                elif isinstance(value, dict):
                    self._board.add_scalar(f"{name}/error_ratio", value["teacher_forced"]["ratio"] or math.nan, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two nested configurations differ: `train.lr was 0.001, is 0.0003`."""
    found = []
    for key in sorted(set(old) | set(new)):
        name, was, now = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{name}.")
        elif was != now:
            found.append(f"{name} was {was!r}, is {now!r}")
    return found


def without(config: Mapping[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
    """A nested configuration but for the settings of these dotted names."""
    return {
        key: without(value, names, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in names
    }
