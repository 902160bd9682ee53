"""`framestream shard` gives the same bytes every time: with any number of workers, killed anywhere, in parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from framestream.pipeline.errors import ConfigError
from framestream.tools import shard_job as shard_job_module
from framestream.tools.shard_job import Part
from framestream.tools.shard_options import Cutting, ShardOptions
from framestream.tools.shard_run import build_shards, run, shard_job
from framestream.tools.verify import summary, verify_folder

from shard_setup import make_folder, tree
from synthetic import make_video


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos") / "in")


OPTIONS = ShardOptions(cutting=Cutting(clip_seconds=0.5), samples_per_shard=3)
COPIES = ShardOptions(samples_per_shard=1)


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run with one worker writes."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    build_shards([str(videos)], folder, OPTIONS, workers=1)
    return tree(folder)


@pytest.fixture(scope="module")
def copies_folder(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of whole files: three shards of one sample."""
    folder = tmp_path_factory.mktemp("copies") / "out"
    build_shards([str(videos)], folder, COPIES, workers=1)
    return folder


@pytest.fixture(scope="module")
def copies(copies_folder: Path) -> dict[str, bytes]:
    return tree(copies_folder)


@pytest.fixture
def out(copies_folder: Path, tmp_path: Path) -> Path:
    """A finished output, to be damaged."""
    return Path(shutil.copytree(copies_folder, tmp_path / "out"))


def test_the_number_of_workers_does_not_show(videos: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    build_shards([str(videos)], tmp_path / "out", OPTIONS, workers=3)
    assert tree(tmp_path / "out") == reference


def test_a_second_run_does_no_work(videos: Path, out: Path, copies: dict[str, bytes]) -> None:
    steps: list[str] = []
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    build_shards([str(videos)], out, COPIES, workers=1, progress=lambda step, *_: steps.append(step))
    assert tree(out) == copies
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before
    assert steps == ["writing"]


@pytest.mark.parametrize("loss", ["tar", "index", "cut", "both", "leftovers", "folder index"])
def test_whatever_is_lost_is_made_again(videos: Path, out: Path, copies: dict[str, bytes], loss: str) -> None:
    second, index = out / "clips-000001.tar", out / "clips-000001.idx.json"
    if loss in ("tar", "both"):
        second.unlink()
    if loss in ("index", "both"):
        index.unlink()
    if loss == "cut":
        os.truncate(second, 1000)
    if loss == "leftovers":
        (out / ".clips-000003.tar.123-4-5af0.tmp").write_bytes(b"half")
        (out / ".index.json.123-4-5af0.tmp").write_bytes(b"half")
    if loss == "folder index":
        (out / "index.json").unlink()
        (out / "report.json").unlink()
    build_shards([str(videos)], out, COPIES, workers=1)
    assert tree(out) == copies


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.pop("digest"),
        lambda note: note.pop("lost"),
        lambda note: note.pop("seconds"),
        lambda note: note.update(version=1),
        lambda note: note.update(digest="of another plan"),
        lambda note: note.update(lost=[["a", "of a clip that is there"]]),
        lambda note: note.update(lost=3),
        lambda note: note.update(seconds="long"),
        lambda note: note.update(seconds=-1.0),
    ],
)
def test_a_shard_with_a_damaged_note_is_made_again(
    videos: Path, out: Path, copies: dict[str, bytes], change: Any
) -> None:
    index = out / "clips-000000.idx.json"
    content = json.loads(index.read_text())
    change(content["note"])
    index.write_text(json.dumps(content))
    build_shards([str(videos)], out, COPIES, workers=1)
    assert tree(out) == copies


OWN = {"clips-001.mov": b"1", "clips-000000.tar.bak": b"3", "clips-1/x.txt": b"4", "clips-000000-notes.idx.json": b"5",
       ".editor.tmp": b"6", "notes.tmp": b"7"}  # fmt: skip


