"""`framestream shard`: its arguments, what it says meanwhile, its summary."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from framestream.pipeline.errors import ConfigError, FramestreamError
from framestream.pipeline.remote import Remote

from .dry_run import dry_run as forecast
from .engines import EngineName
from .inputs import by_extension
from .progress import Output, reporting
from .progress_pace import in_words
from .set_files import REJECTS_FILE
from .shard_job import Part, Unfinished
from .shard_options import Audio, Codec, Cutting, Decode, Encoding, Filters, ShardOptions, Transcode
from .shard_report import ShardReport
from .shard_run import build_shards, run, shard_job

__all__ = ["Cutting", "Encoding", "Filters", "ShardOptions", "ShardReport", "build_shards", "shard", "summary"]


def shard(
    inputs: list[str],
    output: str,
    *,
    workers: int = 0,
    samples_per_shard: int = 256,
    megabytes_per_shard: float | None = None,
    prefix: str = "clips",
    clip_seconds: float | None = None,
    clip_stride_seconds: float | None = None,
    scene_threshold: float | None = None,
    transcode: Transcode = "auto",
    short_side: int | None = None,
    fps: float | None = None,
    gop: int = 16,
    codec: Codec = "h264",
    crf: int = 20,
    audio: Audio = "auto",
    min_seconds: float | None = None,
    max_seconds: float | None = None,
    min_side: int | None = None,
    max_side: int | None = None,
    min_fps: float | None = None,
    max_fps: float | None = None,
    drop_duplicates: bool = False,
    decode: Decode = "first",
    val_share: float = 0.0,
    val_tail: float = 0.0,
    val_gap: float = 0.0,
    timeout_seconds: float = 600.0,
    dry_run: bool = False,
    overwrite: bool = False,
    engine: EngineName = "local",
    ray_address: str | None = None,
    plan_only: bool = False,
    part: str | None = None,
    storage_options: str | None = None,
    work: str | None = None,
    reject_unfetched: bool = False,
    log: Output = "auto",
) -> int:
    """Turn videos into WebDataset shards: tars of clips with their metadata, checked, indexed and reproducible.

    Inputs are video files (mp4 m4v mov mkv webm avi ts), folders (searched through), globs, and manifests: CSV,
    JSONL or Parquet with a column `path` and, as you like, `text`, `key`, `split`, `start` and `end` (seconds);
    all other columns are kept as the sample's `user` metadata. A file `video.txt` beside `video.mp4` is its text.
    Inputs and OUTPUT may be URLs that fsspec knows, such as s3://bucket/videos.

    First every source is probed, and a plan says which clip goes into which shard; then the shards are made, each on
    its own. Every input is accounted for in OUTPUT/report.json: it became samples, was rejected (OUTPUT/rejects.jsonl
    says why), or was filtered out or is a duplicate (OUTPUT/left_out.jsonl). The same inputs and options give the same
    bytes with any number of workers and on any engine. Kill the command at any moment and run it again: it goes on.

    Examples:
        framestream shard ~/videos --output shards
        framestream shard ~/videos --output shards --clip-seconds 4 --short-side 256 --val-share 0.05
        framestream shard captions.parquet --output s3://bucket/shards --short-side 256 --min-seconds 2 --dry-run
        framestream shard s3://bucket/videos --output /mnt/shared/shards --plan-only
        framestream shard s3://bucket/videos --output /mnt/shared/shards --part 3/64

    Args:
        inputs: video files, folders, globs or manifests.
        output: the folder to write to; with splits each has a folder inside.
        workers: processes; 0 takes one per CPU core (on Ray: tasks at a time, 0 for all that the cluster can do).
        samples_per_shard: samples in one tar, at most.
        megabytes_per_shard: begin a new tar where the next clip would make it larger than so many MB; clips that are
            encoded anew are counted by their share of the source file.
        prefix: tars are named PREFIX-000000.tar and so on.
        clip_seconds: cut every video into clips of so many seconds; a rest shorter than half a clip is dropped.
        clip_stride_seconds: distance of the clips' beginnings; less than clip_seconds lets them overlap.
        scene_threshold: also cut where the picture changes by more than this share, 0 to 1; 0.3 finds most hard cuts.
        transcode: encode clips anew: auto does so where a clip is a part of a file or short_side or fps is given, and
            copies whole files as they are; never cuts at key frames and copies.
        short_side: pixels of the shorter side of encoded clips; smaller videos keep their size.
        fps: frames per second of encoded clips; default as in the source, variable rates included.
        gop: frames from one key frame to the next; short ones make reading single frames cheap.
        codec: of encoded clips.
        crf: quality of encoded clips on the codec's own scale, from 0 (best); 18 to 24 is usual for h264.
        audio: auto leaves the sound of files that are copied whole, and no other; keep and drop do so for all clips.
        min_seconds: shorter videos (or parts that a manifest names) are filtered out.
        max_seconds: longer ones are filtered out.
        min_side: videos whose shorter side has fewer pixels are filtered out.
        max_side: videos whose shorter side has more pixels are filtered out.
        min_fps: videos with fewer frames per second are filtered out.
        max_fps: videos with more frames per second are filtered out.
        drop_duplicates: of videos with the same encoded pictures, in any container and under any name, keep the first.
        decode: what of each source is decoded to find the broken ones, before it is taken: its first frame, all frames,
            or none. The container and every packet in it are looked at in any case.
        val_share: share of the videos that are held out, chosen by a hash of their names: OUTPUT/train and OUTPUT/val
            are written, and adding videos later moves none from one to the other.
        val_tail: share of every video, at its end, that is held out instead.
        val_gap: seconds before such a held-out end that are used for neither.
        timeout_seconds: a clip whose worker takes longer is rejected.
        dry_run: say what would happen, estimate size and time from a sample, and write nothing.
        overwrite: remove what an earlier run with other options or inputs left in OUTPUT.
        engine: processes of this machine, or a Ray cluster (pip install 'framestream[ray]').
        ray_address: of the cluster; default: RAY_ADDRESS, a cluster that runs here, or a new one on this machine.
        plan_only: end when the plan is made.
        part: I/N makes every N-th shard, from the I-th on, of a plan that is there; the part that finds all shards made
            writes the index and the report. Parts run at the same time, on any machines that reach OUTPUT.
        storage_options: for the fsspec file systems, as JSON: '{"anon": true}'.
        work: folder for the plans of remote OUTPUTs while they are built; default in framestream's cache.
        reject_unfetched: count what the storage does not give, after many tries, as rejected; without, the command ends
            with exit code 1 when all else is done, and tries these again the next time.
        log: a bar on terminals and lines elsewhere (auto), bar, plain lines, json lines, or quiet.

    Returns:
        Exit code: 0 every input is accounted for, or the plan or part is made; 1 storage failed, the same command goes
        on; 2 the command cannot be done as asked; 130 stopped by Ctrl-C, the same command goes on.
    """
    began = time.monotonic()
    with reporting("shard", log) as reporter:
        try:
            options = ShardOptions(
                samples_per_shard,
                None if megabytes_per_shard is None else round(megabytes_per_shard * 1e6),
                prefix,
                Cutting(clip_seconds, clip_stride_seconds, scene_threshold, val_tail, val_gap),
                Filters(min_seconds, max_seconds, min_side, max_side, min_fps, max_fps),
                transcode,
                Encoding(short_side, fps, gop, crf, codec, audio),
                val_share,
                drop_duplicates,
                decode,
            )
            share = None if part is None else Part.parse(part)
            if sum((dry_run, plan_only, part is not None)) > 1 or (overwrite and (dry_run or part is not None)):
                raise ConfigError(
                    "dry_run, plan_only and part exclude each other, and only a whole run or a plan can overwrite"
                )
            stored = _storage(storage_options)
            if dry_run:
                remote = Remote(stored)
                expected = forecast(
                    inputs, options, workers=workers, timeout_s=timeout_seconds, remote=remote, progress=reporter.step
                )
                reporter.end(expected.lines(), expected.to_json())
                return 0
            job = shard_job(
                output,
                options,
                engine=engine,
                workers=workers,
                timeout_s=timeout_seconds,
                ray_address=ray_address,
                storage_options=stored,
                work=work,
                reject_unfetched=reject_unfetched,
                progress=reporter.step,
            )
            with job.alone(share):
                result = run(job, inputs, overwrite=overwrite, part=share, plan_only=plan_only)
        except KeyboardInterrupt:
            reporter.error("stopped; what was probed and every finished shard is kept, and the same command goes on")
            return 130
        except (FramestreamError, OSError) as err:
            reporter.error(str(err))
            return 2 if isinstance(err, ConfigError) else 1
        took = time.monotonic() - began
        if isinstance(result, ShardReport):
            reporter.end([*summary(result, output), f"took {in_words(took)}"], {**result.to_json(), "took_s": took})
        else:
            reporter.end(_unfinished(result, output, share), {**result._asdict(), "took_s": took})
    return 0


def _storage(text: str | None) -> dict[str, Any]:
    try:
        options = json.loads(text or "{}")
        if not isinstance(options, dict):
            raise ValueError("it is no object")
        return options
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"storage_options has to be a JSON object such as '{{\"anon\": true}}' ({err})") from err


def _unfinished(result: Unfinished, output: str, part: Part | None) -> list[str]:
    if part is None:
        return [f"the plan has {result.num_shards} shards; make them with the same command, whole or in parts"]
    missing = result.num_shards - result.num_finished
    return [
        f"part {part} is made; {missing} of {result.num_shards} shards in {output} are still missing: the part that is "
        "the last one writes the index and the report"
    ]


def summary(report: ShardReport, output: str) -> list[str]:
    """The report in a few lines."""
    inputs, clips = report.inputs, report.clips
    lines = [
        f"{inputs['found']} inputs: {inputs['sampled']} sampled, {inputs['rejected']} rejected, "
        f"{inputs['filtered']} filtered{_by_rule(report.filtered)}, {inputs['duplicate']} duplicates",
        f"{clips['planned']} clips: {clips['written']} written, {clips['rejected']} rejected; "
        f"{sum(clips['dropped'].values())} dropped before{_by_rule(clips['dropped'])}",
        f"inputs with a text: {report.with_text}",
    ]
    for split, facts in report.splits.items():
        where = "/".join(filter(None, (output.rstrip("/"), split)))
        lines.append(
            f"{where}: {facts['samples']} samples, {facts['seconds']:.1f} s, in {facts['shards']} shards, "
            f"{facts['bytes'] / 1e6:.1f} MB"
        )
    if report.other_files:
        lines.append(f"passed over: {by_extension(report.other_files)}")
    if report.rejects:
        first = report.rejects[0]
        lines.append(f"rejects are listed in {output.rstrip('/')}/{REJECTS_FILE}; the first is {first['source']}:")
        lines.append(f"  {first['reason']}")
    if not clips["written"]:
        lines.append("no sample was written")
    elif empty := [split for split, facts in report.splits.items() if not facts["samples"]]:
        lines.append(f"no clip came into {' or '.join(empty)}: hold out more, or take more videos")
    return lines


def _by_rule(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{n} {rule}' for rule, n in counts.items())})" if counts else ""
