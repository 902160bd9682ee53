"""Reading shards: ours, those of plain webdataset, and broken ones."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from framestream.pipeline.errors import ConfigError, SampleError, ShardError
from framestream.pipeline.shards import RawSample, ShardSet, ShardWriter

from synthetic_shards import clip_key, make_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def all_keys(shards: ShardSet) -> list[str]:
    return [shards.read(*shards.locate(i)).key for i in range(shards.num_samples)]


# --- our own shards ---------------------------------------------------------------------------------------------


def test_a_written_set_reads_back(tmp_path: Path) -> None:
    shards = ShardSet.open(make_shards(tmp_path / "s"))
    assert shards.names == ("clips-000000.tar", "clips-000001.tar", "clips-000002.tar")
    assert shards.sizes == (5, 5, 2)
    assert shards.problems == ()
    assert all_keys(shards) == [clip_key(i) for i in range(12)]
    sample = shards.read(*shards.locate(7))
    assert sample.text == "clip number 7"
    assert sample.meta["user"] == {"number": 7}
    assert sample.meta_error == ""
    assert sample.video[4:8] == b"ftyp"
    assert sample.info is not None
    assert sample.info.num_frames == 32


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (make_shards(tmp_path / name) for name in "ab")
    files = sorted(p.name for p in one.iterdir())
    assert files == sorted(p.name for p in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    with tarfile.open(one / "clips-000000.tar") as tar:
        infos = tar.getmembers()
    assert [i.name for i in infos[:3]] == [f"{clip_key(0)}.{ext}" for ext in ("json", "mp4", "txt")]
    assert {(i.mtime, i.uid, i.gid, i.mode, i.uname) for i in infos} == {(0, 0, 0, 0o644, "")}


@pytest.mark.parametrize("how", ["folder", "path", "glob", "braces", "list", "url"])
def test_all_ways_to_name_shards_give_the_same_set(tmp_path: Path, how: str) -> None:
    folder = make_shards(tmp_path / "s p[1]{x}")
    plain = tmp_path / "plain"
    folder.rename(plain)
    ways = {
        "folder": str(plain),
        "path": plain,
        "glob": f"{plain}/clips-*.tar",
        "braces": f"{plain}/clips-{{000000..000002}}.tar",
        "list": [plain / f"clips-00000{i}.tar" for i in range(3)],
        "url": f"file://{plain}",
    }
    expected, got = ShardSet.open(plain), ShardSet.open(ways[how])
    assert got.fingerprint == expected.fingerprint
    assert all_keys(got) == all_keys(expected)


def test_a_literal_path_with_pattern_characters_is_read(tmp_path: Path) -> None:
    assert ShardSet.open(make_shards(tmp_path / "s [1]{x}")).num_samples == 12


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    here = ShardSet.open(make_shards(tmp_path / "a"))
    moved = ShardSet.open((tmp_path / "a").rename(tmp_path / "b"))
    other = ShardSet.open(make_shards(tmp_path / "c", num_frames=24))
    assert here.fingerprint == moved.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("shards", "error", "words"),
    [
        ("pipe:cat x.tar", ConfigError, "shell"),
        ("cat x.tar |", ConfigError, "shell"),
        ([], ConfigError, "no shards"),
        ([3], ConfigError, "int"),
        ("/no/such/place", ShardError, "does not exist"),
        ("/no/such/*.tar", ShardError, "no file matches"),
        ("{5..2}.tar", ConfigError, "range"),
        ("{0..99999999999}.tar", ConfigError, "range"),
        ("nosuch://bucket/x.tar", ConfigError, "nosuch"),
    ],
)
def test_impossible_arguments_are_refused(shards: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ShardSet.open(shards)  # type: ignore[arg-type]


def test_a_folder_without_tars_says_where_they_are(tmp_path: Path) -> None:
    make_shards(tmp_path / "train", num_samples=2)
    with pytest.raises(ShardError, match="train"):
        ShardSet.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=r"no \.tar"):
        ShardSet.open(tmp_path / "empty")


def test_one_shard_named_twice_is_refused(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", num_samples=2)
    with pytest.raises(ConfigError, match="twice"):
        ShardSet.open([folder, folder / "clips-000000.tar"])


def test_locate_is_the_stored_order(tmp_path: Path) -> None:
    shards = ShardSet.open(make_shards(tmp_path / "s"))
    assert [shards.locate(i) for i in (0, 4, 5, 9, 10, 11)] == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 1)]
    for index in (-1, 12):
        with pytest.raises(IndexError):
            shards.locate(index)


def _read_in_child(shards: ShardSet, queue: multiprocessing.Queue[list[str]]) -> None:
    queue.put(all_keys(shards))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_open_handles_do_not_cross_into_other_processes(tmp_path: Path, method: str) -> None:
    shards = ShardSet.open(make_shards(tmp_path / "s"))
    expected = all_keys(shards)  # opens handles here
    context = multiprocessing.get_context(method)
    queue: multiprocessing.Queue[list[str]] = context.Queue()
    child = context.Process(target=_read_in_child, args=(shards, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
    assert all_keys(pickle.loads(pickle.dumps(shards))) == expected


def test_a_large_set_is_cheap_to_pickle_and_keeps_few_files_open(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", samples_per_shard=1) as writer:
        for i in range(60):
            writer.write(f"k{i}", b"video", "mp4")
    shards = ShardSet.open(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))
    assert all_keys(shards) == [f"k{i}" for i in range(60)]
    assert len(os.listdir("/proc/self/fd")) - before <= 33
    assert len(pickle.dumps(shards)) < 60 * 300


def test_only_wanted_members_are_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", b"video", "webm", {"x": 1}, "words", extra={"npy": b"array"})
    shards = ShardSet.open(tmp_path)
    assert set(shards.read(0, 0).members) == {"webm", "json", "txt"}
    assert set(shards.read(0, 0, want=["video"]).members) == {"webm"}
    assert set(shards.read(0, 0, want={"npy", "json", "flac"}).members) == {"npy", "json"}


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "x" * 91, "a\nb", " a", "ü" * 46])
def test_the_writer_refuses_keys_that_others_would_read_differently(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path) as writer, pytest.raises(ConfigError, match="key"):
        writer.write(key, b"video")


def test_the_writer_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("a", b"v")
        with pytest.raises(ConfigError, match="before"):
            writer.write("a", b"v")
        with pytest.raises(ConfigError, match="extension"):
            writer.write("b", b"v", "exe")
        with pytest.raises(ConfigError, match="JSON"):
            writer.write("c", b"v", meta={"x": float("nan")})
        with pytest.raises(ConfigError, match="pyd"):
            writer.write("d", b"v", extra={"pyd": b""})
    with pytest.raises(ConfigError, match="already has"):
        ShardWriter(tmp_path / "s")
    assert ShardSet.open(tmp_path / "s").num_samples == 1


def test_a_writer_that_fails_leaves_whole_shards_only(tmp_path: Path) -> None:
    def fill() -> None:
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for i in range(3):
                writer.write(f"k{i}", b"v")
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        fill()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clips-000000.idx.json", "clips-000000.tar"]
    assert ShardSet.open(tmp_path).num_samples == 2


# --- webdataset, both ways --------------------------------------------------------------------------------------


def test_plain_webdataset_reads_our_shards(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s")
    urls = sorted(str(p) for p in folder.glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [clip_key(i) for i in range(12)]
    ours = ShardSet.open(folder)
    for i, sample in enumerate(samples):
        raw = RawSample.from_webdataset(sample)
        assert raw.members == ours.read(*ours.locate(i)).members
        assert raw.text == f"clip number {i}"


def test_plain_webdataset_shards_are_read(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    with wds.ShardWriter(f"{tmp_path}/w/x-%03d.tar", maxcount=2, verbose=0) as sink:
        for i in range(5):
            sink.write({"__key__": f"sub/clip{i}", "mp4": b"video%d" % i, "json": {"n": i}, "cls": i, "txt": f"t{i}"})
    shards = ShardSet.open(tmp_path / "w")
    assert shards.sizes == (2, 2, 1)
    assert all_keys(shards) == [f"sub/clip{i}" for i in range(5)]
    sample = shards.read(*shards.locate(3))
    assert (sample.video, sample.meta, sample.text) == (b"video3", {"n": 3}, "t3")
    assert set(sample.members) == {"mp4", "json", "txt"}
    assert (tmp_path / "w" / "x-000.idx.json").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").iterdir()}
    assert ShardSet.open(tmp_path / "w").fingerprint == shards.fingerprint
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "w").iterdir()} == before


def test_decoded_webdataset_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"before any \.decode"):
        RawSample.from_webdataset({"__key__": "a", "mp4": b"v", "json": {"decoded": True}})
    with pytest.raises(ConfigError, match="__key__"):
        RawSample.from_webdataset({"mp4": b"v"})


# --- habits of others -------------------------------------------------------------------------------------------


def test_foreign_names(tmp_path: Path) -> None:
    long = "folder/" + "n" * 120
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("./a.mp4", b"1"),
            ("b.left.MP4", b"2"),
            ("c.x.mp4", b"3"),
            ("c.y.mp4", b"4"),
            (f"{long}.mp4", b"5"),
            ("кадр.webm", b"6"),
            ("README", b""),
            (".hidden", b""),
            ("d.json", b"{}"),
            ("e.mp4", b"7"),
            ("a.txt", b"late"),
            ("e.mp4", b"8"),
            ("e.pyd", b"never read"),
        ],
    )
    shards = ShardSet.open(path)
    samples = {s.key: s for s in (shards.read(*shards.locate(i)) for i in range(shards.num_samples))}
    assert {key: s.video for key, s in samples.items()} == {
        "a": b"1", "b": b"2", long: b"5", "кадр": b"6", "e": b"7",
    }  # fmt: skip
    assert samples["a"].text == "late"
    assert set(samples["e"].members) == {"mp4"}
    text = " ".join(shards.problems)
    assert all(
        words in text for words in ("'c' has no video (or several)", "'d' has no video", "'e' has its .mp4 twice")
    )


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_dialects(tmp_path: Path, format: int) -> None:
    name = "d" * 60 + "/" + "k" * 90
    path = write_tar(tmp_path / "x.tar", [(f"{name}.mp4", b"video"), (f"{name}.json", b"{}")], format=format)
    shards = ShardSet.open(path)
    assert shards.read(0, 0).key == name
    assert shards.problems == ()


@pytest.mark.parametrize(
    ("json_bytes", "words"),
    [
        (b"{broken", "damaged"),
        (b"[1]", "list"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (None, "no .json"),
    ],
)
def test_damaged_metadata_is_empty_and_marked(tmp_path: Path, json_bytes: bytes | None, words: str) -> None:
    members = [("a.mp4", b"video")] + ([("a.json", json_bytes)] if json_bytes is not None else [])
    sample = ShardSet.open(write_tar(tmp_path / "x.tar", members)).read(0, 0)
    assert sample.meta == {}
    assert words in sample.meta_error
    assert sample.text == ""
    assert sample.info is None


def test_a_read_only_folder_is_indexed_in_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    tar = write_tar(folder / "x.tar", [("a.mp4", b"video"), ("a.json", b"{}")])
    if os.geteuid() == 0:  # root writes everywhere, but not into a folder that stands where the index would go
        (folder / "x.idx.json").mkdir()
    folder.chmod(0o555)
    try:
        assert ShardSet.open(folder).num_samples == 1
        assert list((tmp_path / "cache" / "index").iterdir())
        assert ShardSet.open(folder).read(0, 0).video == b"video"
    finally:
        folder.chmod(0o755)
    write_tar(tar, [("b.mp4", b"other"), ("b.json", b"{}")])
    os.utime(tar, ns=(1, 1))
    assert ShardSet.open(folder).read(0, 0).key == "b"


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_cut_at_any_block_serves_what_is_whole(tmp_path: Path, indexed: bool) -> None:
    """Every multiple of 512 and the bytes around it, with and without the index that the writer left."""
    whole = tmp_path / "whole"
    with ShardWriter(whole) as writer:
        for i in range(3):
            writer.write(f"k{i}", bytes([i]) * (700 + i), "mp4", {"n": i}, f"text {i}")
    tar = (whole / "clips-000000.tar").read_bytes()
    index = (whole / "clips-000000.idx.json").read_bytes()
    places = [members for _, members in json.loads(index)["samples"]]
    ends = [max(-(-(offset + size) // 512) * 512 for offset, size in members.values()) for members in places]
    data_ends = [max(offset + size for offset, size in members.values()) for members in places]
    for cut in sorted({c for block in range(0, len(tar), 512) for c in (block - 1, block, block + 1) if c >= 0}):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "clips-000000.tar").write_bytes(tar[:cut])
        if indexed:
            (folder / "clips-000000.idx.json").write_bytes(index)
        expected = [f"k{i}" for i, end in enumerate(data_ends) if end <= cut]
        txt_offset, (mp4_offset, mp4_size) = places[0]["txt"][0], places[0]["mp4"]
        if not indexed and mp4_offset + mp4_size <= cut < txt_offset:
            expected = ["k0"]  # nothing left in the file tells that a .txt should follow
        if not expected:
            with pytest.raises(ShardError, match=r"clips-000000\.tar"):
                ShardSet.open(folder)
            continue
        shards = ShardSet.open(folder)
        assert all_keys(shards) == expected, cut
        for i in range(shards.num_samples):
            assert shards.read(0, i).video == bytes([i]) * (700 + i)
        if indexed or cut < ends[-1] + 1024:
            assert "clips-000000.tar" in " ".join(shards.problems), cut
        half = (
            []
            if expected == ["k0"] and cut < txt_offset
            else [
                i for i, (end, start) in enumerate(zip(data_ends, [0, *ends], strict=False)) if start + 512 <= cut < end
            ]
        )
        for i in half:
            assert f"'k{i}' is not whole" in " ".join(shards.problems), cut
        if indexed:  # the writer's index is evidence of what was there; reading does not touch it
            assert (folder / "clips-000000.idx.json").read_bytes() == index


def test_a_cut_shard_does_not_spoil_the_others(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s")
    path = folder / "clips-000001.tar"
    path.write_bytes(path.read_bytes()[:-30_000])
    shards = ShardSet.open(folder)
    assert shards.sizes[0] == 5
    assert 0 < shards.sizes[1] < 5
    assert any("clips-000001.tar" in p and "lost" in p for p in shards.problems)
    assert len(all_keys(shards)) == shards.num_samples


def test_a_damaged_header_in_a_foreign_tar_is_not_the_end_of_it_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"k{i}.mp4", b"video") for i in range(4)], format=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 3] ^= 0xFF  # in the name of k2
    path.write_bytes(data)
    shards = ShardSet.open(path)
    assert all_keys(shards) == ["k0", "k1"]
    assert "damaged header at byte 2048" in " ".join(shards.problems)


def test_two_tars_in_one_file_are_noticed(tmp_path: Path) -> None:
    a, b = (write_tar(tmp_path / f"{k}.tar", [(f"{k}.mp4", b"v")]) for k in "ab")
    a.write_bytes(a.read_bytes() + b.read_bytes())
    assert "behind its end marker" in " ".join(ShardSet.open(a).problems)


@pytest.mark.parametrize("content", [b"", b"no tar" * 1000, b"\x1f\x8b" + bytes(2000), bytes(10240)])
def test_files_that_hold_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"x\.tar"):
        ShardSet.open(tmp_path)
    write_tar(tmp_path / "y.tar", [("a.mp4", b"v")])
    shards = ShardSet.open(tmp_path)
    assert shards.sizes == (0, 1)
    assert shards.locate(0) == (1, 0)


def test_a_shard_that_changes_behind_its_index_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.mp4", b"first"), ("b.mp4", b"other")], format=tarfile.USTAR_FORMAT)
    shards = ShardSet.open(path)
    write_tar(path, [("b.mp4", b"other"), ("a.mp4", b"first")], format=tarfile.USTAR_FORMAT)
    assert ShardSet.open(path).num_samples == 2  # same size: the index beside it still counts
    with pytest.raises(SampleError, match="another version"):
        shards.read(0, 0)


def test_a_shard_cut_after_opening_is_a_sample_error(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", num_samples=3)
    shards = ShardSet.open(folder)
    assert shards.read(0, 2).key == clip_key(2)
    os.truncate(folder / "clips-000000.tar", 5000)
    with pytest.raises(SampleError, match=clip_key(2)):
        shards.read(0, 2)


def test_a_listed_shard_that_is_gone_is_reported(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s")
    (folder / "clips-000001.tar").unlink()
    assert "clips-000001.tar is listed" in " ".join(ShardSet.open(folder).problems)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version":99,"shards":[]}'])
def test_a_damaged_index_is_worked_round(tmp_path: Path, content: bytes) -> None:
    folder = make_shards(tmp_path / "s")
    (folder / "index.json").write_bytes(content)
    (folder / "clips-000001.idx.json").write_bytes(content)
    shards = ShardSet.open(folder)
    assert all_keys(shards) == [clip_key(i) for i in range(12)]
    assert "index.json" in " ".join(shards.problems)
