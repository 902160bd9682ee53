"""What every report page must be, read with a plain HTML parser."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SECTIONS = [
    "What was done",
    "Error against repeating the last frame",
    "What it predicts",
    "Slow and fast frames",
    "Who may look at whom",
    "Learning",
    "Where the time went",
    "Read with care",
]
_VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


class Page(HTMLParser):
    """Collects what the checks need; raises nothing itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[tuple[str, str]] = []
        self.data: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text: list[str] = []
        self._datum: dict[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag not in _VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))
        if tag == "data":
            self._datum = values

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)
        if tag == "data":
            self._datum = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            level, said = self.headings[-1]
            self.headings[-1] = (level, said + data)
        if self._datum is not None:
            self.data.append((self._datum["data-key"], self._datum["value"], data))


def check_page(path: Path) -> Page:
    """The page is whole, self-contained, accessible, and every number on it is that of results.json beside it."""
    text = path.read_text(encoding="utf-8")
    results = json.loads((path.parent / "results.json").read_text(encoding="utf-8"))
    page = Page(text)
    assert not page.unbalanced
    assert not page.open
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))

    for tag, values in page.tags:  # nothing is loaded, nothing runs
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert values.get(name, "data:").startswith(("data:", "#")), (tag, values[name][:80])
        assert not [name for name in values if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", text)

    headings = [said for level, said in page.headings if level == "h2"]
    assert headings == SECTIONS
    assert sum(level == "h1" for level, _ in page.headings) == 1
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("table") == kinds.count("caption")
    assert all(values.get("alt") for tag, values in page.tags if tag == "img")
    drawings = [values for tag, values in page.tags if tag == "svg"]
    assert all(values.get("aria-label") or values.get("aria-hidden") for values in drawings)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text

    assert len(page.data) > 15
    for key, value, shown in page.data:
        assert float(value) == lookup(results, key), key
        assert shown.strip()
    return page


def lookup(results: Any, path: str) -> Any:
    """The value at `a.0.b` in nested JSON."""
    for part in path.split("."):
        results = results[int(part)] if isinstance(results, list) else results[part]
    return results


def page_text(page: Page) -> str:
    """All text, with single spaces."""
    return " ".join(" ".join(page.text).split())


def replaced(results: Any, **changes: Any) -> Any:
    """A copy of a dataclass whose dicts are merged with the changes."""
    merged = {
        name: {**getattr(results, name), **value} if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(results, **merged)
