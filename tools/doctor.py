"""`framestream doctor`: what is installed, what this machine can do, and what would be used."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from framestream.pipeline.cache import default_cache_dir
from framestream.pipeline.decode import available_backends, choose_backend
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.video_engine import video_engine

from .results import versions

EXTRAS = {"transformers": "hf", "accelerate": "hf", "s3fs": "s3", "torchcodec": "torchcodec"}


def main(arguments: Sequence[str]) -> int:
    """`framestream doctor [--loader CONFIG [--section.key value …] [--seconds N]]`."""
    parser = argparse.ArgumentParser(
        prog="framestream doctor",
        description="Say what this machine can do: versions, devices, decoders with the reason where one cannot be "
        "used, and what would be chosen. With --loader: run the loader of a training config alone and say what limits "
        "it (read, decode, transform or transfer) and what to change.",
        epilog="Further options override the config, as in `framestream train`: --data.workers 4",
    )
    parser.add_argument("--loader", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to run the loader (default: 20)")
    known, overrides = parser.parse_known_args(list(arguments))
    console = Console(highlight=False, soft_wrap=True)
    if known.loader is None:
        if overrides:
            raise ConfigError(f"doctor does not know {overrides[0]!r}; settings of a config go with --loader CONFIG.")
        return doctor(console)
    from .config import load_config
    from .loader_doctor import examine_config

    return examine_config(load_config(known.loader, overrides), known.seconds, console)


def doctor(console: Console) -> int:
    """Say what this machine can do.

    Returns:
        0, whatever is missing: nothing that is reported as missing is needed.
    """
    table = Table(title="Versions", title_justify="left", show_header=False)
    for name, version in versions().items():
        table.add_row(name, version)
    for name, extra in EXTRAS.items():
        table.add_row(name, escape(_version(name, extra)))
    console.print(table)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print(f"\n[bold]Device[/]: {', '.join(names) if names else 'the CPU; torch sees no CUDA device'}")
    console.print(f"[bold]Video engine[/]: {escape(_video_engine())}")
    console.print(f"[bold]Threads[/]: {torch.get_num_threads()} for torch")

    table = Table(title="\nVideo decoders", title_justify="left", show_header=False)
    for name, reason in available_backends().items():
        table.add_row(name, "[green]usable[/]" if not reason else escape(f"not usable: {reason}"))
    console.print(table)
    chosen, why = choose_backend("auto")
    console.print(f"decoder=auto takes [bold]{chosen}[/]: {escape(why)}")
    attention = "flex (compiled, sparse blocks)" if device == "cuda" else "ranges (each query frame's own keys)"
    console.print(f"attention_backend=auto takes [bold]{attention}[/] here.")

    cache = default_cache_dir()
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    console.print(f"[bold]Cache[/]: {cache}, {shutil.disk_usage(place).free / 1e9:.0f} GB free")
    console.print(f"[bold]Here[/]: {Path.cwd()}, {shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free")
    return 0


def _video_engine() -> str:
    """Whether NVDEC can be used, by itself: whatever the readers say that need it."""
    found = video_engine(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if found.why_not:
        return f"not visible: {found.why_not}"
    count = f"{found.engines} NVDEC" if found.engines else "NVDEC"
    return f"{count}; decodes {', '.join(found.formats)}"


def _version(name: str, extra: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; optional: pip install 'framestream[{extra}]'"
