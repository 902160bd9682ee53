"""What `framestream shard` finds in folders, globs and manifests, on disks, web servers and S3."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.remote import Remote
from framestream.tools.inputs import Source, Unusable, list_inputs, nothing_found, slug
from framestream.tools.plan_store import PlanStore
from framestream.tools.source_file import opened

from remote_storage import QUICK, Storage, http_storage, s3_request, s3_server, s3_storage

FILES = ("a.mp4", "a.txt", "b c.MOV", "notes.md", "sub/deep/d.webm", "sub/c.mkv", "sub/c.txt", "sub/.hidden.mp4")
VIDEOS = ["a.mp4", "b c.MOV", "sub/c.mkv", "sub/deep/d.webm"]


def fill(folder: Path, names: tuple[str, ...] = FILES) -> Path:
    """Files that hold their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def listed(*inputs: Any, remote: Remote | None = None) -> list[Source]:
    found = list(list_inputs([str(each) for each in inputs], remote=remote))
    assert not [each for each in found if isinstance(each, Unusable)]
    return [each for each in found if isinstance(each, Source)]


def reasons(*inputs: Any, remote: Remote | None = None) -> list[str]:
    found = list_inputs([str(each) for each in inputs], remote=remote)
    return [f"{each.source}: {each.reason}" for each in found if isinstance(each, Unusable)]


def names(sources: list[Source]) -> list[str]:
    return [source.source for source in sources]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A manifest of the kind that its name says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- this machine ----------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_whole_and_sorted(tmp_path: Path) -> None:
    others: Counter[str] = Counter()
    found = list(list_inputs([str(fill(tmp_path))], other_files=others))
    assert all(isinstance(each, Source) for each in found)
    sources = [each for each in found if isinstance(each, Source)]
    assert names(sources) == VIDEOS
    assert [source.key for source in sources] == ["a", "b_c", "sub_c", "sub_deep_d"]
    assert [source.text for source in sources] == [
        "a.txt",
        None,
        "sub/c.txt",
        None,
    ]
    assert [source.size for source in sources] == [len(name) for name in VIDEOS]
    assert all(str((tmp_path / source.source).stat().st_mtime_ns) in source.version for source in sources)
    assert others == {".md": 1, ".txt": 2}


