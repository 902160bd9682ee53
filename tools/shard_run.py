"""Videos to shards, as a function: what `framestream shard` does, for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framestream.pipeline.errors import ShardError
from framestream.pipeline.remote import Remote

from .engines import EngineName, open_engine
from .output import open_output
from .shard_job import Part, Progress, ShardJob, Unfinished
from .shard_options import ShardOptions
from .shard_report import ShardReport

ATTEMPTS = 8  # at anything that storage is asked for: about two minutes, which most outages do not last


def shard_job(
    output: str | Path,
    options: ShardOptions | None = None,
    *,
    engine: EngineName = "local",
    workers: int = 0,
    timeout_s: float = 600.0,
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    work: str | Path | None = None,
    reject_unfetched: bool = False,
    progress: Progress | None = None,
) -> ShardJob:
    """A job that can be run in steps; for the arguments see `build_shards`."""
    remote = Remote(storage_options or {}, attempts=ATTEMPTS)
    return ShardJob(
        open_output(output, remote),
        options or ShardOptions(),
        open_engine(
            engine, workers=workers, timeout_s=timeout_s, ray_address=ray_address, reject_unfetched=reject_unfetched
        ),
        remote,
        progress or (lambda step, done, total, rejects: None),
        work,
        reject_unfetched,
    )


def build_shards(
    inputs: Sequence[str],
    output: str | Path,
    options: ShardOptions | None = None,
    *,
    engine: EngineName = "local",
    workers: int = 0,
    timeout_s: float = 600.0,
    overwrite: bool = False,
    ray_address: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    work: str | Path | None = None,
    reject_unfetched: bool = False,
    progress: Progress | None = None,
) -> ShardReport:
    """Shard `inputs` into `output`. Run again after a kill, it goes on; the result is the same to the byte.

    Args:
        inputs: video files, folders, globs or manifests (CSV, JSONL, Parquet), each a path or an fsspec URL.
        output: a folder or an fsspec URL.
        options: what decides the bytes.
        engine: processes of this machine, or a Ray cluster.
        workers: processes (Ray: tasks at a time); 0 takes one per CPU core.
        timeout_s: a clip that takes longer is rejected.
        overwrite: remove what an earlier run with other options or inputs left in `output`.
        ray_address: of the cluster, as `ray.init` takes it.
        storage_options: passed to the fsspec file systems.
        work: folder for the plans of remote outputs while they are built; default in framestream's cache.
        reject_unfetched: sources that the storage does not give count as rejected; else the run ends with an error when
            all others are done.
        progress: called with the step, how much of it is done, of how much (None: not known yet), and rejects.

    Raises:
        ConfigError: impossible options, no video in the inputs, or an output that belongs to another run.
        StorageError: some sources, or the output, could not be reached; run again to go on.
        ShardError: the output cannot be written.
    """
    job = shard_job(
        output,
        options,
        engine=engine,
        workers=workers,
        timeout_s=timeout_s,
        ray_address=ray_address,
        storage_options=storage_options,
        work=work,
        reject_unfetched=reject_unfetched,
        progress=progress,
    )
    with job.alone():
        report = run(job, inputs, overwrite=overwrite)
    if isinstance(report, Unfinished):
        raise ShardError(f"{output}: shards went missing while they were made; run again")
    return report


def run(
    job: ShardJob, inputs: Sequence[str], *, overwrite: bool = False, part: Part | None = None, plan_only: bool = False
) -> ShardReport | Unfinished:
    """Run a job, or with `plan_only` its first step, or with `part` a share of the shards of a plan that is there.

    Raises: as `build_shards`.
    """
    try:
        if part is not None:
            job.place.fetch()
            plan = job.place.decided()
            job.check(plan)
        else:
            plan = job.plan(inputs, overwrite=overwrite)
        with plan:
            if not plan_only:
                job.write(plan, part)
            return job.finish(plan)
    except OSError as err:
        raise ShardError(
            f"{err.filename or job.output.place}: {err.strerror or err}; run again to go on from here"
        ) from err
    finally:
        job.engine.close()
