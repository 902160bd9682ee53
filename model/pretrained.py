"""A trained module as a folder that another program can open: settings and weights, without the tower.

    folder/config.json         the settings of `ReconstructionConfig`, `hidden_size`, a format version, a digest of the
                               tower, so that no other one is taken for it, and the SHA-256 of the weights, so that
                               the files of two saves, one of them killed, are not mixed
           model.safetensors   trained weights

Both are plain values and numbers; nothing that is read here executes code.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from framestream.pipeline.errors import ConfigError, StateError

from .checkpoint import MODEL_FILE, load_weights, read_json, weights_of, write_json, write_weights
from .feature_cache import fingerprint
from .reconstruction_config import ReconstructionConfig

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction

Module = TypeVar("Module", bound="AutoregressiveReconstruction")
CONFIG_FILE = "config.json"
FORMAT_VERSION = 1


def save_pretrained(module: AutoregressiveReconstruction, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, which is made where it is missing.

    Raises:
        ConfigError: `mask` is a function, which a file cannot hold; or `folder` is no folder.
    """
    folder = Path(folder)
    if callable(module.config.mask):
        raise ConfigError(
            "mask is a function, and config.json holds plain values: name a rule of framestream.pipeline.masks, or "
            "leave mask out and give the batches their frame_mask."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"{folder} cannot be made ({err}): give another folder.") from err
    digest = write_weights(folder / MODEL_FILE, weights_of(module))
    facts = {
        "version": FORMAT_VERSION,
        "weights_sha256": digest,
        "hidden_size": module.hidden_size,
        "tower": fingerprint(module.tower.tower, portable=True),
    }
    write_json(folder / CONFIG_FILE, {**facts, **dataclasses.asdict(module.config)})


def from_pretrained(kind: type[Module], folder: str | Path, vision_tower: nn.Module) -> Module:
    """Build a `kind` from what `save_pretrained` wrote, around a tower like the one it was trained on.

    Folders of earlier versions do not say which tower that was; any with its `embedding_dim` is taken then.

    Raises:
        StateError: no such folder, damaged files, another format version, weights that do not fit, or that were not
            saved together with the settings, or a tower of other settings or weights.
        ConfigError: unknown or impossible settings, or a tower of another `embedding_dim`.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        settings: Any = read_json(path)
    except (OSError, ValueError) as err:
        raise StateError(f"{path} cannot be read ({err}): give a folder that save_pretrained wrote.") from err
    if not isinstance(settings, dict) or settings.pop("version", None) != FORMAT_VERSION:
        raise StateError(f"{path} is not of format version {FORMAT_VERSION}: give a folder that save_pretrained wrote.")
    digest, hidden_size = settings.pop("weights_sha256", None), settings.pop("hidden_size", None)
    trained_on = settings.pop("tower", None)
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
        raise ConfigError(f"hidden_size in {path} must be a whole number of at least 1, got {hidden_size!r}.")
    try:
        config = ReconstructionConfig.make(settings)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    _check_weights(Path(folder), digest)
    module = kind(vision_tower, hidden_size, config)
    load_weights(Path(folder), module)
    if trained_on not in (None, fingerprint(module.tower.tower, portable=True)):
        raise StateError(
            f"{path}: the module was trained on another tower than this {type(vision_tower).__name__}: its kind, "
            "settings (such as patch size, mean and std), precision or weights differ. Give the tower of the training; "
            'whoever is sure that this one is as good removes the key "tower" from that file.'
        )
    return module.eval()


def _check_weights(folder: Path, digest: object) -> None:
    found = hashlib.sha256()
    try:
        with open(folder / MODEL_FILE, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as err:
        raise StateError(f"The weights of {folder} cannot be read: {err}") from err
    if found.hexdigest() != digest:
        raise StateError(
            f"{MODEL_FILE} in {folder} does not fit the weights_sha256 of its {CONFIG_FILE}: the file is damaged, or a "
            "save was killed between the two. Save the module again."
        )
