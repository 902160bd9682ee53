"""Figures of the long tests: printed as a table, and written as JSON where `FRAMESTREAM_RESULTS` names a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def publish(config: pytest.Config, name: str, figures: Any, text: str) -> None:
    """Print `text` past pytest's capturing, and write `figures` to `$FRAMESTREAM_RESULTS/{name}.json`."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n\n{name}\n{text}\n", flush=True)
    if folder := os.environ.get("FRAMESTREAM_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
