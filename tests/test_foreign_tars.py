"""Tars with the habits of others: what is one sample, which names count, and what the plain reader makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset as wds

from framestream.pipeline.errors import ShardError
from framestream.pipeline.shard_index import SAFE_EXTENSIONS
from framestream.pipeline.shards import ShardSet

from tars import Member, load, number_of, special, tiny_meta, tiny_video, write_tar


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


V = [tiny_video(number) for number in range(3)]
LONG = "a folder with a long name/" * 4 + "n" * 180
DEEP = "/".join(["d"] * 120) + "/clip"

# habit -> (members, key -> number of its clip, words in the report)
HABITS: dict[str, tuple[list[Member], dict[str, int], Sequence[str]]] = {
    "folders in keys": ([("x/y/a.mp4", V[0]), ("x/a.mp4", V[1])], {"x/y/a": 0, "x/a": 1}, ()),
    "dots in folders": ([("v1.2/a.b/c.mp4", V[0]), ("v1.2/c.mp4", V[1])], {"v1.2/a.b/c": 0, "v1.2/c": 1}, ()),
    "dots in keys": ([("a.0001.mp4", V[0]), ("b.0001.mp4", V[1])], {"a": 0, "b": 1}, ()),
    "dots in keys of one stem": (
        [("a.1.mp4", V[0]), ("a.2.mp4", V[1]), ("b.mp4", V[2])],
        {"b": 2},
        ["'a' has no video (or several)"],
    ),
    "upper-case extensions": ([("a.MP4", V[0]), ("a.JSON", b"{}"), ("b.Mp4", V[1])], {"a": 0, "b": 1}, ()),
    "one name in two cases": (
        [("a.MP4", V[0]), ("a.mp4", V[1]), ("b.mp4", V[2])],
        {"a": 0, "b": 2},
        ["'a' has its .mp4 twice"],
    ),
    "keys in two cases": ([("A.mp4", V[0]), ("a.mp4", V[1])], {"A": 0, "a": 1}, ()),
    "leading ./": ([special("./", tarfile.DIRTYPE), ("./a.mp4", V[0]), ("././b.mp4", V[1])], {"a": 0, "b": 1}, ()),
    "absolute names": ([("/data/a.mp4", V[0]), ("../b.mp4", V[1])], {"/data/a": 0, "../b": 1}, ()),
    "long names": (
        [(f"{LONG}.mp4", V[0]), (f"{LONG}2.mp4", V[1]), (f"{DEEP}.mp4", V[2])],
        {LONG: 0, f"{LONG}2": 1, DEEP: 2},
        (),
    ),
    "other alphabets": (
        [("кадр/猫 1.mp4", V[0]), ("é.mp4", V[1]), ("🎬.mp4", V[2])],
        {"кадр/猫 1": 0, "é": 1, "🎬": 2},
        (),
    ),
    "names that are no UTF-8": ([("caf\udce9.mp4", V[0]), ("b.mp4", V[1])], {"caf\udce9": 0, "b": 1}, ()),
    "spaces and signs": (
        [("a b#1?.mp4", V[0]), ("new\nline.mp4", V[1]), ("dir\\x.mp4", V[2])],
        {"a b#1?": 0, "new\nline": 1, "dir\\x": 2},
        (),
    ),
    "not adjacent": ([("a.mp4", V[0]), ("b.mp4", V[1]), ("a.txt", b"late"), ("b.txt", b"later")], {"a": 0, "b": 1}, ()),
    "multi-part extensions": (
        [("a.cam.mp4", V[0]), ("a.cam.json", b"{}"), ("b.left.eye.webm.mp4", V[1])],
        {"a": 0, "b": 1},
        (),
    ),
    "several videos": (
        [("a.left.mp4", V[0]), ("a.right.mp4", V[1]), ("b.mp4", V[2])],
        {"b": 2},
        ["'a' has no video (or several)"],
    ),
    "a plain name among several": ([("a.left.mp4", V[1]), ("a.mp4", V[0]), ("a.right.mp4", V[2])], {"a": 0}, ()),
    "two containers": ([("a.webm", V[1]), ("a.mp4", V[0])], {"a": 0}, ()),
    "hidden files": (
        [("._a.mp4", V[1]), ("a.mp4", V[0]), ("x/._b.mp4", V[1]), (".mp4", V[1]), ("__MACOSX/._a.mp4", b"")],
        {"a": 0},
        (),
    ),
    "folders and devices": (
        [special("a.mp4", tarfile.DIRTYPE), special("p.mp4", tarfile.FIFOTYPE), ("b.mp4", V[0])],
        {"b": 0},
        ["'p.mp4' first"],
    ),
    "no extension": ([("README", b"x"), ("a.", V[1]), ("b", V[1]), ("c.mp4", V[0])], {"c": 0}, ()),
    "doubled dot": ([("a..mp4", V[0]), ("b.mp4.", V[1]), ("c.mp4", V[2])], {"a": 0, "c": 2}, ()),
    "no video": (
        [("a.json", b"{}"), ("b.txt", b"words"), ("c.mp4", V[0]), ("d.flac", b"x")],
        {"c": 0},
        ["'a' has no video", "'b' has no video"],
    ),
    "no json, no txt": (
        [("a.mp4", V[0]), ("b.mp4", V[1]), ("b.txt", b"words"), ("c.mp4", V[2]), ("c.json", b"{}")],
        {"a": 0, "b": 1, "c": 2},
        (),
    ),
    "a key twice": (
        [("a.mp4", V[0]), ("b.mp4", V[1]), ("a.mp4", V[2])],
        {"a": 0, "b": 1},
        ["'a' has its .mp4 twice; the first is used"],
    ),
    "empty members": ([("a.mp4", V[0]), ("a.txt", b""), ("a.json", b"")], {"a": 0}, ()),
}

# What the plain reader calls otherwise: a leading ./ stays in its keys, members that stand apart are two samples for
# it, the same extension twice is an error, and it takes a FIFO's like for nothing at all.
DIFFERS = {"leading ./", "not adjacent", "a key twice", "one name in two cases"}


def plain(path: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members that we read, of the samples with a video, as the plain reader gives them."""
    samples = {}
    for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):
        members = {ext: data for ext, data in sample.items() if ext.rpartition(".")[2] in SAFE_EXTENSIONS}
        samples[sample["__key__"]] = members
    return samples


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
@pytest.mark.parametrize("habit", HABITS)
def test_a_habit(habit: str, format: int, tmp_path: Path) -> None:
    members, expected, words = HABITS[habit]
    try:
        path = write_tar(tmp_path / "x.tar", members, format=format)
    except ValueError:  # ustar has no room for such names
        assert format == tarfile.USTAR_FORMAT
        return
    shards = ShardSet.open(path)
    assert len(shards.problems) == len(words)
    assert all(word in " ".join(shards.problems) for word in words)
    for _ in range(2):  # indexed, and from the stored index
        loader = load(path)
        assert {batch["keys"][0]: number_of(batch, 3) for batch in loader} == expected
        assert not loader.stats()["rejects"]
        assert len(loader) == len(expected)
    if habit not in DIFFERS:
        theirs = plain(path)
        for index in range(shards.num_samples):
            sample = shards.read(*shards.locate(index))
            assert sample.members == theirs[sample.key]


