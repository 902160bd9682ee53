"""`framestream shard`: its arguments, its progress bar, its summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from framestream.pipeline.errors import FramestreamError

from .clips import Cutting
from .shard_run import REJECTS_FILE, Progress, ShardOptions, ShardReport, build_shards
from .transcode import Encoding

__all__ = ["Cutting", "Encoding", "ShardOptions", "ShardReport", "build_shards", "progress_bar", "shard", "summary"]


def shard(
    inputs: list[str],
    output: str,
    *,
    workers: int = 0,
    samples_per_shard: int = 256,
    prefix: str = "clips",
    clip_seconds: float | None = None,
    clip_stride_seconds: float | None = None,
    transcode: Literal["auto", "always", "never"] = "auto",
    short_side: int | None = None,
    fps: float | None = None,
    gop: int = 16,
    crf: int = 20,
    val_tail: float = 0.0,
    val_gap: float = 0.0,
    timeout_seconds: float = 600.0,
    overwrite: bool = False,
) -> int:
    """Turn videos into WebDataset shards: tars of clips with their metadata, checked, indexed and reproducible.

    Inputs are video files (mp4 m4v mov mkv webm avi ts), folders (searched through), globs, and manifests: CSV,
    JSONL or Parquet with a column `path` and, as you like, `text`, `key`, `split`, `start` and `end` (seconds);
    all other columns are kept as the sample's `user` metadata. A file `video.txt` beside `video.mp4` is its text.

    Every input is accounted for in OUTPUT/report.json: it became samples, was rejected (OUTPUT/rejects.jsonl says
    why) or was dropped by a rule. The same inputs and options give the same bytes with any number of workers. Kill
    the command at any moment and run it again: it goes on behind the last whole shard.

    Examples:
        framestream shard ~/videos --output shards
        framestream shard ~/videos --output shards --clip-seconds 4 --short-side 256 --val-tail 0.1 --val-gap 2
        framestream shard clips.csv --output shards --transcode always --gop 8 --workers 4

    Args:
        inputs: video files, folders, globs or manifests.
        output: the folder to write to; with splits each has a folder inside.
        workers: processes; 0 takes one per CPU core.
        samples_per_shard: samples in one tar.
        prefix: tars are named PREFIX-000000.tar and so on.
        clip_seconds: cut every video into clips of so many seconds; a rest shorter than half a clip is dropped.
        clip_stride_seconds: distance of the clips' beginnings; less than clip_seconds lets them overlap.
        transcode: encode clips anew as H.264 without sound; auto does so where a clip is a part of a file or
            short_side or fps is given, and copies whole files as they are.
        short_side: pixels of the shorter side of encoded clips; smaller videos keep their size.
        fps: frames per second of encoded clips; default as in the source, variable rates included.
        gop: frames from one key frame to the next; short ones make reading single frames cheap.
        crf: quality of encoded clips, 0 (lossless) to 51; 18 to 24 is usual.
        val_tail: share of every video, at its end, that is held out: OUTPUT/train and OUTPUT/val are written.
        val_gap: seconds before the held-out part that are used for neither.
        timeout_seconds: a clip whose worker takes longer is rejected.
        overwrite: remove what an earlier run with other options or inputs left in OUTPUT.

    Returns:
        Exit code: 0 when every input is accounted for, 2 when the command cannot be done as asked.
    """
    from rich.console import Console

    console = Console(stderr=True)
    began = time.monotonic()
    try:
        options = ShardOptions(
            samples_per_shard,
            prefix,
            Cutting(clip_seconds, clip_stride_seconds, val_tail, val_gap),
            transcode,
            Encoding(short_side, fps, gop, crf),
        )
        with progress_bar(console) as progress:
            report = build_shards(
                inputs,
                output,
                options,
                workers=workers,
                timeout_s=timeout_seconds,
                overwrite=overwrite,
                progress=progress,
            )
    except FramestreamError as err:
        print(f"framestream shard: {err}", file=sys.stderr)
        return 2
    for line in summary(report, output):
        print(line)
    print(f"took {time.monotonic() - began:.1f} s")
    return 0


def summary(report: ShardReport, output: str | Path) -> list[str]:
    """The report in a few lines."""
    inputs, clips = report.inputs, report.clips
    lines = [
        f"{inputs['found']} inputs: {inputs['used']} used, {inputs['rejected']} rejected, "
        f"{sum(inputs['dropped'].values())} dropped{_by_rule(inputs['dropped'])}",
        f"{clips['planned']} clips: {clips['written']} written, {clips['rejected']} rejected; "
        f"{sum(clips['dropped'].values())} dropped before{_by_rule(clips['dropped'])}",
    ]
    for split, facts in report.splits.items():
        where = Path(output, split)
        size = facts["bytes"] / 1e6
        lines.append(
            f"{where}: {facts['samples']} samples, {facts['seconds']:.1f} s, in {facts['shards']} shards, {size:.1f} MB"
        )
    if report.rejects:
        first = report.rejects[0]
        lines.append(f"rejects are listed in {Path(output, REJECTS_FILE)}; the first is {first['source']}:")
        lines.append(f"  {first['reason']}")
    if not clips["written"]:
        lines.append("no sample was written")
    return lines


def _by_rule(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{n} {rule}' for rule, n in counts.items())})" if counts else ""


@contextmanager
def progress_bar(console: Any, counted: str = "rejected") -> Iterator[Progress]:
    """A bar per step with rate, time left and the number of things `counted`."""
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "-/s")

    columns = [TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()]
    with Bar(*columns, TextColumn(f"{{task.fields[rejects]}} {counted}"), console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int, rejects: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total, rejects=0)
            bar.update(tasks[step], completed=done, total=total, rejects=rejects)

        yield show
