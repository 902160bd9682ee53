"""The results of a run, as one JSON file and one array file: all that the report page is made of."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from framestream.pipeline.errors import ConfigError

RESULTS_FILE, PICTURES_FILE = "results.json", "pictures.npz"


@dataclass
class Stage:
    """One step of the run, with what it did in one sentence."""

    name: str
    seconds: float
    detail: str


@dataclass
class Source:
    """One input video and what became of it."""

    name: str
    width: int
    height: int
    fps: float
    seconds: float
    train_clips: int
    held_out_clips: int


@dataclass
class ClipView:
    """A clip as the model sees it; its pictures are `clip{i}` uint8 `[F,H,W,3]`."""

    key: str
    seconds: float
    source_times: list[float]
    frame_index: list[int]
    frame_time: list[float]
    stream: list[int]
    valid: list[bool]


@dataclass
class MaskView:
    """The frame-level mask of the first clip. `rows[q][k]` is "1" where query frame q may attend key frame k."""

    rule: str
    rows: list[str]
    frame_index: list[int]
    stream: list[int]
    valid: list[bool]
    targets: list[int]
    tokens_per_frame: list[int]
    tokens: int
    density: float
    layers: int
    leaking: int
    rules: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Forecast:
    """Frames generated for one held-out clip; pictures `forecast{i}_{last,true,model}` uint8 `[S,H,W,3]`."""

    key: str
    times: list[float]
    model_error: list[float]
    copy_last_error: list[float]


@dataclass
class RunResults:
    """Everything that the page says, in the run's own numbers. Times are seconds."""

    title: str
    created: str
    device: str
    seconds: float
    stages: list[Stage]
    sources: list[Source]
    holdout: dict[str, Any]
    evaluation: dict[str, Any]
    train_curve: list[list[float]]
    held_out_curve: list[list[float | None]]
    clips: list[ClipView]
    mask: MaskView
    forecasts: list[Forecast]
    speed: dict[str, float]
    loop_seconds: dict[str, float]
    worker_seconds: dict[str, float]
    model: dict[str, Any]
    notes: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]

    def save(self, folder: Path, pictures: Mapping[str, np.ndarray]) -> None:
        """Write results.json and pictures.npz."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        (folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
        np.savez_compressed(folder / PICTURES_FILE, **pictures)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> tuple[RunResults, dict[str, np.ndarray]]:
        """Read what `save` wrote. ConfigError when the folder holds no such run."""
        try:
            raw = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
            with np.load(folder / PICTURES_FILE, allow_pickle=False) as arrays:
                pictures = {name: arrays[name] for name in arrays.files}
            raw["stages"] = [Stage(**item) for item in raw["stages"]]
            raw["sources"] = [Source(**item) for item in raw["sources"]]
            raw["clips"] = [ClipView(**item) for item in raw["clips"]]
            raw["forecasts"] = [Forecast(**item) for item in raw["forecasts"]]
            raw["mask"] = MaskView(**raw["mask"])
            return cls(**raw), pictures
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ConfigError(f"{folder} holds no results of a finished run ({err}): run the demo again.") from err


def versions() -> dict[str, str]:
    """Versions of what decides a result, and the machine."""
    names = ("framestream", "torch", "torchvision", "av", "decord", "webdataset", "numpy")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["processor cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return found
