"""`framestream bench`: how long things take, side by side in one process, as medians and ratios.

Absolute times on a shared machine mean little; the ratio of two things measured in turn, round after round, means
something.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from framestream.pipeline.errors import ConfigError

from .bench_attention import attention
from .bench_loader import MEASURES
from .bench_masks import masks
from .bench_packing import packing
from .bench_picture import draw_bars
from .bench_rollout import rollout
from .bench_rows import Row
from .bench_step import training_step
from .bench_table import print_rows
from .cores import usable_cores


def bench(
    name: Literal[
        "decode",
        "loader",
        "shard",
        "assign",
        "masks",
        "attention",
        "packing",
        "step",
        "rollout",
        "scaling",
        "order",
        "workers",
        "resume",
    ],
    *,
    output: str = "runs/bench",
    repeats: int | None = None,
    videos: str | None = None,
    seconds: list[int] = [],  # noqa: B006 - never changed; empty stands for what the help says
    gops: list[int] = [],  # noqa: B006
    heights: list[int] = [],  # noqa: B006
    short_side: int = 224,
    workers: list[int] = [1, 2],  # noqa: B006
    threads: int = 1,
    device: str = "cpu",
    tokens: list[int] = [4096, 8192],  # noqa: B006
    rows: int = 1_000_000,
) -> int:
    """Measure this machine: medians over repeats, candidates side by side in one process.

    decode      16 frames (8 slow, 8 fast) of one clip on one thread, by framestream, Decord, PyAV and, where it is
                installed, TorchCodec, next to the lower limit: libavcodec on exactly the packets needed and one
                conversion per wanted frame. Everybody's frames are compared, and wrong ones are marked.
    loader      whole loaders, clips per second: framestream on converted shards (short side 256, a key frame every
                16 frames) and on the files as they are, and WebDataset with Decord decoding everything, or only the
                wanted frames.
    shard       `framestream shard` encoding, copying whole files and cutting at key frames, against the ffmpeg command
                line on the same work and Python's tarfile.
    assign      planning a million probed inputs: time and peak memory, in a process of its own.
    masks       FrameMask.block_mask against torch's create_block_mask, for an equal result: time, peak memory, batches.
    attention   forward and backward under every frame mask by key ranges, against a dense boolean mask and unmasked
                attention: time and peak memory; `ideal` is unmasked time multiplied by the share of token pairs that
                may attend.
    packing     the predictor over clips of 16, 12, 8 and 5 frames: padded to the longest, and packed in one sequence.
    step        a training step of the module against the usual design (a TransformerDecoder under a dense mask, with
                and without a mask on its memory): time, peak memory, and how many frames the last one reaches.
    rollout     generating 16 frames from a cache, against computing everything again for each.
    scaling     operations and peak memory of a training step by formula and as measured, and tokens per second, for
                four sizes.
    order       how well windows of shards shuffle, against a full shuffle.
    workers     an epoch with the loader's own workers, against torch's DataLoader; and what checksums cost.
    resume      opening 10 and 10,000 shards, and the first batch after a resume at the start and at 99 % of an epoch.

    Prints tables and writes OUTPUT/NAME.json and OUTPUT/NAME.png. decode and loader take about a quarter of an hour
    each; they make their clips on the first run, which takes some minutes more, and keep them in OUTPUT/clips. The
    JSON has every single time, and the reason where a candidate is missing.

    Examples:
        framestream bench decode
        framestream bench decode --seconds 10 --heights 360
        framestream bench decode --videos ~/videos
        framestream bench loader --videos ~/videos --workers 4 8

    Args:
        name: what to measure.
        output: folder for the results, and for generated clips and shards.
        repeats: rounds; each candidate runs once per round (decode-everything less often, on long clips). Default
            5 for decode and loader, else 7.
        videos: decode and loader measure every video in this folder (the loader the first 16) in place of generated
            clips; files that cannot be decoded are listed with the reason.
        seconds: lengths of generated clips; default 2 10 60, for the loader 10 60.
        gops: frames between key frames of generated clips; default 16 250, for the loader 250.
        heights: of generated clips; default 360 1080, for the loader 360.
        short_side: pixels of the shorter side of the frames that decode and loader give.
        workers: numbers of worker processes that the loader is measured with.
        threads: threads of PyTorch in this process.
        device: cpu or cuda, for masks, attention, packing, step, rollout and scaling.
        tokens: sequence lengths, 16 frames of tokens/16 patches, for masks, attention, packing, step and rollout.
        rows: inputs of the plan for assign.
    """
    folder = _checked(output, repeats, threads, device, tokens)
    if rows < 1:
        raise ConfigError(f"rows is {rows}, it has to be at least 1.")
    _check_clips(name, videos, seconds, gops, heights, short_side, workers)
    torch.set_num_threads(threads)
    if name == "decode":
        from .bench_decode import bench_decode

        repeats = repeats or 5
        facts = bench_decode(folder, repeats, videos, seconds, gops, heights, short_side)
    elif name == "loader":
        from .bench_throughput import bench_throughput

        repeats = repeats or 5
        facts = bench_throughput(folder, repeats, videos, seconds, gops, heights, short_side, workers)
    elif name == "shard":
        from .bench_shard import bench_shard

        repeats = repeats or 3
        facts = bench_shard(folder, repeats, workers=max(workers))
    elif name == "assign":
        from .bench_assign import bench_assign

        repeats = 1
        facts = bench_assign(rows)
    else:
        repeats = repeats or 7
        facts = _small(name, folder, repeats, device, tokens)
    result = {
        "bench": name,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "cores": usable_cores(),
        "versions": _versions(),
        "repeats": repeats,
        **facts,
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    pictures = [path for path in (folder / f"{name}.png",) if path.exists()]
    print(*(folder / f"{name}.json", *pictures), sep=", ")
    return 0


def _small(name: str, folder: Path, repeats: int, device: str, tokens: list[int]) -> dict[str, Any]:
    if name in MEASURES:
        rows = MEASURES[name](repeats)
    elif name == "scaling":
        from .bench_scaling import scaling

        rows = scaling(repeats, device)
    else:
        measures: dict[str, Callable[[int, int, str], list[Row]]] = {
            "masks": masks,
            "attention": attention,
            "packing": packing,
            "step": training_step,
            "rollout": rollout,
        }
        rows = [row for n in tokens for row in measures[name](n, repeats, device)]
    print_rows(name, rows)
    draw_bars(rows, folder / f"{name}.png", log=name == "masks")
    return {"rows": [vars(row) for row in rows]}


def _checked(output: str, repeats: int | None, threads: int, device: str, tokens: list[int]) -> Path:
    if (repeats is not None and repeats < 1) or min(tokens, default=0) < 16:
        raise ConfigError("bench needs at least one repeat, and sequence lengths of at least 16 tokens.")
    if threads < 1:
        raise ConfigError(f"threads is {threads}, it has to be at least 1.")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, it has to be cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch finds no CUDA device here; use --device cpu.")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"output {folder} cannot be made ({err.strerror or err}); name another folder.") from err
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"output {folder} cannot be written to; name another folder.")
    return folder


def _check_clips(
    name: str,
    videos: str | None,
    seconds: list[int],
    gops: list[int],
    heights: list[int],
    short_side: int,
    workers: list[int],
) -> None:
    if (videos or seconds or gops or heights) and name not in ("decode", "loader"):
        raise ConfigError(f"videos, seconds, gops and heights are settings of decode and loader, not of {name}.")
    if videos and (seconds or gops or heights):
        raise ConfigError("seconds, gops and heights describe generated clips; leave them out with videos.")
    if min([*seconds, *gops], default=1) < 1:
        raise ConfigError("seconds and gops have to be at least 1.")
    if any(height % 2 or not 64 <= height <= 4320 for height in heights):
        raise ConfigError("heights have to be even, from 64 to 4320.")
    if not 16 <= short_side <= 4096:
        raise ConfigError(f"short_side is {short_side}, it has to be from 16 to 4096.")
    if not workers or not all(1 <= count <= 256 for count in workers):
        raise ConfigError("workers have to be from 1 to 256.")


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("av", "decord", "torchcodec", "webdataset", "torchvision"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
