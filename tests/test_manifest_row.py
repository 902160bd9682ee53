"""What cells of a manifest may hold: nought is a name like any other, and what is no text is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from framestream.tools.inputs import Source, Unusable, list_inputs, slug
from framestream.tools.manifest_row import part_of, user_of, word


@pytest.mark.parametrize(("cell", "text"), [(0, "0"), (0.0, "0.0"), (7, "7"), ("0", "0"), ("", ""), (None, "")])
@pytest.mark.parametrize("column", ["key", "split", "text"])
def test_numbers_are_texts_too(cell: Any, text: str, column: str) -> None:
    assert word({column: cell}, column) == text


def test_a_whole_number_of_any_size_is_its_digits(tmp_path: Path) -> None:
    long = "7" * 400
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f'{{"path": "s3://b/1.mp4", "key": {long}}}\n{{"path": "s3://b/2.mp4"}}\n')
    first, second = list_inputs([str(manifest)])
    assert isinstance(first, Source)
    assert isinstance(second, Source)
    assert first.key == slug(long)
    assert second.key == "2"


@pytest.mark.parametrize("cell", [["a"], [], {"a": 1}, math.nan, math.inf, True, False])
@pytest.mark.parametrize("column", ["key", "split", "text"])
def test_what_is_no_text_is_told_with_its_column(cell: Any, column: str) -> None:
    with pytest.raises(ValueError, match=rf"^its {column} is .*, not a text$"):
        word({column: cell}, column)


@pytest.mark.parametrize("cell", [math.nan, math.inf, True, -1, "x", [1], 10**400])
@pytest.mark.parametrize("column", ["start", "end"])
def test_what_is_no_time_is_told_with_its_column(cell: Any, column: str) -> None:
    with pytest.raises(ValueError, match=rf"^its {column} is .{{1,60}}, not a "):
        part_of({column: cell})


@pytest.mark.parametrize("cell", [math.nan, [1, math.inf], {"a": {"b": math.nan}}])
def test_what_metadata_cannot_hold_is_told_with_its_column(cell: Any) -> None:
    with pytest.raises(ValueError, match=r"^its 'score' is, or has in it, a number .*(nan|inf)"):
        user_of({"path": "a.mp4", "fine": 1, "score": cell})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_keep_nought_and_lose_themselves_alone(tmp_path: Path, kind: str) -> None:
    cells: list[dict[str, Any]] = [{"key": 0.0}, {}, {"key": math.nan}, {"text": ["a", "list"]}]
    rows = [{"path": f"s3://b/{n}.mp4", "key": None, "text": None, **row} for n, row in enumerate(cells)]
    manifest = tmp_path / f"m.{kind}"
    if kind == "jsonl":
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), manifest)
    zero, plain, *lost = list_inputs([str(manifest)])
    assert isinstance(zero, Source)
    assert isinstance(plain, Source)
    assert (zero.key, plain.key) == (slug("0.0"), "1")
    assert [(each.source, each.reason) for each in lost if isinstance(each, Unusable)] == [
        (f"m.{kind} row 3", "its key is nan, not a text"),
        (f"m.{kind} row 4", "its text is ['a', 'list'], not a text"),
    ]
