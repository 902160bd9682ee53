"""Damaged tars through the loader: complete samples come, half ones do not, and a sentence names the shard."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from framestream.pipeline.errors import SampleError, ShardError
from framestream.pipeline.shards import ShardSet, ShardWriter

from tars import load, number_of, special, tiny_meta, tiny_video, write_tar

BLOCK = 512
NAME = "clips-000000.tar"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of three samples, each with json, mp4 and txt, as the writer leaves it."""
    folder = tmp_path_factory.mktemp("written")
    with ShardWriter(folder) as writer:
        for number in range(3):
            writer.write(f"k{number}", tiny_video(number), "mp4", tiny_meta(number), f"text {number}")
    return folder


def copy(written: Path, folder: Path, tar: bytes, *files: str) -> Path:
    folder.mkdir()
    (folder / NAME).write_bytes(tar)
    for name in files:
        (folder / name).write_bytes((written / name).read_bytes())
    return folder


def delivered(loader: Any, clips: int = 3) -> list[tuple[str, int, str]]:
    """(key, number of the clip by its pixels, text) of an epoch without rejects."""
    assert not loader.stats()["rejects"]
    return [(batch["keys"][0], number_of(batch, clips), batch["text"][0]) for batch in loader]


# -- cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [(), ("clips-000000.idx.json",), ("index.json",), ("clips-000000.idx.json", "index.json")],
    ids=["no index", "own index", "index of the folder", "both"],
)
def test_a_tar_cut_at_any_block_gives_an_epoch_of_what_is_whole(
    written: Path, files: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = (written / NAME).read_bytes()
    samples = json.loads((written / "clips-000000.idx.json").read_bytes())["samples"]
    ends = [max(offset + size for offset, size in members.values()) for _, members in samples]
    first = samples[0][1]
    for cut in range(0, len(tar), BLOCK):
        caplog.clear()
        folder = copy(written, tmp_path / f"cut{cut}", tar[:cut], *files)
        whole = [number for number, end in enumerate(ends) if end <= cut]
        texts = {number: f"text {number}" for number in whole}
        promised = "clips-000000.idx.json" in files
        if not promised and first["mp4"][0] + first["mp4"][1] <= cut < first["txt"][0]:
            whole, texts = [0], {0: "clip 0"}  # nothing left tells that a .txt, which wins over the JSON, should follow
        if not whole:
            with pytest.raises(ShardError, match=NAME):
                load(folder)
            continue
        loader = load(folder)
        assert len(loader) == len(whole), cut
        assert delivered(loader) == [(f"k{number}", number, texts[number]) for number in whole], cut
        # Without an index nobody knows that zeros are missing behind the end marker.
        if files or cut < -(-ends[-1] // BLOCK) * BLOCK + 2 * BLOCK:
            assert NAME in caplog.text, cut


def test_workers_serve_a_cut_tar_beside_a_whole_one(written: Path, tmp_path: Path) -> None:
    tar = (written / NAME).read_bytes()
    folder = copy(written, tmp_path / "s", tar, "clips-000000.idx.json")
    (folder / "more-000000.tar").write_bytes(tar[: len(tar) // 2])
    loader = load(folder, num_workers=2)
    try:
        rows = delivered(loader)
    finally:
        loader.close()
    assert 3 < len(loader) < 6
    assert [row[0] for row in rows] == [*("k0", "k1", "k2"), *("k0", "k1", "k2")[: len(loader) - 3]]
    assert all(key == f"k{number}" for key, number, _ in rows)


def test_a_tar_cut_between_two_members_has_no_half_sample_unlike_the_plain_reader(tmp_path: Path) -> None:
    import webdataset as wds

    members = [(f"k{n}.{ext}", data) for n in range(3) for ext, data in (("mp4", tiny_video(n)), ("json", b"{}"))]
    tar = write_tar(tmp_path / "x.tar", members, format=tarfile.USTAR_FORMAT)
    with tarfile.open(tar) as whole:
        last = whole.getmember("k2.json").offset
    tar.write_bytes(tar.read_bytes()[:last])
    plain = list(wds.WebDataset(str(tar), shardshuffle=False, empty_check=False))
    assert [set(sample) & {"mp4", "json"} for sample in plain][-1] == {"mp4"}
    loader = load(tar)
    assert [batch["keys"] for batch in loader] == [["k0"], ["k1"]]


# -- flipped ---------------------------------------------------------------------------------------------


def contents(shards: ShardSet) -> tuple[dict[str, dict[str, bytes]], list[str]]:
    """(members of every sample that can be read, the reasons of the others)."""
    read: dict[str, dict[str, bytes]] = {}
    reasons = []
    for index in range(shards.num_samples):
        try:
            sample = shards.read(*shards.locate(index))
        except SampleError as err:
            reasons.append(str(err))
        else:
            read[sample.key] = dict(sample.members)
    return read, reasons


def headers(tar: Path) -> list[int]:
    """Where each header stands, the extended ones of PAX among them."""
    with tarfile.open(tar) as opened:
        return [at for info in opened for at in range(info.offset, info.offset_data, BLOCK) if at not in names(tar)]


def names(tar: Path) -> list[int]:
    """Where the contents of PAX headers stand: names, without a checksum."""
    with tarfile.open(tar) as opened:
        return [info.offset + BLOCK for info in opened if info.offset_data - info.offset > BLOCK]


@pytest.mark.parametrize("indexed", [False, True], ids=["no index", "index"])
def test_every_flipped_byte_of_a_header_is_noticed_or_changes_nothing(
    indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").touch()  # thousands of indexes need not reach the disk
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "no-folder"))
    folder = tmp_path / "s"
    folder.mkdir()
    samples = {key: {"mp4": b"video %d" % n * 70, "json": b'{"n": %d}' % n} for n, key in enumerate(["a", "ключ"])}
    path = write_tar(folder / NAME, [(f"{k}.{e}", data) for k, m in samples.items() for e, data in m.items()])
    whole = path.read_bytes()
    blocks, unchecked = headers(path), names(path)
    assert (len(blocks), len(unchecked)) == (4 + 2, 2)  # one key is not ASCII
    if indexed:
        assert ShardSet.open(path).problems == ()  # leaves the index beside the tar
    index = folder / "clips-000000.idx.json"
    silent = 0
    for at in (block + byte for block in sorted(blocks + unchecked) for byte in range(BLOCK)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        if not indexed:
            index.unlink(missing_ok=True)
        try:
            shards = ShardSet.open(path)
        except ShardError as err:
            reasons = [str(err)]
            read = {}
        else:
            read, reasons = contents(shards)
            reasons += shards.problems
        assert all(NAME in reason for reason in reasons), at
        # Where a name has no checksum a member may come under another one, or under none, never among strangers.
        assert all(any(members.items() <= own.items() for own in samples.values()) for members in read.values()), at
        assert reasons or read == samples or at // BLOCK * BLOCK in unchecked, at
        silent += not reasons and at // BLOCK * BLOCK in blocks
    # Spaces and zeros around the checksum may be otherwise. With an index, headers of names are not read any more.
    assert silent < 16 * len(blocks) + (2 * BLOCK if indexed else 0)


def test_flipped_header_bytes_cost_the_loader_their_sample_only(written: Path, tmp_path: Path) -> None:
    tar = (written / NAME).read_bytes()
    for at in (block + byte for block in headers(written / NAME) for byte in (0, 100, 126, 150, 156, 300)):
        data = bytearray(tar)
        data[at] ^= 0x11
        folder = copy(written, tmp_path / f"flip{at}", bytes(data), "clips-000000.idx.json", "index.json")
        refused = {}
        for batch in load(folder):
            key, meta = batch["keys"][0], batch["meta"][0]
            assert key == f"k{number_of(batch, 3)}"
            refused |= {reject["key"]: reject["reason"] for reject in meta.get("rejects", ())}
        assert len(refused) == 1, at
        assert NAME in next(iter(refused.values()))


def test_flipped_bytes_of_a_video_are_noticed_or_do_not_matter(written: Path, tmp_path: Path) -> None:
    """With our metadata no damaged frame is delivered; damaged JSON is not taken for another clip's."""
    sound = list(load(written))[1]["video_frames"]
    noticed = 0
    tar = (written / NAME).read_bytes()
    places = json.loads((written / "clips-000000.idx.json").read_bytes())["samples"][1][1]
    for ext, step in (("mp4", 97), ("json", 7)):
        offset, size = places[ext]
        for at in range(offset, offset + size, step):
            data = bytearray(tar)
            data[at] ^= 1 << at % 8
            folder = copy(written, tmp_path / f"flip{at}", bytes(data), "clips-000000.idx.json", "index.json")
            batches = list(load(folder))
            assert len(batches) == 3
            assert [f"k{number_of(batch, 3)}" for batch in batches] == [batch["keys"][0] for batch in batches]
            rejects = batches[1]["meta"][0].get("rejects", [])
            if ext == "mp4" and rejects:
                noticed += 1
                assert [reject["key"] for reject in rejects] == ["k1"], at
                assert NAME in rejects[0]["shard"]
                assert "k1" in rejects[0]["reason"]
            elif ext == "mp4":  # a byte that no frame needs
                assert torch.equal(batches[1]["video_frames"], sound)
        assert ext == "json" or noticed > size / step / 3


# -- whole files -----------------------------------------------------------------------------------------


def test_zeros_in_place_of_a_header_end_the_tar_with_a_sentence(tmp_path: Path) -> None:
    members = [(f"k{n}.{ext}", data) for n in range(3) for ext, data in (("mp4", tiny_video(n)), ("json", b"{}"))]
    tar = write_tar(tmp_path / "x.tar", members, format=tarfile.USTAR_FORMAT)
    with tarfile.open(tar) as whole:
        places = [info.offset for info in whole]
    data = tar.read_bytes()
    for number, at in enumerate(places):
        for size in (BLOCK, 2 * BLOCK, 256 * BLOCK):
            other = tmp_path / f"zeros-{at}-{size}.tar"
            other.write_bytes(data[:at] + bytes(size) + data[at + size :] + (bytes(size) + data if size > 999 else b""))
            # Two blocks of zeros may as well be the end of a tar with another one behind it. One block is damage, and
            # of the first sample nothing tells whether it is whole.
            samples = {1: 1 if size > BLOCK else 0, 2: 1 if size > BLOCK else 0}.get(number, number // 2)
            if not samples:
                with pytest.raises(ShardError, match="zeros-"):
                    ShardSet.open(other)
                continue
            shards = ShardSet.open(other)
            assert shards.sizes == (samples,)
            assert "goes on behind its end marker" in " ".join(shards.problems)


def test_what_is_no_tar_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import gzip

    good = write_tar(tmp_path / "good.tar", [("a.mp4", tiny_video(0))])
    bad = {
        "compressed": gzip.compress(good.read_bytes()),
        "empty": b"",
        "end": bytes(10240),
        "text": b"no tar" * 1000,
        "short": good.read_bytes()[:100],
    }
    for name, data in bad.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ShardError, match=rf"{name}\.tar"):
            load(tmp_path / f"{name}.tar")
    with caplog.at_level(logging.WARNING):
        loader = load(tmp_path)
    assert delivered(loader) == [("a", 0, "")]
    assert all(f"{name}.tar" in caplog.text for name in bad)
    assert "has to be unpacked first" in caplog.text


def test_two_tars_in_one_file_give_the_first_and_a_sentence(tmp_path: Path) -> None:
    import webdataset as wds

    parts = [write_tar(tmp_path / f"part{n}", [(f"k{n}.mp4", tiny_video(n))]).read_bytes() for n in range(2)]
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(parts))
    assert [s["__key__"] for s in wds.WebDataset(str(both), shardshuffle=False, empty_check=False)] == ["k0"]
    shards = ShardSet.open(both)
    assert "both.tar goes on behind its end marker" in " ".join(shards.problems)
    assert delivered(load(shards)) == [("k0", 0, "")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_links_are_left_out_with_a_sentence(kind: bytes, tmp_path: Path) -> None:
    members = [
        ("a.mp4", tiny_video(0)),
        special("b.mp4", kind, "a.mp4"),
        ("b.json", b"{}"),
        special("c.mp4", kind, "/x"),
    ]
    tar = write_tar(tmp_path / "x.tar", members)
    shards = ShardSet.open(tar)
    assert delivered(load(shards)) == [("a", 0, "")]
    text = " ".join(shards.problems)
    assert "2 members are links or sparse, 'b.mp4' first" in text
    assert "'b' has no video" in text
