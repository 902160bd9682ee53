"""Embeddings of a frozen tower on disk: what has been encoded once is read instead.

A file is named by the frame's own pixels, so that it is right whatever sampling, crop or decoder the frame comes from:

    folder/TOWER-DTYPE/ab/abcdef….emb      magic, P, D, the tower's grid; float32 [P, D]; checksum

TOWER is a digest of the tower's weights and settings, DTYPE what it computes in (autocast changes its output). Files
are written under another name and renamed. Nothing that is read executes code, and what is damaged is encoded anew: the
checksum covers the whole file, so that none needs an fsync.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framestream.pipeline.atomic import TEMP_SUFFIX
from framestream.pipeline.errors import ConfigError

from .geometry import Grid
from .towers import FrozenTower

# Magic, then P, D and rows and columns of the grid (0 and 0 where the tower knows none), little-endian like the body.
_HEAD = struct.Struct("<8sIIII")
_MAGIC = b"FSEMB\0f4"
_CHECKSUM = 16  # bytes of BLAKE2b
_UNFINISHED = re.compile(rf"\.[0-9a-f]{{40}}\.emb\..*{re.escape(TEMP_SUFFIX)}")
_STALE_AFTER = 3600.0  # seconds: a live process renames its file within one
_COUNTS = 20  # how often the folder is counted while a process fills it

# What every module has, and what a call or the module around changes without changing the output.
_NO_SETTINGS = {*vars(nn.Module()), "grid"}


class FeatureCache:
    """Reads and keeps the embeddings of single frames.

    What belongs to a tower is told by the types, settings, weights and buffers of its layers: settings are the numbers,
    strings and bools (and tuples of them) among their attributes, but for `grid`. The tower's code is not looked at,
    nor are other attributes: give a new folder after a change there. A change to weights is seen by torch's count of
    writes and by the first number of each tensor; what is written through `.data` beside that number is not seen. Where
    a call changes an attribute, such as a counter, every call counts as another tower, and nothing is found.

    Args:
        folder: where they are kept; made where it is missing. Several processes may share it.
        max_bytes: limit of what the folder holds. Nothing is deleted: what no longer fits is encoded each time. The
            folder is counted at the start and at each twentieth of the limit that a process writes, so that several
            runs may exceed it by a twentieth each. What killed processes left half-written is deleted then.
        processes: how many of this run write at the same time, each of which takes its part of the space left.

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
        self.max_bytes, self.processes = max_bytes, processes
        self._known: dict[int, tuple[nn.Module, object, str]] = {}  # by id, which the tower held here keeps its own
        self._count()
        self.hits = self.misses = 0

    def encode(self, tower: FrozenTower, frames: Tensor) -> Tensor:
        """What `tower(frames)` gives: `[n, 3, H, W]` to float32 `[n, P, D]` on the frames' device."""
        place = self._place(tower.tower, frames.device)
        paths = [place / name[:2] / f"{name}.emb" for name in map(_digest, frames.cpu())]
        read = [_read(path) for path in paths]
        found = [None if entry is None else entry[0] for entry in read]
        missing = [i for i, value in enumerate(found) if value is None]
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if not missing:
            assert read[0] is not None
            if tower.tower.grid != read[0][1]:  # that of a call with frames of another shape, or of no call yet
                tower.tower.grid = read[0][1]
        else:
            made = tower(frames if len(missing) == len(frames) else frames[missing])
            for i, value in zip(missing, made.cpu(), strict=True):
                self._write(paths[i], value, tower.tower.grid)
                found[i] = value
            if len(missing) == len(frames):
                return made
        return torch.stack([value for value in found if value is not None]).to(frames.device)

    def _place(self, tower: nn.Module, device: torch.device) -> Path:
        state = _state(tower)
        held = self._known.get(id(tower))
        if held is None or held[0] is not tower or held[1] != state:
            held = self._known[id(tower)] = (tower, state, fingerprint(tower))
        on = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else torch.float32
        return self.folder / f"{held[2]}-{str(dtype).removeprefix('torch.')}"

    def _count(self) -> None:
        """Take this process's part of the space that is left."""
        self._space = (self.max_bytes - _swept(self.folder)) // self.processes
        self._until_count = self.max_bytes // (_COUNTS * self.processes)

    def _write(self, path: Path, value: Tensor, grid: Grid | None) -> None:
        size = _HEAD.size + value.numel() * 4 + _CHECKSUM
        if size > self._space:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{TEMP_SUFFIX}")
        head, body = _HEAD.pack(_MAGIC, *value.shape, *(grid or (0, 0))), value.numpy().astype("<f4").tobytes()
        try:
            with open(temporary, "wb") as file:
                file.write(head + body + _checksum(head, body))
            os.replace(temporary, path)
        except OSError:  # a disk without space costs time, not the run
            self._space = 0
            temporary.unlink(missing_ok=True)
            return
        self._space -= size
        self._until_count -= size
        if self._until_count <= 0:
            self._count()