def put(folder: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_users_files_in_the_output_stay(videos: Path, out: Path, copies: dict[str, bytes], overwrite: bool) -> None:
    put(out, OWN)
    for path in out.glob("clips-00000[12].tar"):
        path.unlink()
    build_shards([str(videos)], out, COPIES, workers=1, overwrite=overwrite)  # nothing has changed: both go on
    assert tree(out) == {**copies, **OWN}
    if overwrite:
        build_shards([str(videos)], out, OPTIONS, workers=1, overwrite=True)
        assert {name: data for name, data in tree(out).items() if name in OWN} == OWN
        assert (out / "clips-000003.tar").exists()


def test_nothing_is_removed_where_overwriting_is_impossible(videos: Path, out: Path, copies: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        build_shards([str(videos / "nothing")], out, COPIES, workers=1, overwrite=True)
    assert tree(out) == copies
    put(out, {"clips-2023.tar": b"2"})
    with pytest.raises(ConfigError, match=r"clips-2023\.tar from elsewhere"):
        build_shards([str(videos)], out, OPTIONS, workers=1, overwrite=True)
    assert tree(out) == {**copies, "clips-2023.tar": b"2"}


def test_a_shard_that_nobody_planned_is_no_part_of_the_set(videos: Path, out: Path) -> None:
    put(out, {"clips-000099.tar": b"precious"})
    with pytest.raises(ConfigError, match=r"clips-000099\.tar, which is not in its plan"):
        build_shards([str(videos)], out, COPIES, workers=1)
    assert (out / "clips-000099.tar").read_bytes() == b"precious"


def command(videos: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "framestream.tools.cli", "shard", str(videos), "--output", str(out)),
        *("--workers", "2", "--clip-seconds", "0.5", "--samples-per-shard", "3", "--log", "quiet", *more),
    ]


def start(*args: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def test_killed_and_run_again_it_ends_the_same(videos: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = start(videos, out)
    while process.poll() is None and not (out / "clips-000000.tar").exists():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert start(videos, out).wait() == 0
    assert tree(out) == reference


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_many_random_moments_it_ends_the_same(
    videos: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """Also in the first phase, and while files are renamed: nothing with a final name is ever half."""
    began = time.monotonic()
    assert start(videos, tmp_path / "undisturbed").wait() == 0
    took = time.monotonic() - began
    random = Random(0)
    out, kills, whole = tmp_path / "out", 0, 0
    for attempt in range(60):
        process = start(videos, out)
        try:
            process.wait(took * random.uniform(0.1, 0.9))
        except subprocess.TimeoutExpired:
            (os.killpg if attempt % 2 else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert all(reference[name] == data for name, data in final(out).items())
        else:
            assert tree(out) == reference
            whole += 1
            for path in random.sample(sorted(out.glob("*")), 8):  # and begin again from a part of it
                path.unlink(missing_ok=True)
            if not (out / ".plan.sqlite").exists():
                shutil.rmtree(out)
    assert kills >= 20
    assert start(videos, out).wait() == 0
    assert tree(out) == reference


def final(out: Path) -> dict[str, bytes]:
    """The files under their final names, when nobody writes."""
    return {name: data for name, data in tree(out).items() if not name.startswith(".")} if out.exists() else {}


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(
    videos: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(videos, out), stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (out / "clips-000000.tar").exists():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert not list(out.glob(".*.tmp"))
    assert start(videos, out).wait() == 0
    assert tree(out) == reference


@pytest.mark.parametrize(("kib", "file"), [(16, ".plan.sqlite"), (70, "clips-000000.tar")])
def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(
    videos: Path, tmp_path: Path, kib: int, file: str
) -> None:
    more = ("--crf", "0", "--samples-per-shard", "9")  # a tar larger than the plan
    assert start(videos, tmp_path / "undisturbed", *more).wait() == 0
    assert (tmp_path / "undisturbed" / file).stat().st_size > kib * 1024
    out = tmp_path / "out"
    limit = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command(videos, out, *more)]
    limited = subprocess.run(limit, stderr=subprocess.PIPE, text=True, timeout=120)
    assert limited.returncode == 1
    assert "again" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert final(out) == {}
    assert start(videos, out, *more).wait() == 0
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_whole_run_and_parts_keep_out_of_each_others_way(videos: Path, tmp_path: Path) -> None:
    part = shard_job(tmp_path, OPTIONS, workers=1)
    with part.alone(Part(1, 3)):
        with shard_job(tmp_path, OPTIONS, workers=1).alone(Part(2, 3)):
            pass
        for other in (None, Part(1, 3), Part(1, 2)):
            with pytest.raises(ConfigError, match="another run"), shard_job(tmp_path, OPTIONS).alone(other):
                pass
    with part.alone():
        pass


def test_parts_make_what_one_run_makes(videos: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    refused = subprocess.run(command(videos, out, "--part", "1/3"), stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 2
    assert "plan_only" in refused.stderr
    assert start(videos, out, "--plan-only").wait() == 0
    parts = [start(videos, out, "--part", f"{number}/3") for number in (1, 2, 3)]
    assert [part.wait() for part in parts] == [0, 0, 0]
    if not (out / "report.json").exists():  # parts that ended at the same moment saw each other's shards missing
        assert start(videos, out, "--part", "1/3").wait() == 0
    assert tree(out) == reference
    other = subprocess.run(command(videos, out, "--part", "1/3", "--gop", "8"), stderr=subprocess.PIPE, text=True)
    assert other.returncode == 2
    assert "gop was 16, now it is 8" in other.stderr


def test_a_changed_option_or_input_is_explained(videos: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos, mine)
    build_shards([str(mine)], out, COPIES, workers=1)
    other = ShardOptions(samples_per_shard=2)
    with pytest.raises(ConfigError, match="samples_per_shard was 1, now it is 2"):
        build_shards([str(mine)], out, other, workers=1)
    (mine / "a.txt").write_text("another caption")
    with pytest.raises(ConfigError, match=r"the text of input a\.mp4 has changed"):
        build_shards([str(mine)], out, COPIES, workers=1)
    (mine / "broken.mp4").unlink()
    (mine / "a.txt").write_text("a caption\n")
    with pytest.raises(ConfigError, match=r"input broken\.mp4 is gone"):
        build_shards([str(mine)], out, COPIES, workers=1)
    (out / "mine.txt").write_text("keep")
    build_shards([str(mine)], out, other, workers=1, overwrite=True)
    assert (out / "mine.txt").exists()
    assert verify_folder(out, workers=1).problems == []


def test_foreign_tars_in_the_output_are_left_alone(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "clips-000000.tar").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="from elsewhere"):
            build_shards([str(videos)], tmp_path, workers=1, overwrite=overwrite)
    assert (tmp_path / "clips-000000.tar").read_bytes() == b"precious"


def test_a_damaged_shard_is_made_again_as_verify_says(videos: Path, tmp_path: Path) -> None:
    build_shards([str(videos)], tmp_path, COPIES, workers=1)
    before = tree(tmp_path)
    tar = tmp_path / "clips-000001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    said = summary(verify_folder(tmp_path, workers=1), "sample", False)
    assert any("remove such a tar and its .idx.json" in line for line in said)
    tar.unlink()
    tar.with_name("clips-000001.idx.json").unlink()
    build_shards([str(videos)], tmp_path, COPIES, workers=1)
    assert tree(tmp_path) == before


def test_overwrite_removes_what_the_plan_names_and_nothing_else(videos: Path, tmp_path: Path) -> None:
    options = ShardOptions(val_share=0.5)
    build_shards([str(videos)], tmp_path, options, workers=1)
    before = tree(tmp_path)
    foreign = tmp_path / "train" / "clips-000500.tar"
    foreign.write_bytes(b"precious")
    other = ShardOptions(val_share=0.5, samples_per_shard=1)
    with pytest.raises(ConfigError, match=r"clips-000500\.tar from elsewhere"):
        build_shards([str(videos)], tmp_path, other, workers=1, overwrite=True)
    assert foreign.read_bytes() == b"precious"
    foreign.unlink()
    assert tree(tmp_path) == before
    report = build_shards([str(videos)], tmp_path, other, workers=1, overwrite=True)
    assert sum(split["shards"] for split in report.splits.values()) == 3


def test_places_of_packets_have_their_room_in_a_plan_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the videos are, and however often the run begins again."""
    room = 1500
    monkeypatch.setattr(shard_job_module, "PACKETS_BYTES", room)
    for number in range(9):
        make_video(tmp_path / f"{number}.mp4", num_frames=8, first_index=number, size=(64, 48))
    for stop in (3, 6, None):

        def progress(step: str, done: int, *_: Any, stop: int | None = stop) -> None:
            if (step, done) == ("probing", stop):
                raise KeyboardInterrupt

        job = shard_job(tmp_path / "out", COPIES, workers=1, progress=progress)
        with job.alone(), suppress(KeyboardInterrupt):
            run(job, [str(tmp_path / "*.mp4")], plan_only=True)
    with closing(sqlite3.connect(tmp_path / "out" / ".plan.sqlite")) as db:
        ((videos, num_bytes),) = db.execute("SELECT count(*), sum(length(packets)) FROM probes")
    assert videos == 9
    assert 0.6 * room < num_bytes <= room