def test_inputs_are_listed_one_after_the_other(tmp_path: Path) -> None:
    """The second is not looked at before the first has been used up, so nothing is collected."""
    found = list_inputs([str(fill(tmp_path)), str(tmp_path / "nothing")])
    assert [next(found).source for _ in VIDEOS] == VIDEOS
    with pytest.raises(ConfigError, match="nothing does not exist"):
        next(found)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.mp4", ["a.mp4"]),
        ("*", VIDEOS),
        ("s*", VIDEOS[2:]),
        ("*/*.mkv", ["sub/c.mkv"]),
        ("*/deep/*.webm", ["sub/deep/d.webm"]),
        ("**/*.m*", ["a.mp4", "sub/c.mkv"]),
        ("**/deep", ["sub/deep/d.webm"]),
        ("**", VIDEOS),
        ("**/*", VIDEOS),
        ("**/sub/**/*.webm", ["sub/deep/d.webm"]),
        ("[ab]*", ["a.mp4", "b c.MOV"]),
        ("su?/c.*", ["sub/c.mkv"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    sources = listed(fill(tmp_path) / pattern)
    assert names(sources) == expected
    assert [Path(source.path).read_text() for source in sources] == expected
    assert [source.text for source in sources if source.source == "a.mp4"] in ([], ["a.txt"])


def test_single_files_file_urls_and_names_with_the_signs_of_patterns(tmp_path: Path) -> None:
    fill(tmp_path, ("a.mp4", "a.txt", "x[1]*.mp4"))
    first, second = listed(f"file://{tmp_path}/a.mp4", tmp_path / "x[1]*.mp4")
    assert (first.path, first.source, first.text) == (str(tmp_path / "a.mp4"), "a.mp4", "a.txt")
    assert second.source == "x[1]*.mp4"
    assert reasons(tmp_path / "a.txt") == ["a.txt: .txt is none of .mp4 .m4v .mov .mkv .webm .avi .ts"]


def test_links_to_folders_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", ("v.mp4", "in/w.mp4"))
    inside = fill(tmp_path / "inside", ("real/a.mp4", ".store/b.mp4"))
    os.symlink(inside, inside / "loop")
    os.symlink(tmp_path, inside / "up")
    os.symlink(outside, inside / "one")
    os.symlink(outside, inside / "two")
    os.symlink(outside / "in", inside / "within")
    os.symlink(inside / "real", inside / "same")
    os.symlink(inside / ".store", inside / "stored")
    os.symlink(inside / "nowhere", inside / "broken.mp4")
    os.symlink("self", inside / "self")
    assert names([each for each in list_inputs([str(inside)]) if isinstance(each, Source)]) == [
        "one/v.mp4", "one/in/w.mp4", "real/a.mp4", "stored/b.mp4",
    ]  # fmt: skip
    assert reasons(inside) == ["broken.mp4: cannot be read (No such file or directory)"]


def test_names_that_are_no_text_and_files_that_are_no_files(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb") as file:
        file.write(b"x")
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.mp4"))
        sources = [each for each in list_inputs([str(tmp_path)]) if isinstance(each, Source)]
        assert [source.source for source in sources] == ["\\xff.mp4"]
        json.dumps(sources[0].source).encode()
        assert os.path.getsize(sources[0].path) == 1
        assert reasons(tmp_path) == [f"{n}: cannot be read (it is no regular file)" for n in ("pipe.mp4", "s.mp4")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read(tmp_path: Path) -> None:
    (fill(tmp_path) / "sub").chmod(0)
    try:
        assert reasons(tmp_path) == ["sub: Permission denied"]
        with pytest.raises(ConfigError, match="cannot be listed"):
            listed(tmp_path / "sub")
    finally:
        (tmp_path / "sub").chmod(0o700)


def test_what_stops_at_once(tmp_path: Path) -> None:
    fill(tmp_path)
    for inputs, words in (
        ([], "no input was named"),
        ([tmp_path / "no" / "where"], "does not exist"),
        ([tmp_path / "no" / "*.mp4"], "does not exist"),
        ([tmp_path / "no" / "**" / "*.mp4"], "does not exist"),
        ([tmp_path / "m.csv"], "does not exist"),
        (["pipe:cat a.mp4"], "shell"),
        (["cat a.mp4 |"], "shell"),
        (["nonsense://x/a.mp4"], "cannot be opened by fsspec"),
        (["filecache::s3://bucket/a.mp4"], "is not used"),
        (["reference://a.mp4"], "is not used"),
    ):
        with pytest.raises(ConfigError, match=words):
            list(list_inputs([str(each) for each in inputs]))


def test_dots_lead_out_of_the_folder_behind_a_link(tmp_path: Path) -> None:
    """`link/../a.mp4` is beside the folder that the link leads to, and not beside the link."""
    fill(tmp_path, ("a.mp4", "far/a.mp4", "far/a.txt", "far/in/b.mp4", "..c.mp4"))
    (tmp_path / "link").symlink_to(tmp_path / "far" / "in")
    true, near = str(tmp_path / "far" / "a.mp4"), str(tmp_path / "a.mp4")
    for wanted in ("link/../a.mp4", "link/./../*.mp4", "link/../[a]*"):
        (source,) = listed(f"{tmp_path}/{wanted}")
        assert (source.path, source.text) == (true, "far/a.txt")
    assert names(listed(f"{tmp_path}/link/..")) == ["a.mp4", "in/b.mp4"]
    assert [source.path for source in listed(f"{tmp_path}/far/../..c.mp4")] == [f"{tmp_path}/..c.mp4"]
    manifest = write_rows(tmp_path / "m.jsonl", [{"path": "link/../a.mp4"}, {"path": "far/../a.mp4"}, {"path": near}])
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs(list_inputs([str(manifest)]))
        assert (plan.num_inputs, plan.num_usable) == (3, 2)  # the second and the third are the same


def test_the_sentence_for_nothing() -> None:
    assert nothing_found(["x", "y"], {".md": 2, "": 1}).startswith(
        "there is no video in x, y (only other files: 1 without extension, 2 .md); videos end in .mp4"
    )
    assert "SECRET" not in nothing_found(["s3://me:SECRET@b/x", "https://h/?sign=SECRET"], {})


# --- manifests -------------------------------------------------------------------------------------------------------

ROWS = [
    {"path": "sub/c.mkv", "text": "said", "key": "own.key", "split": "val", "start": 0.5, "end": 2.0, "score": 3},
    {"path": "a.mp4", "text": None, "key": None, "split": None, "start": None, "end": None, "score": None},
    {"path": "s3://bucket/x/y.mp4", "text": None, "key": None, "split": None, "start": None, "end": None, "score": 1},
]


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "csv", "parquet"])
def test_rows_become_sources(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    manifest = write_rows(fill(tmp_path) / f"m.{kind}", ROWS)
    first, second, third = listed(manifest)
    assert (first.path, first.source, first.text) == (str(tmp_path / "sub/c.mkv"), "sub/c.mkv", "said")
    assert (first.split, first.start, first.end, first.text_file) == ("val", 0.5, 2.0, None)
    assert first.key == slug("own.key")
    assert first.user == {"score": "3" if kind == "csv" else 3}
    assert (second.text, second.text_file, second.start, second.split) == ("a.txt", None, None, "")
    assert (second.size, second.key) == (5, "a")
    assert (third.path, third.source, third.key) == ("s3://bucket/x/y.mp4", "s3://bucket/x/y.mp4", "x_y")
    assert (third.size, third.version, third.text_file) == (-1, "", None)


def test_signed_addresses_are_fetched_as_they_are_and_shown_without_their_signature(tmp_path: Path) -> None:
    url = "https://me:password@host/folder/some%20clip.mp4?X-Signature=abc/d.e#t"
    (source,) = listed(write_rows(tmp_path / "m.jsonl", [{"path": url}]))
    assert source.path == url
    assert (source.source, source.key) == ("https://host/folder/some%20clip.mp4", "folder_some_clip")


def test_a_signed_address_as_input(tmp_path: Path) -> None:
    fill(tmp_path, ("a.mp4", "a.txt", "m.csv"))
    (tmp_path / "m.csv").write_text("path\na.mp4\n")
    with http_storage(tmp_path) as web:
        first, second = listed(f"{web.url}/a.mp4?sign=x*/y.z", f"{web.url}/m.csv?sign=x", remote=remote_of(web))
        assert (first.path, first.source, first.text_file) == (f"{web.url}/a.mp4?sign=x*/y.z", "a.mp4", None)
        assert (second.path, second.source) == (f"{web.url}/a.mp4", "a.mp4")


def test_bad_rows_cost_themselves(tmp_path: Path) -> None:
    fill(tmp_path)
    rows: list[Any] = [
        {"path": "gone.mp4"}, {"path": "a.mp4", "start": "x"}, {"path": "a.mp4", "start": -1},
        {"path": "a.mp4", "start": 2, "end": 1}, {"path": "notes.md"}, {"text": "x"}, {"path": 3}, {"path": " "},
        {"path": "a.mp4", "split": "../x"}, {"path": "nonsense://h/a.mp4"}, {"path": "simplecache::s3://b/a.mp4"},
        {"path": "pipe:cat a.mp4"}, {"path": "a\0.mp4"}, {"path": "a.mp4", "x": float("nan")}, {"path": "s3://b/a.md"},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{broken\n\n[1]\n{"path": "a.mp4"}'
    (tmp_path / "m.jsonl").write_text(text)
    found = list(list_inputs([str(tmp_path / "m.jsonl")]))
    assert [each.source for each in found if isinstance(each, Source)] == ["a.mp4"]
    expected = [
        "gone.mp4: cannot be read", "row 2: its start is 'x', not a number", "row 3: its start is -1, not a time",
        "row 4: its end (1 s) is not after", "row 5: notes.md: md is none of", "row 6: it has no path",
        "row 7: its path is 3, not a text", "row 8: it has no path", "row 9: split '../x'",
        "row 10: nonsense://h/a.mp4 cannot be opened", "row 11: simplecache::s3://b/a.mp4: fsspec's simplecache",
        "pipe:cat a.mp4: cannot be read", ": cannot be read (embedded null byte)", "row 14: its 'x' is, or has in it",
        "row 15: s3://b/a.md: md is none of", "row 16: it is no JSON", "row 18: it is a list",
    ]  # fmt: skip
    for told, words in zip(reasons(tmp_path / "m.jsonl"), expected, strict=True):
        assert words in told


def test_csv_as_it_comes(tmp_path: Path) -> None:
    fill(tmp_path)
    long = "x" * 200_000  # more than the csv module takes for a cell
    data = f'\ufeffpath,text\r"a.mp4","two\rlines, ""quoted"""\ra.mp4,{long}\ra.mp4,1,2\ra.mp4\r'
    (tmp_path / "m.csv").write_bytes(data.encode())
    found = list(list_inputs([str(tmp_path / "m.csv")]))
    assert [each.text for each in found if isinstance(each, Source)] == ['two\rlines, "quoted"', "a.txt"]
    assert "row 2: it is no readable CSV (field larger" in reasons(tmp_path / "m.csv")[0]
    assert "row 3: it has 1 cells more than the header" in reasons(tmp_path / "m.csv")[1]


@pytest.mark.parametrize("closed", [False, True])
def test_a_quote_that_is_not_closed_does_not_hide_the_rows_behind_it(tmp_path: Path, closed: bool) -> None:
    """In one reject they are named by their lines; what comes behind a later quote is read again."""
    fill(tmp_path)
    rows = ["path,text", 'a.mp4,"not closed', *["a.mp4,plain"] * 5]
    rows += ['a.mp4,"closed"', *["a.mp4,behind"] * 3] if closed else []
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    told = reasons(tmp_path / "m.csv")
    assert len(told) == 1
    assert f"it takes the lines 2 to {8 if closed else 7}: is a quote in it not closed?" in told[0]
    texts = [each.text for each in list_inputs([str(tmp_path / "m.csv")]) if isinstance(each, Source)]
    assert texts == ["behind"] * 3 * closed


def test_text_that_is_no_unicode_is_not_changed_in_silence(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "m.csv").write_bytes("path,text\na.mp4,café\na.mp4,tea\n".encode("latin-1"))
    (told,) = reasons(tmp_path / "m.csv")
    assert "row 1: it has text that is no Unicode: 'caf\\udce9'" in told
    (tmp_path / "other.csv").write_bytes("chemin,légende\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"no column 'path', only chemin, l\\udce9gende"):
        list(list_inputs([str(tmp_path / "other.csv")]))


@pytest.mark.parametrize("name", ["captions.tsv", "captions.json", "captions.xlsx"])
def test_tables_of_another_kind_stop_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("path\ttext\n")
    with pytest.raises(
        ConfigError, match=f"input {name} is no manifest that can be read: make it CSV, JSONL or Parquet"
    ):
        list(list_inputs([str(tmp_path / name)]))


def test_lines_without_an_end_are_not_held(tmp_path: Path) -> None:
    with open(tmp_path / "m.jsonl", "w") as file:
        file.write('{"path": "')
        for _ in range(40):
            file.write("x" * (1 << 20))
        file.write('.mp4"}\n{"path": "s3://b/x.mp4"}\n')
    tracemalloc.start()
    found = list(list_inputs([str(tmp_path / "m.jsonl")]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(each) for each in found] == [Unusable, Source]
    assert peak < 90 << 20


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.csv", b"file,text\na.mp4,x\n", "no column 'path', only file, text"),
        ("m.csv", b"", "no column 'path', only -"),
        ("m.csv", b'"' + b"x" * 200_000, "no readable CSV"),
        ("m.parquet", b"PAR1 and nothing more", "no readable Parquet"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        listed(tmp_path / name)


def test_parquet_columns_and_cells_that_cannot_be_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"file": ["a.mp4"]}), tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="no column 'path', only file"):
        listed(tmp_path / "none.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a.mp4"])] * 2, names=["path", "path"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match="'path' twice"):
        listed(tmp_path / "twice.parquet")

    far = pyarrow.array([0, 1 << 50, 0], pyarrow.timestamp("s"))  # a year that Python does not know
    blob = pyarrow.array([None, None, b"x"], pyarrow.binary())
    rows = pyarrow.table({"path": ["s3://b/a.mp4", "s3://b/b.mp4", "s3://b/c.mp4"], "when": far, "blob": blob})
    parquet.write_table(rows, tmp_path / "m.parquet")
    found = list(list_inputs([str(tmp_path / "m.parquet")]))
    assert isinstance(found[0], Source)
    assert found[0].user == {"when": datetime(1970, 1, 1).isoformat()}
    told = reasons(tmp_path / "m.parquet")
    assert "row 2: it has a value that cannot be read" in told[0]
    assert "row 3: it has a value of the kind bytes" in told[1]


MEMORY = """
import resource, sys
from framestream.tools.inputs import Source, list_inputs
import pyarrow.parquet
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
found = list_inputs([sys.argv[1]])
for _ in range(2000): next(found)
before, rest = peak(), 0
for each in found: rest += isinstance(each, Source)
print(rest, peak() - before)
"""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_grow_with_a_manifest(tmp_path: Path, kind: str) -> None:
    """Rows of tens of megabytes in all; beyond the first 2,000 none costs anything."""
    pytest.importorskip("pyarrow")
    caption = "a caption as long as captions are " * 8
    rows = [{"path": f"s3://bucket/videos/{i:07d}.mp4", "text": f"{i} {caption}"} for i in range(200_000)]
    manifest = write_rows(tmp_path / f"m.{kind}", rows)
    del rows
    done = subprocess.run([sys.executable, "-c", MEMORY, str(manifest)], capture_output=True, text=True, check=True)
    count, grown_mib = map(int, done.stdout.split())
    assert count == 198_000
    assert grown_mib < 40


# --- remote storage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("remote"))
    rows = [
        {"path": "sub/c.mkv", "text": "said"},
        {"path": "../up.mp4", "text": None},
        {"path": "/no/where.mp4", "text": None},
        {"path": "../../../../x.mp4", "text": None},
        {"path": "memory://b/c.mp4", "text": None},
    ]
    for kind in ("csv", "jsonl", "parquet"):
        write_rows(folder / f"m.{kind}", rows)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def storage(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Storage]:
    if request.param == "http":
        with http_storage(folder.parent) as web:
            web.url += f"/{folder.name}"
            yield web
        return
    address = request.getfixturevalue("server")
    with s3_storage(tmp_path_factory.mktemp("empty"), address, "top/videos") as s3:
        for path in folder.rglob("*"):
            if path.is_file():
                key = quote(f"/top/videos/{path.relative_to(folder).as_posix()}")
                s3_request(address, "PUT", key, path.read_bytes())
        s3_request(address, "PUT", "/top/videos/sub/", b"")  # the mark that consoles leave for a folder
        yield s3


def remote_of(storage: Storage) -> Remote:
    return Remote(storage.options, **QUICK)


def test_a_remote_folder_is_listed_like_a_local_one(storage: Storage) -> None:
    others: Counter[str] = Counter()
    for url in (storage.url, storage.url + "/"):
        found = list(list_inputs([url], remote=remote_of(storage), other_files=others))
        sources = [each for each in found if isinstance(each, Source)]
        assert len(found) == len(sources)
        assert names(sources) == VIDEOS
        assert [source.key for source in sources] == ["a", "b_c", "sub_c", "sub_deep_d"]
        assert [source.text_file for source in sources] == [
            f"{storage.url}/a.txt", None, f"{storage.url}/sub/c.txt", None
        ]  # fmt: skip
        assert all(source.path.startswith(storage.url) for source in sources)
        if storage.url.startswith("s3"):
            assert [source.size for source in sources] == [len(name) for name in VIDEOS]
            assert all(source.version.startswith("etag ") for source in sources)
    assert others[".md"] == 2


def test_a_remote_folder_costs_one_request_each(storage: Storage) -> None:
    listed(storage.url, remote=remote_of(storage))
    asked = [request for request in storage.proxy.requests if request.method == "GET"]
    redirects = sum(not request.path.endswith("/") for request in asked) if not storage.options else 0
    assert len(asked) - redirects == 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.mp4", VIDEOS[:1]), ("**/*.m*", ["a.mp4", "sub/c.mkv"]), ("*/deep", VIDEOS[3:]), ("s*/c.mkv", ["sub/c.mkv"])],
)
def test_remote_globs(storage: Storage, pattern: str, expected: list[str]) -> None:
    assert names(listed(f"{storage.url}/{pattern}", remote=remote_of(storage))) == expected


def test_a_single_remote_video(storage: Storage) -> None:
    first, second = listed(f"{storage.url}/a.mp4", f"{storage.url}/sub/deep/d.webm", remote=remote_of(storage))
    assert (first.path, first.source, first.key, first.size) == (f"{storage.url}/a.mp4", "a.mp4", "a", 5)
    assert (first.text_file, second.text_file) == (f"{storage.url}/a.txt", None)
    assert first.version.partition(" ")[0] in ("etag", "lastmodified")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_remote_manifest(storage: Storage, kind: str) -> None:
    url = f"{storage.url}/m.{kind}"
    storage.proxy.inject(f"m.{kind}", "reset", 1)
    found = list(list_inputs([url], remote=remote_of(storage)))
    sources = [each for each in found if isinstance(each, Source)]
    base = storage.url.rpartition("/")[0]
    assert [source.path for source in sources] == [f"{storage.url}/sub/c.mkv", f"{base}/up.mp4", "memory://b/c.mp4"]
    assert [source.source for source in sources] == ["sub/c.mkv", "../up.mp4", "memory://b/c.mp4"]
    assert [source.text for source in sources] == ["said", None, None]
    assert all(source.size == -1 for source in sources)
    assert [each.reason for each in found if isinstance(each, Unusable)] == [
        "cannot be read (No such file or directory)",
        f"../../../../x.mp4 leads out of {storage.url.partition('://')[0]}://{storage.url.split('/')[2]}",
    ]
    asked = {request.path.partition("?")[0].rpartition("/")[2] for request in storage.proxy.requests}
    assert asked == {f"m.{kind}"}  # rows are not looked up


def test_listing_is_tried_again_and_ends_in_a_sentence(storage: Storage) -> None:
    ending = "/" if not storage.options else ""
    storage.proxy.inject(ending, "503", 2)
    assert names(listed(storage.url, remote=remote_of(storage))) == VIDEOS
    storage.proxy.inject(ending, "503", 99)
    with pytest.raises(ShardError, match=r"could not be fetched in 4 attempts"):
        listed(storage.url, remote=remote_of(storage))


def test_what_is_not_there_remotely(storage: Storage) -> None:
    for name in ("none", "none.mp4", "none.csv", "*.avi", "none/**/*.mp4"):
        with pytest.raises(ConfigError, match="does not exist"):
            listed(f"{storage.url}/{name}", remote=remote_of(storage))


def test_a_refused_subfolder_costs_itself(storage: Storage) -> None:
    if storage.options:
        pytest.skip("the S3 server lists all folders at one address")
    storage.proxy.inject("/deep/", "403", 1)
    assert len(reasons(storage.url, remote=remote_of(storage))) == 1
    storage.proxy.inject("/deep/", "403", 1)
    found = list(list_inputs([storage.url], remote=remote_of(storage)))
    assert names([each for each in found if isinstance(each, Source)]) == VIDEOS[:3]


def test_objects_that_no_folder_leads_to(server: str, tmp_path: Path) -> None:
    with s3_storage(fill(tmp_path, ("a.mp4",)), server, "odd") as s3:
        s3_request(server, "PUT", "/odd//lost.mp4", b"x")
        s3_request(server, "PUT", "/odd/a::b.mp4", b"x")
        s3_request(server, "PUT", "/odd/100%25%20sure%3F.mp4", b"x")
        found = list(list_inputs([s3.url], remote=remote_of(s3)))
        sources = [each for each in found if isinstance(each, Source)]
        assert names(sources) == ["100% sure?.mp4", "a.mp4"]
        with opened(sources[0], remote_of(s3)) as file:
            assert file.data == b"x"
        assert sorted((each.source, each.reason[:23]) for each in found if isinstance(each, Unusable)) == [
            ("/", "is a folder without a n"), ("a::b.mp4", "has '::' in its name, w")
        ]  # fmt: skip


def test_pages_of_web_servers(tmp_path: Path) -> None:
    """A listing as Apache writes it, with links that sort it and lead up, and signs as HTML spells them."""
    fill(tmp_path, ("in/a&b.mp4", "in/c d.mp4", "in/more/e.mp4"))
    links = ("?C=N;O=D", "/", "../", "a&amp;b.mp4", "c%20d.mp4", "more/", "https://elsewhere/x.mp4", "#top", ".x.mp4")
    (tmp_path / "in" / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    with http_storage(tmp_path) as web:
        sources = listed(f"{web.url}/in/", remote=remote_of(web))
        assert names(sources) == ["a&b.mp4", "c d.mp4", "more/e.mp4"]
        for source in sources:
            with opened(source, remote_of(web)) as file:
                assert bytes(file.data).decode() == f"in/{source.source}"


def test_a_folder_of_many_pages_comes_page_by_page(server: str, tmp_path: Path) -> None:
    with s3_storage(tmp_path, server, "many") as s3:
        wanted = [f"{i:04d}.mp4" for i in range(1050)]
        for name in ("0998.txt", "zz/x.mp4", *wanted):  # the text comes in the page behind that of its video
            s3_request(server, "PUT", f"/many/{name}", b"x")
        s3.proxy.requests.clear()
        found = list_inputs([s3.url], remote=remote_of(s3))
        head = next(found)
        assert len(s3.proxy.requests) == 1
        s3.proxy.inject("", "503", 2)
        sources = [each for each in (head, *found) if isinstance(each, Source)]
        assert names(sources) == [*wanted, "zz/x.mp4"]
        assert [source.source for source in sources if source.text_file] == ["0998.mp4"]
        assert len(s3.proxy.requests) == 3 + 2


def test_archives_and_memory_are_storage_too(tmp_path: Path) -> None:
    import fsspec

    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in ("in/a.mp4", "in/a.txt", "b.mp4"):
            archive.writestr(name, name)
        archive.writestr("in/m.csv", "path\na.mp4\n../b.mp4\n")
    (tmp_path / "x.zip").write_bytes(data.getvalue())
    chain = f"::file://{tmp_path}/x.zip"
    (source,) = listed(f"zip://in{chain}")
    assert (source.path, source.text_file) == (f"zip://in/a.mp4{chain}", f"zip://in/a.txt{chain}")
    assert names(listed(f"zip://**/*.mp4{chain}")) == ["b.mp4", "in/a.mp4"]
    assert [s.path for s in listed(f"zip://in/m.csv{chain}")] == [f"zip://in/a.mp4{chain}", f"zip://b.mp4{chain}"]
    memory = fsspec.filesystem("memory")
    memory.pipe("/clips/x/a.mp4", b"abc")
    try:
        (source,) = listed("memory://clips")
        assert (source.path, source.source, source.size) == ("memory://clips/x/a.mp4", "x/a.mp4", 3)
    finally:
        memory.rm("/clips", recursive=True)


def test_a_protocol_is_checked_before_anything_is_connected_to() -> None:
    """Kinds of storage that connect when they are made, and those whose package is not there, end at once."""
    with pytest.raises(ConfigError, match="nonsense") as told:
        next(list_inputs(["nonsense://me:SECRET@host/x.mp4"], remote=Remote(**QUICK)))
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize(
    "text", ["https://me:SECRET@127.0.0.1:9/m.csv?sign=SECRET", "https://127.0.0.1:9/m.csv?SECRET"]
)
def test_no_sentence_shows_a_secret(text: str) -> None:
    with pytest.raises(ShardError) as told:
        list(list_inputs([text], remote=Remote(attempts=1)))
    assert "SECRET" not in str(told.value)


# --- keys ------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_keys_are_plain_and_stay_as_they_are(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    key = slug(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key)
    assert len(key) <= 70
    assert slug(key) == key or len(key) > 60
