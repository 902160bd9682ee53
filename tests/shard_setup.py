"""What the tests of `framestream shard` share: a folder of videos, and looks at what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.shards import RawSample, ShardSet
from framestream.tools.shard_report import ShardReport

from synthetic import make_video, read_indices


def make_folder(folder: Path) -> Path:
    """Three good videos, one in a subfolder with a difficult name, a broken one, and other files."""
    (folder / "sub").mkdir(parents=True)
    make_video(folder / "a.mp4", num_frames=60, size=(96, 64))
    make_video(folder / "b.c d.MOV", num_frames=40, size=(96, 64), audio=True)
    make_video(folder / "sub" / "фильм №1.mkv", num_frames=30, size=(64, 96))
    (folder / "a.txt").write_text("a caption\n")
    (folder / "broken.mp4").write_bytes(b"no video at all" * 50)
    (folder / "notes.md").write_text("notes")
    return folder


def samples(folder: Path) -> list[RawSample]:
    shards = ShardSet.open(folder)
    assert shards.problems == ()
    return [shards.read(*shards.locate(i)) for i in range(shards.num_samples)]


def frames(sample: RawSample) -> list[int]:
    with open_decoder(sample.video, backend="pyav", info=sample.info) as decoder:
        return read_indices(decoder.frames_at(range(decoder.num_frames)))


def tree(folder: Path) -> dict[str, bytes]:
    """All files with their bytes, but for the locks, and for the plan, whose pages may lie in another order."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith((".lock", ".plan.sqlite"))
    }


def adds_up(report: ShardReport) -> None:
    inputs, clips = report.inputs, report.clips
    assert inputs["found"] == sum(inputs[end] for end in ("sampled", "rejected", "filtered", "duplicate"))
    assert inputs["filtered"] == sum(report.filtered.values())
    assert clips["planned"] == clips["written"] + clips["rejected"]
    assert clips["written"] == sum(split["samples"] for split in report.splits.values())


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
