"""Public names of a package that are imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, home: Mapping[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package whose modules hold the names in `home` (PEP 562).

    Args:
        package: `__name__` of the package.
        home: for each module the names that are exported from it, separated by spaces.
    """
    module_of = {name: module for module, names in home.items() for name in names.split()}
    public = sorted(module_of)

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{module_of[name]}", package), name)

    return public, get, lambda: public
