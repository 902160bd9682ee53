"""The turnkey loader: every setting of a run in one call, checked before any work begins."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from .batches import BatchMaker, RankBatches
from .cache import DEFAULT_CACHE_BYTES
from .clip_loader import ClipLoader
from .collate import ClipCollator, Normalize
from .data_source import open_data
from .dataset import ClipSource
from .decode import GPU_BACKENDS, choose_backend
from .errors import ConfigError
from .health import Health
from .layout import PositionKind
from .layout import patches_per_frame as patches_of
from .masks import Rule
from .packing import check_clip_fits
from .sampling import Sampling
from .shard_paths import ShardsArgument
from .shards import ShardSet
from .transforms import ClipTransform, Crop, FrameHook

#: Threads that decode for a GPU reader. One reader keeps one video engine busy for a part of its time only, because it
#: parses, copies and resizes in between; cards have 1 to 8 engines (`framestream doctor` shows how many), and a thread
#: more than that costs the memory of one clip.
GPU_DECODE_THREADS = 4

#: Requests that a worker may have in hand; they have to fit into the buffer of its socket.
MAX_PREFETCH = 64

DecodeOn = Literal["auto", "workers", "trainer"]


def build_loader(
    shards: ShardSet | ShardsArgument | Mapping[str, Any],
    *,
    sampling: Sampling | Mapping[str, Any],
    patches_per_frame: int | tuple[int, int],
    batch_size: int,
    image_size: int = 224,
    crop: Crop = "center",
    mask: str | Rule = "time_causal",
    window_size: int = 3,
    position_ids: PositionKind = "source",
    normalize: Normalize | None = None,
    block_mask: bool = False,
    pack_to: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    window_shards: int = 4,
    random_end: bool = False,
    transform: FrameHook | None = None,
    fields: Sequence[str] = (),
    drop_last: bool = True,
    decoder: str = "auto",
    decode_on: DecodeOn = "auto",
    decode_threads: int | None = None,
    timeout_s: float = 30.0,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    checksums: bool = True,
    epoch_samples: int | None = None,
    max_reject_share: float = 0.05,
    rejects_path: str | Path | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    device: torch.device | str | None = None,
    attention_backend: str = "auto",
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> ClipLoader:
    """Build the loader of a training or evaluation run.

    Args:
        shards: folder, tar, list, glob, brace pattern, URL, or a `ShardSet`; or a mixture of datasets,
            `{"films": {"shards": …, "weight": 3}, "cooking": {"shards": …, "weight": 1}}`.
        sampling: which frames of a clip; an object, or a mapping as `make_sampling` takes it.
        patches_per_frame: tokens per frame, or a pair (slow, fast).
        batch_size: clips per batch and rank.
        image_size, crop, random_end, transform, fields, timeout_s, checksums: see `ClipTransform`.
        mask, window_size, position_ids, normalize, block_mask: see `ClipCollator`.
        pack_to: tokens of a sequence into which the clips of a batch are packed, several in one; see `ClipCollator`.
            It has to hold the longest clip that `sampling` can give. The samples of a batch stay the same.
        num_workers: worker processes; 0 works in the training process. Workers live from the first loop to
            `close()`, and the stream does not depend on their number. One that dies of a clip, or is not done with
            planning and decoding it within 3 x `timeout_s`, is replaced and costs that clip.
        seed: seed of order, spares and random choices.
        shuffle: False gives the stored order.
        window_shards: shards whose samples are mixed with each other, see `SampleOrder`.
        drop_last: leave out the samples that do not fill the last global batch. False spreads them over the
            ranks; a rank left without any repeats one, marked `meta["padding"]`.
        decoder: backend name, or "auto": the GPU's where there is one, else the exact CPU decoder.
        decode_on: "workers", or "trainer": workers read and plan, and threads of the training process decode and
            transform, two batches ahead. "auto" takes the trainer for GPU decoders. Same stream.
        decode_threads: threads that decode where the training process does. Default 4 for GPU decoders, so that
            several video engines are at work, and 1 for those of the CPU, for which workers are the better way. More
            than 1 call the `transform` hook from several threads at once. Same stream for any number.
        storage_options: for remote shards, handed to fsspec.
        cache_dir: where remote shards and their indexes are kept.
        cache_bytes: limit of what is kept of remote shards; two windows should fit.
        epoch_samples: samples that make an epoch of a mixture; default as many as all its datasets hold.
        max_reject_share: share of rejected samples above which the run stops, applied from 100 samples on. Also the
            share of samples that shards may lack by their index, as after a cut, applied here; 1 accepts all.
        rejects_path: JSON Lines file to which rejected samples are appended, and shards that lack samples.
        rank, world_size: default to torch.distributed where it is initialised, else to the environment variables
            RANK and WORLD_SIZE, else to 0 of 1.
        device: where the model runs, default the current GPU where there is one. `frame_mask` is prepared for it
            and for `attention_backend` before a batch is handed out.
        attention_backend: see `frame_attention`.
        pin_memory: put batches into page-locked memory; without an accelerator it has no effect.
        prefetch_factor: batches that each worker keeps ready.
        multiprocessing_context: start method of the workers, e.g. "spawn".

    Raises:
        ConfigError: an impossible or unknown setting, all of them checked here.
        ShardError: there are no shards, one cannot be indexed, or more samples are lost than `max_reject_share` allows.
    """
    rank, world_size = _place(rank, world_size)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed is {seed!r}; it must be a whole number.")
    _check_count("batch_size", batch_size, 1)
    _check_count("num_workers", num_workers, 0)
    _check_count("prefetch_factor", prefetch_factor, 1)
    if prefetch_factor > MAX_PREFETCH:
        raise ConfigError(
            f"prefetch_factor is {prefetch_factor}, at most {MAX_PREFETCH} make sense: each is a batch in memory."
        )
    _check_count("window_shards", window_shards, 1)
    _check_count("cache_bytes", cache_bytes, 1)
    if epoch_samples is not None:
        _check_count("epoch_samples", epoch_samples, 1)
    _check_choice("multiprocessing_context", multiprocessing_context, (None, *multiprocessing.get_all_start_methods()))
    _check_choice("decode_on", decode_on, ("auto", "workers", "trainer"))
    if decode_threads is not None:
        _check_count("decode_threads", decode_threads, 1)
        if decode_on == "workers":
            raise ConfigError(
                f"decode_threads={decode_threads} does nothing with decode_on='workers', each of which decodes in one "
                "thread; use num_workers, or decode_on='trainer'."
            )
    _check_choice("attention_backend", attention_backend, ("auto", "flex", "ranges", "dense"))
    device = _device(device)
    backend, _ = choose_backend(decoder, device.type)
    decode = _decodes_in_workers(decode_on, backend)
    collate = ClipCollator(
        patches_per_frame=patches_per_frame,
        mask=mask,
        window_size=window_size,
        position_ids=position_ids,
        normalize=normalize,
        block_mask=block_mask,
        pack_to=pack_to,
    )
    clip_transform = ClipTransform(
        sampling,
        image_size=image_size,
        crop=crop,
        decoder=backend,
        random_end=random_end,
        transform=transform,
        seed=seed,
        fields=fields,
        timeout_s=timeout_s,
        checksums=checksums,
        # A GPU reader that was chosen here, and not by name, leaves to the CPU what the hardware cannot decode.
        fallback="pyav" if decoder == "auto" and backend in GPU_BACKENDS else None,
    )
    if pack_to is not None:
        tokens = patches_of(collate.patches_per_frame, clip_transform.sampling.streams().tolist())
        check_clip_fits(sum(tokens), pack_to, f"A clip of {len(tokens)} frames, as `sampling` gives them,")
    health = Health(max_reject_share, rejects_path)
    source = open_data(
        shards,
        seed=seed,
        shuffle=shuffle,
        window_shards=window_shards,
        epoch_samples=epoch_samples,
        storage_options=storage_options,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
    lost = [shard for each in source.sets for shard in each.lost]
    health.lose(lost, sum(each.num_samples for each in source.sets), write=rank == 0)
    global_batch = batch_size * world_size
    if drop_last and len(source.order) < global_batch:
        raise ConfigError(
            f"batch_size={batch_size} on {world_size} rank(s) needs {global_batch} samples, but there are "
            f"{len(source.order)}, so an epoch would be empty; use a smaller batch_size or drop_last=False."
        )
    maker = BatchMaker(ClipSource(source.sets, source.order, clip_transform, source.names), collate, decode=decode)
    if num_workers:
        _check_start_method(multiprocessing_context, maker)
    return ClipLoader(
        maker,
        RankBatches(len(source.order), global_batch, rank, world_size, drop_last),
        health,
        device=device,
        attention_backend=attention_backend,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        start_method=multiprocessing_context,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        decode_threads=decode_threads or (GPU_DECODE_THREADS if backend in GPU_BACKENDS else 1),
        fingerprint={
            **source.identity,
            "samples": len(source.order),
            "sampling": _described(clip_transform.sampling),
            "global_batch": global_batch,
            "order": f"shuffled, windows of {window_shards} shards" if shuffle else "stored",
            "drop_last": drop_last,
            "random_end": random_end,
        },
    )


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank is {rank} and world_size is {world_size}; give both or neither.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            names = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
            try:
                rank, world_size = (int(value) for value in names.values())
            except ValueError as err:
                raise ConfigError(f"The environment has {names}; RANK and WORLD_SIZE must be numbers.") from err
            if world_size > 1 and "RANK" not in os.environ:
                raise ConfigError(
                    f"The environment has WORLD_SIZE={world_size} and no RANK, so every process would take the rows of "
                    "the first; give rank and world_size, or build the loader after the process group."
                )
    _check_count("world_size", world_size, 1)
    _check_count("rank", rank, 0)
    if rank >= world_size:
        raise ConfigError(f"rank is {rank} of world_size {world_size}; it must be from 0 to {world_size - 1}.")
    return rank, world_size


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as err:
        raise ConfigError(f"device is {device!r}, which torch does not know; use e.g. 'cpu' or 'cuda:0'.") from err


def _decodes_in_workers(decode_on: str, backend: str) -> bool:
    if decode_on == "workers" and backend in GPU_BACKENDS:
        raise ConfigError(
            f"decode_on='workers' does not go with the decoder {backend!r}, because worker processes cannot share "
            "the GPU; use decode_on='trainer' or decoder='pyav'."
        )
    return decode_on == "workers" or (decode_on == "auto" and backend not in GPU_BACKENDS)


def _check_start_method(context: str | None, maker: BatchMaker) -> None:
    method = context or multiprocessing.get_start_method()
    if method == "fork":
        return
    try:
        pickle.dumps(maker)
    except (pickle.PicklingError, AttributeError, TypeError) as err:
        raise ConfigError(
            f"Workers started by {method!r} need `transform`, `mask` and `sampling` to be picklable, and one is not "
            f"({err}); define it at the top level of a module."
        ) from err


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; valid values are {', '.join(map(str, choices))}.")


def _described(sampling: Sampling) -> str:
    text = repr(sampling).replace(", slow_snap=None", "")  # as it was described before there was this
    # The default repr holds an address, which differs from run to run.
    return type(sampling).__qualname__ if " at 0x" in text else text
