"""Checkpoints: folders that are either whole or not there.

    checkpoints/step-00000200/model.safetensors   trained weights (a frozen tower is not among them)
                              optimizer.pt        optimiser state, tensors and numbers only
                              state.json          step, loader state, best evaluation and of which clips, format version
    checkpoints/best.json                         which step was best, and how good

A checkpoint is written to a temporary folder, every file is fsynced, and one rename makes it visible: a process
killed at any moment leaves the previous checkpoint intact. Nothing read from one executes code.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framestream.pipeline.atomic import atomic_write, fsync
from framestream.pipeline.errors import StateError

from .parallel import share, whole

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, BEST_FILE = "model.safetensors", "optimizer.pt", "state.json", "best.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole or not at all."""
    atomic_write(path, json.dumps(value, indent=1).encode())


def weights_of(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state dict on the CPU, whole also where ranks hold shares of it: then all of them have to call this.

    Args:
        keep: False on ranks that only give their shares; the result is empty.
    """
    # A clone per tensor: safetensors refuses tensors that share memory, and tied weights do.
    found = ((name, _on_cpu(value, keep)) for name, value in module.state_dict().items())
    return {name: value.clone().contiguous() for name, value in found if value is not None}


def optimizer_of(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """The optimiser's state dict, likewise."""
    found = optimizer.state_dict()
    state: dict[Any, dict[str, Any]] = {}
    for index, entry in found["state"].items():
        values = {name: _on_cpu(value, keep) if isinstance(value, Tensor) else value for name, value in entry.items()}
        if keep:
            state[index] = values
    return {**found, "state": state} if keep else {}


def _on_cpu(value: Tensor, keep: bool) -> Tensor | None:
    """One whole tensor at a time is on the device, and on the CPU of those ranks only that keep it."""
    full = whole(value).detach()
    return full.cpu() if keep else None


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write a safetensors file as a whole or not at all, and give its SHA-256."""
    from safetensors.torch import save

    data = save(dict(weights))
    atomic_write(path, data)
    return hashlib.sha256(data).hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON of which nobody knows who wrote it.

    Raises:
        OSError: no such file.
        ValueError: no JSON, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def write_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], state: Mapping[str, Any]
) -> Checkpoint:
    """Write `folder/step-XXXXXXXX` atomically, of what `weights_of` and `optimizer_of` gave.

    Args:
        state: must be JSON and contain `step`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{int(state['step']):08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(dict(weights), temporary / MODEL_FILE)
    torch.save(dict(optimizer), temporary / OPTIMIZER_FILE)
    full_state = {"version": FORMAT_VERSION, **state}
    write_json(temporary / STATE_FILE, full_state)
    for file in temporary.iterdir():
        fsync(file)
    fsync(temporary)
    if final.exists():  # the same step again, after a resume: all but what was evaluated is as it was
        shutil.rmtree(temporary)
        write_json(final / STATE_FILE, full_state)
    else:
        temporary.rename(final)
        fsync(folder)
    return Checkpoint(final, full_state)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Half-written ones carry another name and are not seen."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith(_PREFIX) and path.is_dir())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's state file. StateError when it is not a checkpoint of this format."""
    try:
        state = read_json(path / STATE_FILE)
    except (OSError, ValueError) as err:
        raise StateError(f"{path} is no readable checkpoint ({err}): delete it to go on from the one before.") from err
    version = state.get("version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise StateError(
            f"{path} has checkpoint format {version!r}, this version reads {FORMAT_VERSION}: "
            "resume with the version that wrote it."
        )
    return Checkpoint(path, state)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, or None."""
    paths = list_checkpoints(folder)
    return read_checkpoint(paths[-1]) if paths else None


def load_weights(path: Path, module: nn.Module) -> None:
    """Load `model.safetensors` into `module`; every trainable parameter must be there with its shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path / MODEL_FILE)
        module.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as err:
        raise StateError(f"The weights of {path} do not fit this model: {err}") from err


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's state; tensors and plain numbers only, no code. Sharded parameters take their shares."""
    try:
        saved = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, entry in saved["state"].items():
            saved["state"][index] = {name: share(value, parameters[index]) for name, value in entry.items()}
        optimizer.load_state_dict(saved)
    except pickle.UnpicklingError as err:
        raise StateError(f"The optimiser state of {path} holds more than tensors and numbers, and is refused.") from err
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as err:
        raise StateError(f"The optimiser state of {path} does not fit this model: {err}") from err


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, and what a killed process left behind."""
    best = best_checkpoint(folder)
    keep = set(list_checkpoints(folder)[-keep_last:]) | ({best} if best else set())
    for path in folder.iterdir():
        stale = path.name.startswith(f".{_PREFIX}") or path in set(list_checkpoints(folder)) - keep
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def mark_best(folder: Path, step: int, error_ratio: float) -> None:
    """Remember which step's evaluation was the best so far."""
    write_json(folder / BEST_FILE, {"step": step, "error_ratio": error_ratio})


def forget_best(folder: Path) -> None:
    """Take back `mark_best`, as where what was evaluated has changed."""
    (folder / BEST_FILE).unlink(missing_ok=True)


def best_checkpoint(folder: Path) -> Path | None:
    """Folder of the best evaluated checkpoint, or None when nothing was evaluated yet."""
    try:
        step = int(read_json(folder / BEST_FILE)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path = folder / f"{_PREFIX}{step:08d}"
    return path if path.is_dir() else None
