"""Further members of a sample, parsed without ever executing what they hold."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
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
    if not isinstance(fields, Iterable):
        raise ConfigError(f"fields is {fields!r}; give a list of names, e.g. ('actions.npy',).")
    for name in fields:
        if not isinstance(name, str) or name.rsplit(".", 1)[-1] not in FIELD_KINDS:
            raise ConfigError(f"fields names {name!r}; only members that end in {' or '.join(FIELD_KINDS)} are parsed.")
    return tuple(fields)


def parse_field(sample: RawSample, name: str) -> Any:
    """Return what a member holds: parsed JSON, or a tensor. SampleError when it is missing or damaged."""
    if name not in sample.members:
        raise SampleError(
            f"{sample.key} in {sample.shard} has no member {name!r}, which `fields` asks for; "
            f"it has {', '.join(sorted(sample.members))}."
        )
    data = sample.content(name)
    try:
        return json.loads(data) if name.rsplit(".", 1)[-1] == "json" else _array(data)
    except Exception as err:  # NumPy parses the header as Python text: beside ValueError, tokenize's errors and others
        raise SampleError(f"{sample.key} in {sample.shard}: member {name!r} cannot be parsed: {err}") from err


def _array(data: bytes) -> torch.Tensor:
    # Not np.load, which goes by the first bytes and would open a zip file or a pickle too.
    return torch.from_numpy(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
