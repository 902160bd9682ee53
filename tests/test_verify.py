"""`framestream verify` finds every disagreement and changes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.shards import ShardSet, ShardWriter
from framestream.tools.shard_job import Part
from framestream.tools.shard_options import ShardOptions
from framestream.tools.shard_run import run, shard_job
from framestream.tools.verify import verify, verify_folder
from framestream.tools.verify_shard import ShardTask, check_shard, chosen

from fault_proxy import FaultProxy, RangeServer, running
from remote_storage import http_storage, s3_server, s3_storage, upload
from synthetic import video_bytes
from synthetic_shards import clip_key, make_shards, small_video
from tars import write_tar


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
    for index in (tmp_path / "t").glob("*.json"):
        index.unlink()
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
    found = check_shard(ShardTask(str(tmp_path / "t" / "clips-000000.tar"), "none")).problems
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


@pytest.mark.parametrize(
    ("false", "words"),
    [
        ({"fps": 25.0}, "has fps 24, its .json says 25"),
        ({"duration": 3.0}, "has duration"),
        ({"timestamps": [0.05 * n for n in range(20)]}, "has frames at other times"),
        ({"has_audio": True}, "has has_audio False"),
        ({"pix_fmt": "rgb24"}, "has pix_fmt yuv420p"),
        ({"text": "a cat"}, "has a .txt that is not the text"),
        ({"clip_start": 5.0}, "has clip_start 5.0 and clip_end 2.0"),
        ({"clip_end": "soon"}, "which are no stretch"),
    ],
)
def test_false_metadata_is_found_without_packets(tmp_path: Path, false: dict[str, Any], words: str) -> None:
    video, info = small_video(0, 20, (96, 64), ".mp4")
    sound = {name: value for name, value in info.items() if name != "packets"}
    sound |= {"clip_start": 1.0, "clip_end": 2.0, "text": "a dog"}
    with ShardWriter(tmp_path / "t") as writer:
        writer.write("true", video, text="a dog", meta=sound)
        writer.write("false", video, text="a dog", meta={**sound, **false})
    text = problems(tmp_path / "t")
    assert f"sample 'false' {words}" in text or words in text
    assert "'true'" not in text


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


# Which videos are decoded


def test_a_share_of_the_videos_is_decoded_and_the_same_ones_again(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", num_samples=40, samples_per_shard=7, num_frames=6)
    first, second = (verify_folder(folder, decode_share=0.3, workers=1).num_decoded for _ in range(2))
    assert 0 < first == second < 40
    small, large = ({n for n in range(1000) if chosen(clip_key(n), share)} for share in (0.05, 0.3))
    assert small < large
    assert 20 < len(small) < 100
    assert not any(chosen(clip_key(n), 0.0) for n in range(1000))
    assert all(chosen(clip_key(n), 1.0) for n in range(1000))
    with pytest.raises(ConfigError, match=r"decode_share is 1\.5"):
        verify_folder(folder, decode_share=1.5)


# A decoder that hangs or crashes


def endless_video() -> bytes:
    """A small file that takes long to decode: the packets of one short GOP, again and again."""
    data = video_bytes(num_frames=2, size=(1920, 1080), gop=2, b_frames=0)
    whole = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(whole, "w", format="mp4") as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        for number in range(3000):
            packet = av.Packet(bytes(packets[number % 2]))
            packet.is_keyframe = number % 2 == 0
            packet.stream, packet.time_base = copy, stream.time_base
            packet.pts = packet.dts = number * (packets[1].pts - packets[0].pts)
            container.mux(packet)
    return whole.getvalue()


@pytest.mark.slow
def test_a_clip_that_hangs_its_decoder_costs_itself_only(tmp_path: Path) -> None:
    """It is in the second shard, and second there: the first task of a process has time to import."""
    video, info = small_video(0, 20, (96, 64), ".mp4")
    endless = endless_video()
    with ShardWriter(tmp_path / "s", samples_per_shard=3) as writer:
        for key in ("a", "b", "c", "d"):
            writer.write(key, video, meta=info)
        writer.write("endless", endless, meta=probe_video(endless, packets=True).to_json())
        writer.write("changed", video, meta={**info, "num_frames": 21})
    calls: list[tuple[int, int, int]] = []
    report = verify_folder(
        tmp_path / "s", decode="all", workers=1, timeout_s=HANG_S, progress=lambda *numbers: calls.append(numbers)
    )
    assert [check.num_samples for _, check in report.checks] == [3, 3]
    assert report.num_decoded == 5
    words = f"clips-000001.tar: sample 'endless' cannot be checked: it took longer than {HANG_S:g} s"
    assert report.problems[0].startswith(words)
    assert all("sample 'changed'" in problem for problem in report.problems[1:])
    assert calls == [(0, 2, 0), (1, 2, 0), (2, 2, len(report.problems))]


HANG_S = 6.0


# Remote storage


def test_shards_in_a_bucket(tmp_path: Path) -> None:
    local = tmp_path / "d"
    make_shards(local / "train", num_samples=5, samples_per_shard=2, num_frames=12)
    make_shards(local / "val", num_samples=1, num_frames=12)
    path = local / "train" / "clips-000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (local / "train" / "clips-000002.idx.json").unlink()
    expected = verify_folder(local, decode="none", workers=1)
    assert expected.problems
    with s3_server() as server, s3_storage(local / "train", server, "set/train") as storage:
        upload(server, local / "val", "set/val")
        url = storage.url.removesuffix("/train")
        report = verify_folder(url, decode="none", workers=2, storage_options=storage.options)
        assert report.problems == expected.problems
        assert report.num_samples == expected.num_samples
        assert [place.name for place, _ in report.checks] == ["train"] * 3 + ["val"]
        with pytest.raises(ConfigError, match="is remote and nothing is written there"):
            verify_folder(url, repair_index=True, storage_options=storage.options)
        with pytest.raises(ShardError, match=r"holds no \.tar"):
            verify_folder(f"{url}/nothing", storage_options=storage.options)


def test_remote_shards_take_the_room_of_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "s", num_samples=8, samples_per_shard=1, num_frames=12)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    most = 0

    def measure(done: int, total: int, bad: int) -> None:
        nonlocal most
        most = max(most, sum(1 for path in scratch.rglob("*.tar")))

    with http_storage(folder) as storage:
        assert verify_folder(storage.url, decode="none", workers=2, progress=measure).problems == []
    assert most <= 2
    assert list(scratch.iterdir()) == []


def test_a_web_server_that_lists_nothing(tmp_path: Path) -> None:
    """What there is, is known from index.json, and from report.json where there are splits."""
    for split in ("train", "val"):
        make_shards(tmp_path / "d" / split, num_samples=3, samples_per_shard=2, num_frames=12)
    report_of = {"splits": {split: {"samples": 3, "shards": 2} for split in ("train", "val")}}
    (tmp_path / "d" / "report.json").write_text(json.dumps(report_of))
    (tmp_path / "d" / "val" / "clips-000001.tar").unlink()
    with running(RangeServer(tmp_path / "d")) as server, running(FaultProxy(server.url)) as proxy:
        proxy.inject("/", "403", times=1000)
        report = verify_folder(proxy.url, decode="none", workers=1)
        with pytest.raises(ShardError, match="403"):
            verify_folder(f"{proxy.url}/nothing")
    assert [check.name for _, check in report.checks] == ["clips-000000.tar", "clips-000001.tar"] * 2
    assert report.problems[0].startswith("val: clips-000001.tar")
    assert "cannot be found" in report.problems[0]
    assert "val has samples 2, report.json says 3." in report.problems


# Totals

SOUND: dict[str, Any] = {
    "inputs": {"found": 9, "sampled": 4, "rejected": 2, "filtered": 2, "duplicate": 1},
    "clips": {"planned": 6, "written": 4, "rejected": 2},
    "splits": {"": {"samples": 4, "shards": 2}},
}
CLIP, INPUT = '{"source": "x", "reason": "y", "key": "x-1"}\n', '{"source": "x"}\n'
LISTS = {"rejects.jsonl": INPUT + 2 * CLIP, "left_out.jsonl": 3 * INPUT}


def with_report(folder: Path, changes: dict[str, Any], lists: dict[str, str] | None = None) -> str:
    content = {part: {**sound, **changes.get(part, {})} for part, sound in SOUND.items()}
    (folder / "report.json").write_text(json.dumps(content))
    for name, lines in (LISTS if lists is None else lists).items():
        (folder / name).write_text(lines)
    return problems(folder)


def test_numbers_that_add_up(folder: Path) -> None:
    assert with_report(folder, {}) == ""
    only_clips = {"inputs": {"found": 8, "rejected": 1}}  # one lost a clip, the other all of them
    assert with_report(folder, only_clips, {**LISTS, "rejects.jsonl": 2 * CLIP}) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": {"found": 10}}, "10 inputs found, which are not 4 sampled + 2 rejected + 2 filtered + 1 duplicate"),
        ({"clips": {"planned": 7}}, "7 clips planned, which are not 4 written + 2 rejected"),
        ({"clips": {"written": 5, "planned": 7}}, "the shards hold 4 samples, report.json says 5 clips written"),
        ({"splits": {"": {"samples": 4, "shards": 3}}}, "the folder has shards 2, report.json says 3"),
        ({"splits": {"val": {"samples": 1, "shards": 1}}}, "val has shards 0, report.json says 1"),
        ({"clips": {"rejected": 1, "planned": 5}}, "rejects.jsonl lists 2 clips, report.json says 1 clips rejected"),
        ({"inputs": {"rejected": 4, "found": 11}}, "rejects.jsonl lists 1 inputs, report.json says 4 inputs rejected"),
        ({"inputs": {"filtered": 3, "found": 10}}, "left_out.jsonl lists 3 inputs, report.json says 4 filtered or"),
    ],
)
def test_numbers_that_do_not(folder: Path, changes: dict[str, Any], words: str) -> None:
    assert words in with_report(folder, changes)


def test_missing_and_damaged_reports_and_lists(folder: Path) -> None:
    text = with_report(folder, {}, {"rejects.jsonl": LISTS["rejects.jsonl"] + "[\n7\n"})
    assert "2 lines of rejects.jsonl are no JSON objects" in text
    assert "there is no left_out.jsonl beside report.json" in text
    (folder / "report.json").write_text("{")
    assert "report.json is damaged" in problems(folder)
    for others in (
        '{"inputs": 3, "clips": {"planned": "4"}, "splits": [1], "rejects": null}',
        "[]",
        '{"report": "ok"}',
    ):
        (folder / "report.json").write_text(others)
        assert problems(folder) == ""  # somebody else's
    assert with_report(folder, {"inputs": {"filtered": {"too short": 2}}}) == ""


def test_index_and_report_are_of_one_run(folder: Path) -> None:
    edit_json(folder / "index.json", lambda c: c.update(inputs=SOUND["inputs"], clips=SOUND["clips"]))
    assert with_report(folder, {}) == ""
    edit_json(folder / "index.json", lambda c: c["inputs"].update(found=8, rejected=1))
    assert problems(folder) == "index.json counts other inputs than report.json: they are of two runs."
    edit_json(folder / "index.json", lambda c: c["inputs"].update(found=7))
    assert "index.json says 7 inputs found, which are not 4 sampled + 1 rejected" in problems(folder)


# Repair


def test_a_set_that_a_run_has_not_finished_is_no_whole_set(tmp_path: Path) -> None:
    """And cannot be made to look like one."""
    for number in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.mp4").write_bytes(video_bytes(num_frames=8, first_index=number))
    out = tmp_path / "out"
    job = shard_job(out, ShardOptions(samples_per_shard=1), workers=1)
    with job.alone():
        run(job, [str(tmp_path / "in")], plan_only=True)
        run(job, [], part=Part(1, 2))
    for repair in (False, True):
        (told,) = verify_folder(out, decode="none", workers=1, repair_index=repair).problems
        assert told.startswith("a run of `framestream shard` has not come to its end here")
        assert not (out / "index.json").exists()
    with job.alone():
        run(job, [], part=Part(2, 2))
    assert verify_folder(out, workers=1).problems == []
    (out / "report.json").unlink()
    assert "has not come to its end" in problems(out)
    (out / ".plan.sqlite").unlink()
    assert "there is no report.json, although the run that wrote index.json wrote one" in problems(out)


def test_repair_touches_only_what_is_wrong(folder: Path) -> None:
    index = folder / "clips-000000.idx.json"
    content = {**json.loads(index.read_text()), "sha256": None}
    index.write_text(json.dumps(content, indent=2))  # says less than the writer's, and nothing wrong
    (folder / "clips-000001.idx.json").unlink()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    report = verify_folder(folder, decode="none", repair_index=True, workers=1)
    assert (report.problems, report.num_repaired) == ([], 1)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    assert after.pop("clips-000001.idx.json")
    assert after == before


def test_repair_keeps_what_the_writer_noted(folder: Path) -> None:
    index = folder / "clips-000000.idx.json"
    content = {**json.loads(index.read_text()), "note": {"plan": "x"}}
    index.write_text(json.dumps({**content, "samples": []}))
    verify_folder(folder, decode="none", repair_index=True, workers=1)
    assert json.loads(index.read_text()) == content
    folder_index = json.loads((folder / "index.json").read_text())
    changed = {**folder_index, "inputs": SOUND["inputs"], "shards": folder_index["shards"][:1]}
    (folder / "index.json").write_text(json.dumps(changed))
    assert verify_folder(folder, decode="none", repair_index=True, workers=1).num_repaired == 1
    assert json.loads((folder / "index.json").read_text()) == {**changed, "shards": folder_index["shards"]}


@pytest.mark.parametrize("lost", ["", "clips-000000.idx.json", "index.json"])
def test_repair_keeps_the_evidence_of_bytes_that_have_changed(folder: Path, lost: str) -> None:
    tar = folder / "clips-000000.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    (folder / "clips-000001.idx.json").unlink()
    if lost:
        (folder / lost).unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for _ in range(2):
        report = verify_folder(folder, decode="none", repair_index=True, workers=1)
        assert "clips-000000.tar has" in " ".join(report.problems)
        after = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert after.pop("clips-000001.idx.json")
        assert after == before


def test_repair_goes_round_a_shard_that_cannot_be_read(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "clips-000000.tar").chmod(0)
    (folder / "clips-000001.idx.json").unlink()
    before = (folder / "index.json").read_bytes()
    report = verify_folder(folder, decode="none", repair_index=True, workers=1)
    assert report.num_repaired == 1
    assert "clips-000000.tar" in " ".join(report.problems)
    assert (folder / "index.json").read_bytes() == before


# Metadata that is missing


def test_samples_without_metadata_among_others(tmp_path: Path) -> None:
    video, info = small_video(0, 20, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "t") as writer:
        writer.write("ours", video, meta=info)
    write_tar(tmp_path / "t" / "clips-000001.tar", [("theirs.mp4", video), ("more.mp4", video), ("more.json", b"{}")])
    text = problems(tmp_path / "t")
    assert "2 samples have no metadata about their video, 'theirs' in clips-000001.tar first" in text
    assert text.count("metadata") == 1


def test_a_key_that_is_everywhere_is_told_in_few_sentences(tmp_path: Path) -> None:
    video, info = small_video(0, 6, (96, 64), ".mp4")
    for number in range(2):
        with ShardWriter(tmp_path / "t", prefix=f"p{number}") as writer:
            for sample in range(30):
                writer.write(f"k{sample}", video, meta=info)
    repeated = [p for p in verify_folder(tmp_path / "t", decode="none", workers=1).problems if "key" in p]
    assert len(repeated) == 21
    assert "key 'k0' is in p0-000000.tar and p1-000000.tar." in repeated
    assert repeated[-1] == "10 more keys are in several shards."


# The command


def test_what_the_command_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(folder), decode_share=0.5, workers=1, log="json") == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["problems"] == []
    assert (facts["shards"], facts["samples"]) == (2, 4)
    assert 0 < facts["decoded"] < 4
    events = [json.loads(line) for line in said.err.splitlines()]
    assert [event["event"] for event in events] == ["progress", "end"]
    assert verify(str(folder), decode_share=0.5, workers=1) == 0
    said = capsys.readouterr()
    assert f"first and last frame of {facts['decoded']} of 4 videos were decoded" in said.out
    (folder / "index.json").unlink()
    assert verify(str(folder), decode="none", workers=1, log="quiet") == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "there is no index.json" in said.err


def test_ctrl_c(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", num_samples=200, samples_per_shard=1, num_frames=12)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import sys; from framestream.tools import progress; progress._Plain.first_after_s = 0.0; "
        "from framestream.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "verify", str(folder), "--decode", "all", "--workers", "2", "--log", "plain"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stderr is not None
    process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    said = process.stderr.read()
    assert process.wait() == 130
    assert "framestream verify: stopped; nothing was changed" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert list(scratch.iterdir()) == []


def children() -> int:
    """Processes that this one has begun and not yet seen end."""
    return sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux")
def test_as_many_processes_as_cores_that_it_may_run_on(folder: Path) -> None:
    allowed, before, seen = os.sched_getaffinity(0), children(), set()
    try:
        os.sched_setaffinity(0, {min(allowed)})
        verify_folder(str(folder), progress=lambda done, total, bad: seen.add(children() - before))
    finally:
        os.sched_setaffinity(0, allowed)
    assert max(seen) == 1