def fingerprint(tower: nn.Module, *, portable: bool = False) -> str:
    """16 hex digits of what a tower's output depends on: its layers, settings, weights and buffers.

    Args:
        tower: one that follows the protocol.
        portable: leave out what the same tower may have otherwise elsewhere: where a model was loaded from and by which
            version of a library, attributes with a name like `_this`, and buffers that are computed instead of saved.
    """
    digest = hashlib.sha256(repr(tower).encode())
    digest.update(repr(_settings(tower, portable)).encode())
    for part in () if portable else tower.modules():
        config = getattr(part, "config", None)
        settings: Any = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    saved = tower.state_dict().keys() if portable else ()
    for name, value in _tensors(tower):
        if portable and name not in saved:
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(_raw(value))
    return digest.hexdigest()[:16]


def _tensors(tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from tower.named_parameters()
    yield from tower.named_buffers()


def _settings(tower: nn.Module, portable: bool = False) -> list[object]:
    found: list[object] = []
    for name, part in tower.named_modules():
        own = sorted(item for item in vars(part).items() if item[0] not in _NO_SETTINGS and _is_plain(item[1]))
        if portable:
            own = [(key, value) for key, value in own if key != "name_or_path" and not key.startswith("_")]
        found.append((name, type(part).__qualname__, own))
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _state(tower: nn.Module) -> object:
    """What changes when the fingerprint may have changed, without reading the weights."""
    versions = [
        # torch counts no writes through `.data`, which the first number of a tensor nearly always shows.
        (value.data_ptr(), 0 if value.is_inference() else value._version, str(value.dtype), _first(value))
        for _, value in _tensors(tower)
    ]
    return _settings(tower), versions


def _first(value: Tensor) -> str:
    return repr(value.detach()[(0,) * value.ndim].item()) if value.numel() else ""


def _raw(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(frame: Tensor) -> str:
    digest = hashlib.blake2b(f"{frame.dtype} {list(frame.shape)}".encode(), digest_size=20)
    digest.update(_raw(frame))
    return digest.hexdigest()


def _checksum(head: bytes, body: bytes | bytearray) -> bytes:
    digest = hashlib.blake2b(head, digest_size=_CHECKSUM)
    digest.update(body)
    return digest.digest()


def _read(path: Path) -> tuple[Tensor, Grid | None] | None:
    """The embeddings `[P, D]` of a file and the grid of their tower; None where it is not there, or damaged."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return None
            magic, patches, dim, rows, columns = _HEAD.unpack(head)
            size = patches * dim * 4
            # Before as much memory is taken as the header says.
            if magic != _MAGIC or os.fstat(file.fileno()).st_size != _HEAD.size + size + _CHECKSUM:
                return None
            body = bytearray(size)
            file.readinto(body)
            if not size or file.read() != _checksum(head, body):
                return None
    except OSError:
        return None
    value = torch.from_numpy(np.frombuffer(body, "<f4").astype(np.float32, copy=False).reshape(patches, dim))
    return value, (rows, columns) if rows else None


def _swept(folder: Path) -> int:
    """Bytes in `folder`, without the files that killed processes left half-written, which are deleted."""
    total, now = 0, time.time()
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            try:
                found = os.stat(path)
                if _UNFINISHED.fullmatch(name) and now - found.st_mtime > _STALE_AFTER:
                    os.unlink(path)
                else:
                    total += found.st_size
            except OSError:  # renamed by another process in between
                continue
    return total
