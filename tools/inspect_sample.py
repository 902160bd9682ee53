"""One sample in the terminal: its members, its metadata, the frames that a model would see, and if it decodes."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from framestream.pipeline.errors import SampleError
from framestream.pipeline.raw_sample import RawSample
from framestream.pipeline.transforms import ClipTransform

from .inspect_clips import SeenClip, view_sample
from .inspect_splits import Split
from .inspect_text import long_time, shown, size

FOUND, BROKEN, NO_SUCH_KEY = 0, 1, 2
_LISTS = {"key_frames": "frames", "timestamps": "the frame rate varies"}


def show_sample(splits: Sequence[Split], key: str, transform: ClipTransform, console: Console) -> int:
    """Print the sample `key`; returns `FOUND`, `BROKEN` (a sentence says why) or `NO_SUCH_KEY` (close keys are named).

    Raises:
        ShardError: a shard cannot be read.
    """
    place = _find(splits, key)
    if place is None:
        return _missing(splits, key, console)
    shards, shard, number = place[0].shards, *place[1:]
    _say(console, f"{shown(key)} in {shown(shards.paths[shard])}", "bold")
    try:
        sample = shards.read(shard, number)
        arrays = shards.read(shard, number, want=("npy",))
    except SampleError as err:
        _say(console, f"It is broken: {shown(err)}", "bold red")
        return BROKEN
    console.print(_members({**sample.members, **arrays.members}))
    console.print(_metadata(sample))
    _say(console, f"Text: {shown(sample.text, 600)}" if sample.text else "It has no text.")
    clip = view_sample(shards, shard, number, transform)
    if isinstance(clip, SeenClip):
        console.print(_frames(clip))
    faults = list(_faults(sample, clip))
    for fault in faults:
        _say(console, f"It is broken: {shown(fault, 600)}", "bold red")
    if isinstance(clip, SeenClip) and not faults:
        checked = " The video has the SHA-256 that its metadata says." if "sha256" in sample.meta else ""
        _say(console, f"It decodes, in {long_time(clip.seconds)}.{checked}", "bold green")
    return BROKEN if faults else FOUND


def _find(splits: Sequence[Split], key: str) -> tuple[Split, int, int] | None:
    for split in splits:
        for shard in range(len(split.shards.names)):
            keys = split.shards.keys(shard)
            if key in keys:
                return split, shard, keys.index(key)
    return None


def _missing(splits: Sequence[Split], key: str, console: Console) -> int:
    """Say that there is no such key, or that it is there and was left out."""
    told = [problem for split in splits for problem in split.shards.problems if repr(key) in problem]
    if told:
        _say(console, f"{shown(key)} is broken: {shown(told[0], 600)}", "bold red")
        return BROKEN
    samples = sum(len(split.shards) for split in splits)
    near = close_keys(key, (k for s in splits for shard in range(len(s.shards.names)) for k in s.shards.keys(shard)))
    hint = f"close ones are {', '.join(map(shown, near))}" if near else "and none is like it"
    _say(console, f"There is no sample with the key {shown(key)} among {samples:,}; {hint}.", "bold red")
    return NO_SUCH_KEY


def close_keys(key: str, keys: Iterator[str], count: int = 3) -> list[str]:
    """The keys that begin and end as `key` does, the most alike first; from any number of keys in little memory."""

    def alike(other: str) -> int:
        head = _in_common(key, other)
        return head + _in_common(key[head:][::-1], other[head:][::-1])

    return [other for other in heapq.nlargest(count, keys, key=alike) if 2 * alike(other) >= len(key)]


def _in_common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _faults(sample: RawSample, clip: SeenClip | str) -> Iterator[str]:
    if sample.meta_error and "json" in sample.members:
        yield f"{sample.meta_error}."
    expected = sample.meta.get("sha256")
    changed = isinstance(expected, str) and expected != hashlib.sha256(sample.video).hexdigest()
    if changed:
        yield "its video has not the SHA-256 that its metadata says: its bytes have changed."
    if isinstance(clip, str) and not (changed and "sha256" in clip):
        yield clip


def _members(members: dict[str, object]) -> Table:
    table = Table("member", "bytes", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for ext in sorted(members):
        num_bytes = len(members[ext])  # type: ignore[arg-type]  # bytes, or a member that knows its size
        table.add_row(Text(shown(ext, 60)), f"{num_bytes:,}", size(num_bytes))
    return table


def _metadata(sample: RawSample) -> Table:
    """The JSON, one row per field; long lists only counted, packets only named."""
    table = Table("metadata", "value", box=None, pad_edge=False)
    for name, value in sample.meta.items():
        if name == "packets":
            listed = sample.info is not None and sample.info.packets is not None
            said = "listed, and used for decoding" if listed else "listed, but damaged or of another video: not used"
        elif name in _LISTS and isinstance(value, list):
            said = f"{_LISTS[name]} ({len(value):,}): {', '.join(map(str, value[:8]))}{', …' if len(value) > 8 else ''}"
        else:
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(Text(shown(name, 60)), Text(shown(said, 200)))
    if not sample.meta:
        table.add_row("", "none" if "json" not in sample.members else "damaged")
    return table


def _frames(clip: SeenClip) -> Table:
    table = Table("place", "stream", "frame", "second", "", box=None, pad_edge=False)
    for column in (0, 2, 3):
        table.columns[column].justify = "right"
    keys = set(clip.info.key_frames)
    for k, frame in enumerate(clip.frame_index):
        notes = ["key frame"] * (frame in keys) + ["filled up, the clip is too short"] * (not clip.valid[k])
        stream = "fast" if clip.stream[k] else "slow"
        table.add_row(str(k + 1), stream, str(frame), f"{clip.frame_time[k]:.3f}", ", ".join(notes))
    return table


def _say(console: Console, sentence: str, style: str = "") -> None:
    console.print(Text(sentence, style), soft_wrap=True)
