"""`framestream inspect`: a page about a set of shards, or one of their samples in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from framestream.pipeline.atomic import atomic_write
from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling

from .inspect_page import render_page
from .inspect_run import LAYERS, InspectOptions, look_at
from .inspect_sample import show_sample
from .inspect_splits import open_splits


def inspect(
    target: list[str],
    *,
    output: str | None = None,
    sheets: int = 6,
    max_samples: int = 20_000,
    max_shards: int = 16,
    sampling: Literal["fast_slow", "dense"] = "fast_slow",
    num_fast: int = 8,
    num_slow: int = 8,
    fast_stride: int = 1,
    slow_stride: int = 4,
    slow_coverage: Literal["clip", "stride"] = "clip",
    slow_snap: Literal["keyframe"] | None = None,
    order: Literal["concat", "interleave", "time"] = "concat",
    fps: float | None = None,
    image_size: int = 224,
    mask: str = "time_causal",
    window_size: int = 3,
    patches: int = 256,
    layers: int = LAYERS,
    workers: int = 0,
    seconds: float = 5.0,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Look at shards before training on them: a page about all of them, or one sample in the terminal.

    With --output the target is a folder (with train/ and val/ inside, each is a split), a tar, several of them, a
    glob, a brace pattern or a URL, and the page says what is in it: samples, hours, sizes, key-frame distances, texts;
    a few clips with the frames that the model would see; the mask of these settings; what was rejected, and why; and
    about how long an epoch takes. It is one file, without scripts, that opens anywhere.

    Without --output the target is a tar or a folder, and the key of a sample: its members, its metadata, its frames,
    and whether it decodes.

    Examples:
        framestream inspect shards --output page.html
        framestream inspect 'shards/train/clips-{000000..000099}.tar' --output page.html --num-slow 4 --mask fast_slow
        framestream inspect shards holiday-000017

    Args:
        target: shards; or shards and the key of a sample.
        output: the page to write, ending in .html.
        sheets: clips that are shown on the page.
        max_samples: samples whose metadata is read, evenly spread over all.
        max_shards: shards of a remote split that are fetched, evenly spread over all.
        sampling: slow frames over the whole clip and fast ones at its end, or num_fast frames at its end alone.
        num_fast: fast frames.
        num_slow: slow frames.
        fast_stride: frames of the video from one fast frame to the next.
        slow_stride: the same for slow frames, with slow_coverage stride.
        slow_coverage: slow frames over the whole clip, or slow_stride apart at its end.
        slow_snap: keyframe moves slow frames to the nearest key frames.
        order: of slow and fast frames in the model's sequence.
        fps: count strides in frames of this rate; default those of the video.
        image_size: pixels of the square that the model sees.
        mask: rule that says which frames see which: time_causal, frame_causal, sliding_window, fast_slow,
            fast_slow_causal or full.
        window_size: frames that sliding_window shows, the frame itself included.
        patches: tokens per frame, for the mask.
        layers: of the model, through which a target could leak.
        workers: processes that the time of an epoch is estimated for; 0 takes one per CPU core.
        seconds: how long the loader runs for that estimate.
        storage_options: settings of the storage that a URL names, as JSON; they are passed to fsspec.

    Returns:
        Exit code: 0 done, 1 the sample is broken, 2 there is no such key, no such shards, or the request is wrong.
    """
    from rich.console import Console

    options = InspectOptions(
        sheets=sheets,
        max_samples=max_samples,
        max_shards=max_shards,
        sampling=DenseSampling(num_fast, fast_stride, fps)
        if sampling == "dense"
        else FastSlowSampling(num_fast, num_slow, fast_stride, slow_stride, slow_coverage, order, fps, slow_snap),
        image_size=image_size,
        mask=mask,
        window_size=window_size,
        patches=patches,
        layers=layers,
        workers=workers,
        seconds=seconds,
        storage_options=storage_options,
    )
    transform = options.transform  # says now what is impossible
    if output is None and len(target) != 2:
        raise ConfigError(
            f"{len(target)} {'word was' if len(target) == 1 else 'words were'} given: name shards and the key of one "
            "sample, or shards and --output page.html for a page about all of them"
        )
    page = None if output is None else _page(output)
    try:
        splits = open_splits(target if page else target[:1], storage_options)
    except ShardError as err:
        print(f"framestream inspect: {err}", file=sys.stderr)
        return 2
    if page is None:
        return show_sample(splits, target[1], transform, Console(highlight=False))
    html = render_page(look_at(target, splits, options)).encode("utf-8")
    atomic_write(page, html)
    print(f"wrote {page} ({len(html) / 1e6:.1f} MB)")
    return 0


def _page(output: str) -> Path:
    """Where the page goes. Raises ConfigError before any work is done for nothing, or a shard overwritten."""
    page = Path(output).expanduser()
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"output is {output}, the page's name has to end in .html")
    if not page.absolute().parent.is_dir():
        raise ConfigError(f"output {output} cannot be written: there is no folder {page.absolute().parent}")
    return page
