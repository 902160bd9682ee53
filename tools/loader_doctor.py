"""`framestream doctor --loader CONFIG`: run a config's loader alone, and say what limits it and what to change."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from framestream.model.evaluate import move_batch
from framestream.model.ranks import pick_device
from framestream.pipeline.clip_loader import ClipLoader
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FastSlowSampling, make_sampling
from framestream.pipeline.shard_paths import is_url

from .config import TrainConfig
from .cores import usable_cores
from .loader_advice import STAGES, Examination, advice, limit_of
from .train import build_loaders, build_tower, patches_of


def examine(config: TrainConfig, seconds: float) -> Examination:
    """Run the training loader of a config for some seconds, without a model.

    Raises:
        ConfigError, ShardError: as `framestream train` would.
    """
    device = pick_device(config.train.device)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=None))
    loader, _ = build_loaders(config, _patches(config), device, log_rejects=False)
    try:
        return _run(loader, config, device, seconds)
    finally:
        loader.close()


def _patches(config: TrainConfig) -> int | tuple[int, int]:
    """Tokens per frame, without loading weights. They decide masks and position IDs, which weigh little."""
    tower = config.model.tower
    if tower.kind == "hf":
        return 256
    plain = dataclasses.replace(tower, pretrained=False)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, tower=plain))
    return patches_of(changed, build_tower(changed))


def _run(loader: ClipLoader, config: TrainConfig, device: torch.device, seconds: float) -> Examination:
    before: Mapping[str, float] | None = None
    begun = started = end = time.perf_counter()
    device_s, clips, size, floats = 0.0, 0, 0, False
    gops: list[float] = []
    sides: list[float] = []
    reasons: Counter[str] = Counter()
    warm_up = max(1, 2 * config.data.workers)  # batches: workers start, and what they had ready comes at once
    count = 0
    while end - started < seconds or before is None or not clips:
        for batch in loader:
            arrived = time.perf_counter()
            move_batch(batch, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            end = time.perf_counter()
            count += 1
            if before is None:
                if count >= warm_up or end - begun >= seconds:
                    before, started = loader.stats(), end
                continue
            device_s += end - arrived
            clips += len(batch["keys"])
            size += sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
            floats = batch["video_frames"].is_floating_point()
            for meta in batch["meta"]:
                reasons.update(reject["reason"] for reject in meta.get("rejects", ()))
                try:  # shards of others may mean something else by these names
                    gops.append(meta["num_frames"] / len(meta["key_frames"]))
                    sides.append(float(min(meta["width"], meta["height"])))
                except (KeyError, TypeError, ZeroDivisionError):
                    continue
            del gops[:-1000], sides[:-1000]
            if end - started >= seconds:
                break
    after = loader.stats()
    deltas = {name: after[name] * after["samples"] - before[name] * before["samples"] for name in _MEANS}
    means = {name: max(0.0, total) / clips for name, total in deltas.items()}
    means["device_ms"] = device_s * 1e3 / clips
    hits = after["cache_hits"] + after["cache_misses"]
    sampling = make_sampling(config.sampling())
    shards = config.data.shards
    places = [part["shards"] for part in shards.values()] if isinstance(shards, dict) else [shards]
    return Examination(
        samples=clips,
        seconds=end - started,
        ms={stage: sum(means[name] for name in names) for stage, names in STAGES.items()},
        busy_share=after["worker_busy_share"],
        workers=config.data.workers,
        cores=usable_cores(),
        epoch_batches=len(loader),
        decode_on=loader.decode_on,
        gpu=device.type == "cuda",
        remote=any(is_url(str(place)) for place in places),
        misses=after["cache_misses"] / hits if hits else 0.0,
        gop=statistics.mean(gops) if gops else 0.0,
        short_side=statistics.median(sides) if sides else 0.0,
        could_snap=isinstance(sampling, FastSlowSampling) and sampling.slow_snap is None,
        image_size=config.data.image_size,
        bytes_per_clip=size / clips,
        floats=floats,
        rejects=after["reject_share"],
        restarts=int(after["worker_restarts"]),
        reasons=dict(reasons.most_common(3)),
    )


_MEANS = ("read_ms", "decode_ms", "transform_ms", "collate_ms", "transfer_ms")


def report(seen: Examination, console: Console) -> None:
    """Print what was seen, what limits it and what to change."""
    workers = f"{seen.workers} worker(s)" if seen.workers else "no workers"
    place = "workers" if seen.workers and seen.decode_on == "workers" else "training process"
    console.print(
        f"The loader alone: [bold]{seen.rate:.1f} clips/s[/] ({seen.samples} clips in {seen.seconds:.1f} s; {workers}, "
        f"{seen.cores} core(s), decoding in the {place})"
    )
    table = Table(show_header=True, box=None, pad_edge=False)
    for title, justify in (("stage", "left"), ("ms per clip", "right"), ("share", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    total = sum(seen.ms.values()) or 1.0
    for stage, ms in seen.ms.items():
        table.add_row(stage, f"{ms:.2f}", f"{ms / total:.0%}")
    console.print(table)
    if seen.workers:
        console.print(f"Workers are at work {seen.busy_share:.0%} of the time.")
    for reason, count in seen.reasons.items():
        console.print(f"Rejected, {count} times: {escape(reason)}")
    console.print(f"What limits it: [bold]{limit_of(seen)}[/].")
    for sentence in advice(seen):
        console.print(f"- {escape(sentence)}")


def examine_config(config: TrainConfig, seconds: float, console: Console) -> int:
    """Examine and report; returns 0."""
    if seconds <= 0:
        raise ConfigError(f"seconds is {seconds:g}; it must be positive.")
    console.print(f"Running the loader for {seconds:g} s …")
    report(examine(config, seconds), console)
    return 0
