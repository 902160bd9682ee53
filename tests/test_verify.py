"""`framestream verify` finds every disagreement and changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.probe import VideoInfo
from framestream.pipeline.shards import ShardSet, ShardWriter
from framestream.tools.verify import ShardTask, check_shard, verify, verify_folder

from synthetic_shards import make_shards, small_video


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "s", num_samples=4, samples_per_shard=2, num_frames=20)


def problems(folder: Path, decode: str = "none") -> str:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = " ".join(verify_folder(folder, decode=decode, workers=1).problems)  # type: ignore[arg-type]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    return found


def edit_json(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("decode", ["none", "sample", "all"])
def test_sound_shards_pass(folder: Path, decode: str) -> None:
    assert problems(folder, decode) == ""


def test_any_flipped_byte_is_found(folder: Path) -> None:
    """At the beginning, in every member, in every kind of header field, in the padding and in the end marker."""
    path = folder / "clips-000000.tar"
    data = path.read_bytes()
    index = json.loads((folder / "clips-000000.idx.json").read_text())
    places = [place for _, members in index["samples"] for place in members.values()]
    spots = {0, 124, 148, 156, len(data) - 1}
    spots |= {offset + size // 2 for offset, size in places} | {offset + size for offset, size in places}
    for spot in sorted(spots):
        path.write_bytes(data[:spot] + bytes([data[spot] ^ 1]) + data[spot + 1 :])
        assert "clips-000000.tar" in problems(folder), spot


def test_a_changed_video_is_named_even_where_the_shard_checksum_was_adapted(tmp_path: Path) -> None:
    video, info = small_video(0, 20, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "t") as writer:
        for key in ("sound", "changed"):
            writer.write(key, video, meta={**info, "sha256": hashlib.sha256(video).hexdigest()})
    path = tmp_path / "t" / "clips-000000.tar"
    data = bytearray(path.read_bytes())
    offset, size = json.loads(path.with_suffix(".idx.json").read_text())["samples"][1][1]["mp4"]
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    verify_folder(tmp_path / "t", decode="none", repair_index=True, workers=1)
    text = problems(tmp_path / "t")
    assert "sample 'changed' has a .mp4 whose sha256" in text
    assert "sound" not in text


def test_absurd_metadata_costs_its_sample_only(tmp_path: Path) -> None:
    video, info = small_video(0, 20, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "t") as writer:
        writer.write("huge", video, meta={**info, "duration": 10**400})
        writer.write("many", video, meta={**info, "timestamps": [0] * 19 + [10**400]})
        writer.write("frames", video, meta={**info, "num_frames": 21})
    text = problems(tmp_path / "t", "sample")
    assert "sample 'huge' has metadata that does not describe" in text
    assert "sample 'many' has metadata that does not describe" in text
    assert "sample 'frames' has num_frames 20" in text


def test_an_error_nobody_expected_costs_its_sample_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, info = small_video(0, 20, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "t") as writer:
        writer.write("first", video, meta={**info, "codec": "odd"})
        writer.write("second", video, meta={**info, "num_frames": 21})

    def odd(record: dict) -> VideoInfo:  # type: ignore[type-arg]
        if record["codec"] == "odd":
            raise ZeroDivisionError("nobody thought of it")
        return from_json(record)

    from_json = VideoInfo.from_json
    monkeypatch.setattr(VideoInfo, "from_json", odd)
    found = check_shard(ShardTask(tmp_path / "t" / "clips-000000.tar", "none")).problems
    assert "sample 'first' cannot be checked (ZeroDivisionError: nobody thought of it)" in found[0]
    assert "sample 'second' has num_frames 20, its .json says 21" in found[1]


@pytest.mark.parametrize("cut", [0, 511, 512, 5000, -1, -512, -3000])
def test_a_cut_shard_is_found(folder: Path, cut: int) -> None:
    path = folder / "clips-000001.tar"
    path.write_bytes(path.read_bytes()[:cut])
    assert "clips-000001.tar" in problems(folder)


def test_what_the_indexes_say_is_compared(folder: Path) -> None:
    edit_json(folder / "index.json", lambda c: c["shards"][0].update(samples=9, sha256="0" * 64))
    edit_json(folder / "clips-000001.idx.json", lambda c: c["samples"].pop())
    text = problems(folder)
    assert "clips-000000.tar has samples 2, index.json says 9" in text
    assert "clips-000000.tar has sha256" in text
    assert "clips-000001.idx.json does not list what is in clips-000001.tar" in text


def test_missing_and_stray_files_are_named(folder: Path) -> None:
    (folder / "clips-000000.tar").unlink()
    (folder / "clips-000001.idx.json").unlink()
    (folder / ".clips-000002.tar.7.tmp").write_bytes(b"half")
    (folder / "more.tar").write_bytes((folder / "clips-000001.tar").read_bytes())
    text = problems(folder)
    for words in (
        "clips-000000.tar is listed in index.json and missing",
        "clips-000000.idx.json has no shard beside it",
        "clips-000001.tar has no clips-000001.idx.json",
        ".clips-000002.tar.7.tmp was left by a killed run",
        "more.tar is not listed",
        "key 'clip-0002' is in clips-000001.tar and more.tar",
    ):
        assert words in text


def test_metadata_is_compared_with_the_video(tmp_path: Path) -> None:
    video, info = small_video(0, 20, (96, 64), ".mp4")
    with ShardWriter(tmp_path) as writer:
        writer.write("frames", video, meta={**info, "num_frames": 21})
        writer.write("keys", video, meta={**info, "key_frames": [0, 3]})
        writer.write("none", video, meta={"user": {}})
        writer.write("cut", video[: len(video) // 2], meta=info)
        writer.write("junk", b"junk", meta=info)
    text = problems(tmp_path)
    assert "sample 'frames' has num_frames 20, its .json says 21" in text
    assert "sample 'keys' has key_frames" in text
    assert "sample 'none' has metadata that does not describe" in text
    assert "sample 'cut' has no readable video" in text
    assert "sample 'junk' has no readable video" in text


def test_a_video_that_does_not_decode_is_found_by_decoding_all(tmp_path: Path) -> None:
    video, info = small_video(1, 20, (96, 64), ".mp4")
    data = bytearray(video)
    begin = data.index(b"mdat") + 2000
    data[begin : begin + 600] = bytes(600)
    without = {name: value for name, value in info.items() if name != "packets"}
    for folder, meta in (("a", info), ("b", without)):
        with ShardWriter(tmp_path / folder) as writer:
            writer.write("hole", bytes(data), meta=meta)
    assert "sample 'hole' has packets other than its .json says" in problems(tmp_path / "a", "none")
    assert problems(tmp_path / "b", "none") == ""
    assert "sample 'hole' does not decode" in problems(tmp_path / "b", "all")


def test_splits_are_checked_together_and_exit_codes(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "d" / "train", num_samples=2)
    make_shards(tmp_path / "d" / "val", num_samples=1)
    assert verify(str(tmp_path / "d"), decode="none", workers=1) == 0
    assert "everything agrees" in capsys.readouterr().out
    (tmp_path / "d" / "val" / "index.json").unlink()
    assert verify(str(tmp_path / "d"), decode="none", workers=1) == 1
    assert "val: there is no index.json" in capsys.readouterr().out
    assert verify(str(tmp_path / "d"), decode="none", repair_index=True, workers=1) == 0
    assert ShardSet.open(tmp_path / "d" / "val").num_samples == 1
    (tmp_path / "empty").mkdir()
    assert verify(str(tmp_path / "empty")) == 2
    assert "holds no .tar" in capsys.readouterr().err


def test_repair_writes_the_same_index_as_the_writer(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for path in [*folder.glob("*.json")]:
        path.write_bytes(b"damaged")
    assert verify_folder(folder, decode="none", repair_index=True, workers=1).problems == []
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_impossible_requests(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="does not exist"):
        verify_folder(tmp_path / "x")
    (tmp_path / "x.tar").touch()
    with pytest.raises(ShardError, match="is a file: give the folder"):
        verify_folder(tmp_path / "x.tar")
    with pytest.raises(ConfigError, match="decode"):
        verify_folder(tmp_path, decode="some")  # type: ignore[arg-type]
