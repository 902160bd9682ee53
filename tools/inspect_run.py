"""Gathers what the page of `framestream inspect` shows: metadata, clips, mask, rejects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.masks import check_rule
from framestream.pipeline.sampling import FastSlowSampling, Sampling
from framestream.pipeline.shard_paths import is_url
from framestream.pipeline.transforms import ClipTransform

from .console import progress_bar
from .cores import usable_cores
from .inspect_clips import view_clips
from .inspect_mask import mask_facts
from .inspect_page import Inspection
from .inspect_rejects import Account, read_account
from .inspect_splits import Split, chosen_places, spread
from .inspect_summary import read_facts
from .inspect_text import shown
from .inspect_timing import time_loader
from .results import versions

MAX_SHEETS = 50
MAX_PROCESSES = 8  # that make the clips of the sheets
LAYERS = 3  # of the model, where nothing else is said; its configuration is not imported for it


@dataclass(frozen=True)
class InspectOptions:
    """What is looked at and how.

    Attributes:
        sheets: clips that are shown.
        max_samples: samples whose metadata is read, evenly spread over all.
        max_shards: shards of a remote split that are fetched, evenly spread over all.
        sampling: which frames of a clip.
        image_size: pixels of the square that the model sees.
        mask: name of a rule.
        window_size: frames that the rule sliding_window shows.
        patches: tokens per frame.
        layers: of the model, through which a target could leak.
        workers: that the time of an epoch is estimated for; 0 for one per CPU core.
        seconds: how long the loader runs for that estimate.
        storage_options: settings of the storage that a URL names.
    """

    sheets: int = 6
    max_samples: int = 20_000
    max_shards: int = 16
    sampling: Sampling = field(default_factory=FastSlowSampling)
    image_size: int = 224
    mask: str = "time_causal"
    window_size: int = 3
    patches: int = 256
    layers: int = LAYERS
    workers: int = 0
    seconds: float = 5.0
    storage_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_rule(self.mask)
        for name in ("sheets", "max_samples", "max_shards", "window_size", "patches", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it has to be at least 1")
        if self.sheets > MAX_SHEETS:
            raise ConfigError(f"sheets is {self.sheets}, at most {MAX_SHEETS} make a page that is read")
        if self.workers < 0 or not 0 <= self.seconds < float("inf"):
            raise ConfigError(f"workers and seconds have to be at least 0, got {self.workers} and {self.seconds:g}")

    @property
    def transform(self) -> ClipTransform:
        """What makes a clip, as in the workers of a loader with these settings."""
        return ClipTransform(self.sampling, image_size=self.image_size, decoder="pyav")

    def settings(self) -> list[tuple[str, str]]:
        """(name, value) of what decides frames and mask."""
        kind = self.sampling
        rows = [("sampling", type(kind).__name__)]
        rows += [(each.name, str(getattr(kind, each.name))) for each in fields(kind)]  # type: ignore[arg-type]
        names = ["image_size", "mask", "patches", "layers"]
        if self.mask == "sliding_window":
            names.insert(2, "window_size")
        return rows + [(name, str(getattr(self, name))) for name in names]


def look_at(target: Sequence[str], splits: Sequence[Split], options: InspectOptions, quiet: bool = False) -> Inspection:
    """Read metadata, make clips, and gather what else there is to say.

    Raises:
        ConfigError: settings that no clip can be made with.
    """
    places = chosen_places(splits, options.max_samples, options.max_shards)
    total, done = sum(map(len, places)), 0
    with progress_bar("reading", total, quiet=quiet) as show:

        def advance() -> None:
            nonlocal done
            done += 1
            if done % 100 == 0 or done == total:
                show(done, "samples")

        facts = [
            read_facts(split, chosen, options.sampling, advance) for split, chosen in zip(splits, places, strict=True)
        ]
    flat = [(number, *place) for number, chosen in enumerate(places) for place in chosen]
    workers = options.workers or usable_cores()
    chosen_clips = [flat[k] for k in spread(options.sheets, len(flat))]
    sheets = view_clips(splits, chosen_clips, options.transform, min(workers, MAX_PROCESSES))
    with progress_bar("timing the loader", 1, quiet=quiet) as show:
        timing = time_loader(splits, places, options, workers) if any(sheet.clip for sheet in sheets) else None
        show(1, "runs")
    return Inspection(
        target=shown(", ".join(target), 400),
        facts=facts,
        sheets=sheets,
        timing=timing,
        workers=workers,
        mask=mask_facts(sheets, options.mask, options.window_size, options.patches, options.layers),
        account=_account(target),
        image_size=options.image_size,
        settings=options.settings(),
        versions=list(versions().items()),
        created=time.strftime("%Y-%m-%d %H:%M"),
    )


def _account(target: Sequence[str]) -> Account | None:
    if len(target) != 1 or is_url(target[0]) or not Path(target[0]).expanduser().is_dir():
        return None
    return read_account(Path(target[0]).expanduser())
