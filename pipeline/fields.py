"""Further members of a sample, parsed without ever executing what they hold."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import ConfigError, SampleError

if TYPE_CHECKING:
    from .shards import RawSample

FIELD_KINDS = ("json", "npy")


def check_fields(fields: Sequence[str]) -> tuple[str, ...]:
    """Return the names, or raise ConfigError for one that is not to be parsed."""
    if isinstance(fields, str):
        raise ConfigError(f"fields is the string {fields!r}; give a list of names, e.g. ({fields!r},).")
    for name in fields:
        if name.rsplit(".", 1)[-1] not in FIELD_KINDS:
            raise ConfigError(f"fields names {name!r}; only members that end in {' or '.join(FIELD_KINDS)} are parsed.")
    return tuple(fields)


def parse_field(sample: RawSample, name: str) -> Any:
    """Return what a member holds: parsed JSON, or a tensor. SampleError when it is missing or damaged."""
    if name not in sample.members:
        raise SampleError(
            f"{sample.key} in {sample.shard} has no member {name!r}, which `fields` asks for; "
            f"it has {', '.join(sorted(sample.members))}."
        )
    data = sample.members[name]
    try:
        return json.loads(data) if name.rsplit(".", 1)[-1] == "json" else _array(data)
    except (ValueError, TypeError, OSError, EOFError, MemoryError, RecursionError) as err:
        raise SampleError(f"{sample.key} in {sample.shard}: member {name!r} cannot be parsed: {err}") from err


def _array(data: bytes) -> torch.Tensor:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays; one is expected.")
    return torch.from_numpy(array)
