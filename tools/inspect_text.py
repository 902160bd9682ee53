"""What others wrote, made fit to be shown: short, on one line, and without characters that steer a screen."""

from __future__ import annotations

import unicodedata

# Marks, embeddings, overrides and isolates of the bidirectional algorithm: they reorder what stands around them.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSHOWN = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, halves of surrogates, line separators
_LOOKED_AT = 8  # characters per character shown, so that a text of gigabytes costs nothing


def shown(text: object, limit: int = 300) -> str:
    """A text on one line, of at most `limit` characters; what could steer a terminal or a page stands as `\\x1b`."""
    said = str(text)
    cut = said[: limit * _LOOKED_AT]
    plain = " ".join(cut.split())
    safe = harmless(plain[:limit])
    if len(safe) > limit or len(plain) > limit or len(cut) < len(said):
        return safe[: limit - 1] + "…"
    return safe


def harmless(text: str) -> str:
    """The text without characters that steer a screen; those stand as they are written in Python."""
    return "".join(map(_plain, text))


def _plain(character: str) -> str:
    if character in _DIRECTIONS or unicodedata.category(character) in _UNSHOWN:
        return ascii(character)[1:-1]
    return character


def counted(number: int, noun: str, many: str = "") -> str:
    """`1 clip`, `1,234 clips`; `many` is the plural where it is another."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def size(num_bytes: float) -> str:
    """Bytes in units of 1000: `512 bytes`, `12.3 MB`."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = next((k for k in range(3) if num_bytes < 999.5 * 1000 ** (k + 1)), 3)
    return f"{num_bytes / 1000 ** (power + 1):.3g} {units[power]}"


def long_time(seconds: float) -> str:
    """Seconds as people say them: `40 ms`, `4.2 s`, `12 min`, `3.5 h`, `12 days`."""
    for below, factor, unit in ((0.1, 1e-3, "ms"), (100, 1, "s"), (100 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < below:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds / 86400)} days"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"