def test_where_the_plain_reader_differs(tmp_path: Path) -> None:
    apart = write_tar(tmp_path / "apart.tar", HABITS["not adjacent"][0])
    keys = [s["__key__"] for s in wds.WebDataset(str(apart), shardshuffle=False, empty_check=False)]
    assert keys == ["a", "b", "a", "b"]
    sample = ShardSet.open(apart).read(0, 0)
    assert (sample.video, sample.text) == (V[0], "late")
    twice = write_tar(tmp_path / "twice.tar", [("a.mp4", V[0]), ("a.mp4", V[2])])
    with pytest.raises(ValueError, match="duplicate"):
        list(wds.WebDataset(str(twice), shardshuffle=False, empty_check=False))
    dotted = write_tar(tmp_path / "dotted.tar", HABITS["leading ./"][0])
    assert "./a" in plain(dotted)


def test_one_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"x-{number}.tar", [("a.mp4", V[number]), ("b.mp4", b"no video" * 99)])
    rejects = tmp_path / "rejects.jsonl"
    batches = list(load(folder, rejects_path=rejects))
    own = [(batch["keys"][0], number_of(batch, 2)) for batch in batches if "spare_for" not in batch["meta"][0]]
    assert own == [("a", 0), ("a", 1)]
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(Path(line["shard"]).name, line["key"]) for line in lines] == [("x-0.tar", "b"), ("x-1.tar", "b")]


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_members_are_left_out_with_a_sentence(version: str, tmp_path: Path) -> None:
    tar = shutil.which("tar")
    if tar is None or b"GNU tar" not in subprocess.run([tar, "--version"], capture_output=True).stdout:
        pytest.skip("GNU tar, which writes sparse members, is not installed")
    with open(tmp_path / "holes.mp4", "wb") as file:
        file.write(V[0])
        file.truncate(4 << 20)
    (tmp_path / "whole.mp4").write_bytes(V[1])
    style = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
    subprocess.run([tar, "-S", *style, "-cf", "x.tar", "holes.mp4", "whole.mp4"], cwd=tmp_path, check=True)
    assert os.stat(tmp_path / "x.tar").st_size < 1 << 20
    shards = ShardSet.open(tmp_path / "x.tar")
    assert [(batch["keys"], number_of(batch, 3)) for batch in load(shards)] == [(["whole"], 1)]
    assert "1 members are links or sparse, 'holes.mp4' first" in " ".join(shards.problems)


def test_a_tar_of_nothing_usable_says_what_was_there(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.flac", b"x"), ("b.json", b"{}"), special("c.mp4", tarfile.SYMTYPE, "b")])
    with pytest.raises(ShardError, match=r"links or sparse, 'c\.mp4'.*'b' has no video.*x\.tar holds no usable sample"):
        load(path)


def test_metadata_of_ours_in_a_tar_of_others(tmp_path: Path) -> None:
    """Our JSON counts wherever it stands, also with a checksum that another clip has."""
    members: list[Member] = []
    for number, of in ((0, 0), (1, 1), (2, 0)):
        members += [(f"k{number}.mp4", V[number]), (f"k{number}.json", json.dumps(tiny_meta(of)).encode())]
    loader = load(write_tar(tmp_path / "x.tar", members))
    rows = [(batch["keys"][0], number_of(batch, 3), batch["meta"][0].get("spare_for")) for batch in loader]
    assert rows[:2] == [("k0", 0, None), ("k1", 1, None)]
    assert rows[2][2] == "k2"
