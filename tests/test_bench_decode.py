"""`framestream bench decode`: what is compared is right, whatever the speed. How fast it was is nobody's assertion."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.probe import probe_video
from framestream.pipeline.sampling import FastSlowSampling
from framestream.tools.bench_clips import Scene, make_scene, videos_in
from framestream.tools.bench_decoders import (
    DECORD,
    DECORD_ALL,
    LIMIT,
    LIMIT_NO_SKIP,
    OURS,
    PYAV,
    PYAV_ALL,
    SNAP,
    UNKNOWN,
)
from framestream.tools.bench_frames import FrameCheck
from framestream.tools.bench_limit import least_work
from framestream.tools.bench_rows import ratio, rounds
from framestream.tools.cli import main

from synthetic import video_bytes

TINY = ["--short-side", "64", "--repeats", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the results, with the clips in it."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def result(folder):
    assert main(["bench", "decode", "--output", str(folder), "--seconds", "1", "--gops", "12", "60",
                 "--heights", "96", *TINY]) == 0  # fmt: skip
    return json.loads((folder / "decode.json").read_text())


def test_every_decoder_is_measured_on_every_clip(result, folder):
    assert [row["case"] for row in result["rows"]] == ["1 s, 96p, GOP 12", "1 s, 96p, GOP 60"]
    expected = {OURS, LIMIT, LIMIT_NO_SKIP, UNKNOWN, SNAP, PYAV, PYAV_ALL}
    expected |= set() if available_backends()["decord"] else {DECORD, DECORD_ALL}
    for row in result["rows"]:
        assert expected <= row["ms"].keys()
        assert all(value > 0 for value in (*row["ms"].values(), *row["facts"].values()))
        assert all(len(times) == 1 for times in row["times"].values())
        assert {"ours / limit", "unknown file / ours", "ours / slow_snap", f"{PYAV_ALL} / ours"} <= row["facts"].keys()
        assert row["facts"]["packets fed"] == row["work"]["packets fed"] / row["work"]["packets"] <= 1
        assert not expected & row["notes"].keys(), "on such a clip every decoder is right"
    assert result["skipped"] == {}
    assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_clips_are_made_once(result, folder):
    (path,) = (folder / "clips").glob("*gop12*.mp4")
    before = path.stat()
    assert make_scene(Scene(1, 12, 96), folder / "clips") == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert not list((folder / "clips").glob(".*")), "nothing unfinished is left"


@pytest.mark.parametrize("gop", [12, 60])
def test_generated_clips_are_what_they_are_called(gop, result, folder):
    info = probe_video(make_scene(Scene(1, gop, 96), folder / "clips"))
    assert (info.num_frames, info.height, info.width, info.fps) == (30, 96, 170, 30.0)
    assert info.key_frames == tuple(range(0, 30, gop))
    with open_decoder(make_scene(Scene(1, gop, 96), folder / "clips").read_bytes()) as decoder:
        frames = decoder.frames_at([0, 10, 20]).float()
    assert frames.std() > 20, "it is no flat pattern"
    assert min((frames[0] - frames[1]).abs().mean(), (frames[1] - frames[2]).abs().mean()) > 4, "it moves"


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".mp4", {"codec": "libx264", "gop": 16, "b_frames": 2}),
        (".mp4", {"codec": "libx264", "gop": 250, "b_frames": 3}),
        (".webm", {"codec": "libvpx-vp9", "gop": 16}),
        (".mkv", {"codec": "libx265", "gop": 12}),
    ],
)
@pytest.mark.parametrize("wanted", [[0], [3, 17, 18, 39], [0, 10, 20, 30, 36, 37, 38, 39]])
def test_the_lower_limit_gives_the_exact_frames(suffix, options, wanted):
    data = video_bytes(suffix, num_frames=40, **options)
    with open_decoder(data) as decoder:
        exact = decoder.frames_at(wanted).numpy()
        size = exact.shape[3], exact.shape[2]
    work = least_work(data, wanted)
    assert work.num_packets >= 40
    assert work.num_fed <= work.num_packets
    for skip in (True, False):
        np.testing.assert_array_equal(np.stack(work.decode(size, skip=skip)), exact)


def test_the_lower_limit_feeds_no_packet_too_many():
    data = video_bytes(".mp4", num_frames=64, gop=16, b_frames=0)
    assert least_work(data, [0]).num_fed == 1
    assert least_work(data, [17]).num_fed == 2
    assert [len(run) for run in least_work(data, [3, 16, 20, 63]).runs] == [4, 5, 16]
    with open_decoder(data, info=probe_video(data, packets=True)) as decoder:
        decoder.frames_at([3, 16, 20, 63])
        assert decoder.stats.packets == 25, "and neither does framestream"


def test_wrong_frames_are_found(folder, result):
    data = make_scene(Scene(1, 12, 96), folder / "clips").read_bytes()
    wanted = FastSlowSampling(8, 8).plan(30).unique.tolist()
    with open_decoder(data, short_side=64) as decoder:
        check = FrameCheck(decoder.frames_at, 30, wanted)
        right = decoder.frames_at(wanted).numpy()
        assert check.verdict(right) == ""
        assert check.verdict(list(right.transpose(0, 2, 3, 1))) == "", "the order of axes is no fault"
        noisy = (right.astype(int) + np.random.default_rng(0).integers(-5, 6, right.shape)).clip(0, 255)
        assert check.verdict(noisy.astype(np.uint8)) == "", "another resizing is no fault"
        late = right.copy()
        late[4] = decoder.frames_at([wanted[4] + 1])[0].numpy()
        assert check.verdict(late) == f"wrong frames: 1 of {len(wanted)}, frame {wanted[4]} first"
        assert "came" in check.verdict(right[1:])
        assert "came" in check.verdict(right[..., 1:])


def test_a_folder_of_the_users_with_a_broken_file(tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "more").mkdir(parents=True)
    (videos / "b.mp4").write_bytes(video_bytes(".mp4", num_frames=30, gop=12))
    (videos / "more" / "a.mkv").write_bytes(video_bytes(".mkv", num_frames=12, gop=6))
    (videos / "broken.mp4").write_bytes(video_bytes(".mp4", num_frames=30)[:900])
    (videos / "empty.webm").write_bytes(b"")
    (videos / "notes.txt").write_text("no video")
    assert [path.name for path in videos_in(str(videos))] == ["b.mp4", "broken.mp4", "empty.webm", "a.mkv"]
    assert main(["bench", "decode", "--output", str(tmp_path / "out"), "--videos", str(videos), *TINY]) == 0
    result = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["b.mp4", "more/a.mkv"]
    assert result["skipped"].keys() == {"broken.mp4", "empty.webm"}
    assert "not measured: broken.mp4" in capsys.readouterr().out
    assert not (tmp_path / "out" / "clips").exists(), "no clip is made where the user has some"
    shutil.rmtree(videos / "more")
    (videos / "b.mp4").unlink()
    assert main(["bench", "decode", "--output", str(tmp_path / "out"), "--videos", str(videos), *TINY]) == 1
    assert "None of the 2 files could be decoded" in capsys.readouterr().err


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(ConfigError, match="no video in"):
        videos_in(str(tmp_path))
    with pytest.raises(ConfigError, match="is no folder"):
        videos_in(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["masks", "--seconds", "2"], "settings of decode and loader, not of masks"),
        (["decode", "--videos", "x", "--gops", "4"], "leave them out with videos"),
        (["decode", "--gops", "0"], "at least 1"),
        (["loader", "--heights", "97"], "heights have to be even"),
        (["decode", "--short-side", "8"], "short_side is 8"),
        (["loader", "--workers", "0"], "workers have to be"),
        (["decode", "--videos", "not-there"], "not-there, which is no folder"),
    ],
)
def test_impossible_settings_stop_at_once(options, said, tmp_path, capsys):
    assert main(["bench", *options, "--output", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_ratios_are_of_the_same_round():
    times = {"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 4.0], "c": [5.0]}
    assert ratio(times, "a", "b") == 0.5
    assert ratio(times, "c", "a") == 5.0
    assert ratio(times, "a", "d") is None


def test_candidates_take_turns_and_slow_ones_fewer():
    ran = []
    candidates = {name: lambda name=name: ran.append(name) or 1.0 for name in "abc"}
    watched = []
    times = rounds(
        candidates, 4, seconds={"a": 0.1, "b": 3.0, "c": 9.0}, budget_s=6.0, slow=("b", "c"),
        watch=lambda name, number: watched.append((name, number)),
    )  # fmt: skip
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 2, "c": 1}
    assert ran == ["a", "b", "c", "b", "a", "a", "a"]
    assert watched[0] == ("a", 1)
    assert watched[-1] == ("a", 4)
