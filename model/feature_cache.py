"""Embeddings of a frozen tower on disk: what has been encoded once is read instead.

A file is named by the frame's own pixels, so that it is right whatever sampling, crop or decoder the frame comes from:

    folder/TOWER-DTYPE/ab/abcdef….npy      float32 [P, D]

TOWER is a digest of the tower's weights and settings, DTYPE what it computes in (autocast changes its output). Files
are written under another name and renamed; nothing that is read executes code, and a damaged file is encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framestream.pipeline.atomic import TEMP_SUFFIX
from framestream.pipeline.errors import ConfigError

from .towers import FrozenTower

_SETTINGS = ("mean", "std", "strip_cls", "image_size", "patch_size")


class FeatureCache:
    """Reads and keeps the embeddings of single frames.

    Args:
        folder: where they are kept; made where it is missing. Several processes may share it.
        max_bytes: limit of what the folder holds. Nothing is deleted: what no longer fits is encoded each time.
        processes: how many write at the same time, each of which takes its part of the space left.

    Attributes:
        hits, misses: frames that were read, and that were encoded.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int, processes: int = 1) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(f"The feature cache {folder} cannot be made ({err}): give another folder.") from err
        self._space = (max_bytes - _bytes_in(self.folder)) // processes
        self._tower = ""
        self.hits = self.misses = 0

    def encode(self, tower: FrozenTower, frames: Tensor) -> Tensor:
        """What `tower(frames)` gives: `[n, 3, H, W]` to float32 `[n, P, D]` on the frames' device."""
        place = self._place(tower, frames.device)
        paths = [place / name[:2] / f"{name}.npy" for name in map(_digest, frames.cpu())]
        found = [_read(path) for path in paths]
        missing = [i for i, value in enumerate(found) if value is None]
        if tower.tower.grid is None and not missing:
            missing = [0]  # some towers know their rows and columns only after a call
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if missing:
            made = tower(frames if len(missing) == len(frames) else frames[missing])
            for i, value in zip(missing, made.cpu(), strict=True):
                self._write(paths[i], value)
                found[i] = value
            if len(missing) == len(frames):
                return made
        return torch.stack([value for value in found if value is not None]).to(frames.device)

    def _place(self, tower: FrozenTower, device: torch.device) -> Path:
        if not self._tower:
            self._tower = fingerprint(tower.tower)
        on = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else torch.float32
        return self.folder / f"{self._tower}-{str(dtype).removeprefix('torch.')}"

    def _write(self, path: Path, value: Tensor) -> None:
        size = value.numel() * 4 + 128
        if size > self._space:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without fsync: a power cut may cost the file, and then it is encoded anew.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{TEMP_SUFFIX}")
        try:
            with open(temporary, "wb") as file:
                np.save(file, value.numpy(), allow_pickle=False)
            os.replace(temporary, path)
        except OSError:  # a disk without space costs time, not the run
            self._space = 0
            temporary.unlink(missing_ok=True)
            return
        self._space -= size


def fingerprint(tower: nn.Module) -> str:
    """16 hex digits of what a tower's output depends on: its layers, settings, weights and buffers."""
    digest = hashlib.sha256(repr(tower).encode())
    for part in tower.modules():
        config = getattr(part, "config", None)
        settings: dict[str, Any] = {name: getattr(part, name, None) for name in _SETTINGS}
        settings["config"] = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in (*tower.named_parameters(), *tower.named_buffers()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(_raw(value))
    return digest.hexdigest()[:16]


def _raw(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(frame: Tensor) -> str:
    digest = hashlib.blake2b(f"{frame.dtype} {list(frame.shape)}".encode(), digest_size=20)
    digest.update(_raw(frame))
    return digest.hexdigest()


def _read(path: Path) -> Tensor | None:
    try:
        value = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None
    return torch.from_numpy(value) if value.ndim == 2 and value.dtype == np.float32 else None


def _bytes_in(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except OSError:  # renamed by another process in between
                continue
    return total
