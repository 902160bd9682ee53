"""Rules put together before there is a layout, to be handed to a loader, a collator or a module."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError
from .frame_mask import FrameMask
from .layout import FrameLayout
from .masks import RULES, Rule, check_rule, make_mask


@dataclass(frozen=True)
class FrameRule:
    """A rule with its options: a function of a layout that combines with others by `&` and `|`.

    `FrameRule("fast_slow") & FrameRule("sliding_window", window_size=4)` may stand wherever a rule's name may. It
    pickles and compares by value, as long as the functions in it do.

    Args:
        rule: name of a rule, or a function of a layout.
        options: what the rule takes beside the layout, such as `window_size`.

    Raises:
        ConfigError: an unknown name, options that the rule does not take, or that cannot be compared.
    """

    rule: str | Rule
    options: tuple[tuple[str, Any], ...]

    def __init__(self, rule: str | Rule, **options: Any) -> None:
        check_rule(rule)
        try:
            inspect.signature(RULES[rule] if isinstance(rule, str) else rule).bind(None, **options)
        except TypeError as err:
            raise ConfigError(f"mask rule {rule!r} does not take these options: {err}.") from err
        if unhashable := [name for name, value in options.items() if not isinstance(value, Hashable)]:
            raise ConfigError(f"options of a mask rule must be plain values, {', '.join(unhashable)} is none.")
        object.__setattr__(self, "rule", rule)
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    def __call__(self, layout: FrameLayout) -> FrameMask:
        """The mask of a layout."""
        return make_mask(self.rule, layout, **dict(self.options))

    def __and__(self, other: Rule | str) -> FrameRule:
        return FrameRule(_Both(self, _as_rule(other), "and"))

    def __or__(self, other: Rule | str) -> FrameRule:
        return FrameRule(_Both(self, _as_rule(other), "or"))

    __rand__, __ror__ = __and__, __or__


@dataclass(frozen=True)
class _Both:
    """Two rules over the same layout."""

    one: FrameRule
    other: FrameRule
    operator: Literal["and", "or"]

    def __call__(self, layout: FrameLayout) -> FrameMask:
        one, other = self.one(layout), self.other(layout)
        return one & other if self.operator == "and" else one | other


def _as_rule(rule: Rule | str) -> FrameRule:
    if isinstance(rule, FrameRule):
        return rule
    if not callable(rule) and not isinstance(rule, str):
        raise ConfigError(f"a rule combines with a rule, its name or a function of a layout, not with {rule!r}.")
    return FrameRule(rule)
