"""The saved state of a loader: a few integers, and a fingerprint that tells what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import StateError

VERSION = 1


class Progress(NamedTuple):
    """Where a loader stands: `consumed` global samples of `epoch` have been delivered."""

    epoch: int
    consumed: int


def to_state(progress: Progress, seed: int, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON-serialisable state."""
    return {
        "version": VERSION,
        "seed": seed,
        "epoch": progress.epoch,
        "consumed": progress.consumed,
        "fingerprint": dict(fingerprint),
    }


def from_state(
    state: Mapping[str, Any], seed: int, fingerprint: Mapping[str, Any], num_samples: int, *, strict: bool
) -> Progress:
    """Check a state against what the loader is, and return where it stood.

    Raises:
        StateError: the state is not one, is of another version, or (when `strict`) belongs to other data or
            settings; the message names each part that differs.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"The loader state is a {type(state).__name__}; it must be the dict that state_dict() gave.")
    missing = [name for name in ("version", "seed", "epoch", "consumed", "fingerprint") if name not in state]
    if missing:
        raise StateError(f"The loader state lacks {', '.join(missing)}; it is not what state_dict() of a loader gave.")
    if state["version"] != VERSION:
        raise StateError(
            f"The loader state is of version {state['version']!r} and this framestream reads version {VERSION}; "
            "resume with the version that saved it."
        )
    if not isinstance(state["fingerprint"], Mapping):
        raise StateError("The fingerprint of the loader state is no mapping; it is not what state_dict() gave.")
    epoch, consumed = state["epoch"], state["consumed"]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (epoch, consumed)):
        raise StateError(f"The loader state has epoch={epoch!r}, consumed={consumed!r}; both must be counts.")
    if strict:
        saved = {"seed": state["seed"], **state["fingerprint"]}
        ours = {"seed": seed, **fingerprint}
        differing = [name for name in sorted(saved.keys() | ours.keys()) if saved.get(name) != ours.get(name)]
        if differing:
            parts = "; ".join(f"{name} was {saved.get(name)!r}, is {ours.get(name)!r}" for name in differing)
            raise StateError(
                f"The loader state belongs to another run: {parts}. Resume with the same data and settings, or "
                "accept the difference with load_state_dict(state, strict=False)."
            )
    if consumed > num_samples:
        raise StateError(
            f"The loader state has consumed {consumed} samples of an epoch, but there are {num_samples}; "
            "it belongs to other data."
        )
    return Progress(epoch, consumed)
