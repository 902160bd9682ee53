"""The demo at a small size, on generated videos and without a network; and `framestream doctor`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.errors import ConfigError
from framestream.tools.demo import demo
from framestream.tools.sources import HOLD_OUT_WHOLE_FROM, MAX_CLIPS, MAX_VIDEOS, select

from page_checks import check_page, lookup, page_text
from synthetic import make_video, read_indices
from train_setup import start, write_config


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have it: wide, upright, in a subfolder, one broken, and a text."""
    folder = tmp_path_factory.mktemp("footage")
    (folder / "sub").mkdir()
    make_video(folder / "wide.mp4", num_frames=130, fps=25, size=(160, 96))
    make_video(folder / "upright.mov", num_frames=120, fps=30, size=(96, 160), rotation=90)
    make_video(folder / "sub" / "wide.mp4", num_frames=60, fps=24)
    (folder / "broken.mp4").write_bytes(b"no video at all" * 50)
    (folder / "notes.txt").write_text("about these videos")
    return folder


@pytest.fixture(scope="module")
def finished(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a demo that ran through in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    config = write_config(folder / "c.yaml", Path("shards"), folder, rollout_steps=3, eval_every=2, log_every=1)
    process = start(
        "demo", "--videos", str(footage), "--output", str(folder / "out"), "--config", str(config), "--steps", "4"
    )
    _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    for stage in ("1/6 Find videos", "2/6 Shard", "3/6 Verify", "4/6 Train", "5/6 Evaluate", "6/6 Report"):
        assert stage in said
    assert str(folder / "out" / "report.html") in said.replace("\n", "")
    return folder / "out"


def test_the_page_has_the_run_on_it(finished: Path) -> None:
    page = check_page(finished / "report.html")
    text = page_text(page)
    results = json.loads((finished / "results.json").read_text())
    for name in ("wide.mp4", "upright.mov", "sub/wide.mp4"):
        assert name in text
    assert "1 videos could not be used" in text
    assert "broken.mp4" in text
    assert "96 × 160" in text or "160 × 96" in text
    assert [stage["name"] for stage in results["stages"]] == [
        "Find videos",
        "Shard",
        "Verify",
        "Train",
        "Evaluate",
        "Report",
    ]
    assert all(stage["seconds"] > 0 for stage in results["stages"])
    assert sum(stage["seconds"] for stage in results["stages"]) <= results["seconds"] * 1.02
    assert len(results["train_curve"]) == 4
    assert [row[0] for row in results["held_out_curve"]] == [2, 4]
    assert len(results["evaluation"]["rollout"]) == 3


def test_numbers_are_those_of_the_training_run(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    evaluation = json.loads((finished / "train" / "evaluation.json").read_text())
    for path in ("teacher_forced.ratio", "rollout.0.ratio", "rollout.2.ratio", "slow.frames", "clips"):
        assert lookup(results["evaluation"], path) == lookup(evaluation, path)
    counts = [(source["train_clips"], source["held_out_clips"]) for source in results["sources"]]
    indexes = [json.loads((finished / "shards" / split / "index.json").read_text()) for split in ("train", "val")]
    stored = [sum(shard["samples"] for shard in index["shards"]) for index in indexes]
    assert [sum(column) for column in zip(*counts, strict=True)] == stored
    assert results["evaluation"]["clips"] == stored[1]
    assert results["mask"]["leaking"] == 0


def test_held_out_clips_keep_their_distance(finished: Path) -> None:
    """Read from the pictures: no held-out clip shares a frame with a training clip, and the promised gap is there."""
    from framestream.pipeline.shards import ShardSet

    shown: dict[str, dict[str, set[int]]] = {}
    for split in ("train", "val"):
        shards = ShardSet.open(finished / "shards" / split)
        for i in range(shards.num_samples):
            sample = shards.read(*shards.locate(i))
            with open_decoder(sample.video, name=sample.key) as decoder:
                indices = read_indices(decoder.frames_at(range(decoder.num_frames)))
            assert indices == list(range(indices[0], indices[0] + len(indices)))
            shown.setdefault(sample.meta["source"], {}).setdefault(split, set()).update(indices)
    gap = json.loads((finished / "results.json").read_text())["holdout"]["gap_seconds"]
    assert gap > 0
    rates = {"wide.mp4": 25, "upright.mov": 30, "sub/wide.mp4": 24}
    both = [(name, parts) for name, parts in shown.items() if len(parts) == 2]
    assert both
    for name, parts in both:
        fps = next(rate for end, rate in rates.items() if name == end or name.endswith(f"footage0/{end}"))
        assert (min(parts["val"]) - max(parts["train"])) / fps > gap - 1e-6


@pytest.fixture
def slow_footage(tmp_path: Path) -> Path:
    """12 seconds at 5 frames a second: a clip of the default length would have 3 of them."""
    make_video(tmp_path / "slow.mp4", num_frames=60, fps=5)
    return tmp_path / "slow.mp4"


@pytest.mark.slow
def test_a_second_run_replaces_the_first_and_nothing_else(
    finished: Path, slow_footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no demo made"):
        demo(videos="x", output=str(foreign))
    assert (foreign / "thesis.txt").read_text() == "years of work"

    again = tmp_path / "again"
    shutil.copytree(finished, again)
    (again / "shards" / "left-over").write_text("")
    (again / "train" / "left-over").write_text("")
    (again / "thesis.txt").write_text("years of work")
    config = write_config(tmp_path / "c.yaml", Path("shards"), tmp_path)
    assert demo(videos=str(slow_footage), output=str(again), config=str(config), steps=2, workers=1) == 0
    assert not list(again.glob("*/left-over"))
    assert (again / "thesis.txt").read_text() == "years of work"
    results = json.loads((again / "results.json").read_text())
    assert [source["name"] for source in results["sources"]] == ["slow.mp4"]
    # The clips were made long enough for 5 fast frames, and so for a rollout.
    assert "Clips last 1.10 s instead of 0.64 s" in " ".join(results["notes"])
    assert results["evaluation"]["rollout"][0]["ratio"] is not None
    assert all(sum(valid for valid, stream in zip(clip["valid"], clip["stream"], strict=True) if stream) == 5
               for clip in results["clips"])  # fmt: skip
    assert "for the first generated frame" in capsys.readouterr().err.replace("\n", " ")


def test_without_rollout_the_page_says_so(
    slow_footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", Path("shards"), tmp_path, rollout_steps=0, eval_every=1)
    assert demo(videos=str(slow_footage), output=str(tmp_path / "out"), config=str(config), steps=2, workers=1) == 0
    text = page_text(check_page(tmp_path / "out" / "report.html"))
    assert "were not measured (the settings ask for none)" in text
    assert "This run generated no frames" in text
    assert "generated for" not in text
    assert "first generated frame." not in capsys.readouterr().err


def test_a_demo_of_normalised_targets_is_refused(slow_footage: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {tower: {kind: cosine, patch_size: 4}, embedding_dim: 48, target_norm: true}")
    with pytest.raises(ConfigError, match=r"model\.target_norm"):
        demo(videos=str(slow_footage), output=str(tmp_path / "out"), config=str(config))


def test_a_video_too_short_for_its_rate_is_left_out_with_a_note(tmp_path: Path) -> None:
    make_video(tmp_path / "fine.mp4", num_frames=120, fps=24)
    make_video(tmp_path / "lapse.mp4", num_frames=10, fps=2)
    chosen = select([str(tmp_path)], 0.5, frames=8)
    assert [part.name for part in chosen.footage] == ["fine.mp4"]
    assert chosen.clip_seconds == 0.5
    assert any("2 frames per second and is too short for clips of 8 frames" in note for note in chosen.notes)


def test_folders_that_cannot_work_are_refused_in_a_sentence(tmp_path: Path) -> None:
    empty, short, broken = (tmp_path / name for name in ("empty", "short", "broken"))
    for folder in (empty, short, broken):
        folder.mkdir()
    (empty / "notes.txt").write_text("no video")
    make_video(short / "blink.mp4", num_frames=30, fps=25)
    (broken / "a.mp4").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"no video in .*empty"):
        select([str(empty)], 1.0)
    with pytest.raises(ConfigError, match="too little footage"):
        select([str(short)], 1.0)
    with pytest.raises(ConfigError, match=r"None of 1 videos can be used; the first: .*a\.mp4"):
        select([str(broken)], 1.0)
    process = start("demo", "--videos", str(empty), "--output", str(tmp_path / "out"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "no video in" in said
    assert "Traceback" not in said
    with pytest.raises(ConfigError, match=r"needs model\.tower\.kind pixel or cosine"):
        demo(videos=str(short), output=str(tmp_path / "out2"), config="medium")


def test_much_footage_is_cut_down_and_the_page_is_told(tmp_path: Path) -> None:
    for number in range(2):
        make_video(tmp_path / f"{number}.mp4", num_frames=300, fps=10, size=(64, 48))
    chosen = select([str(tmp_path)], 0.1)  # 60 s in clips of 0.1 s would be 600
    total = sum(part.end - part.start for part in chosen.stretches)
    assert 10 < total / chosen.stride_seconds <= MAX_CLIPS
    assert any("long videos" in note for note in chosen.notes)


def test_many_videos_are_held_out_whole(tmp_path: Path) -> None:
    for number in range(HOLD_OUT_WHOLE_FROM):
        make_video(tmp_path / f"{number:02d}.mp4", num_frames=12, fps=10, size=(64, 48))
    chosen = select([str(tmp_path)], 1.0)
    assert [part.split for part in chosen.stretches] == ["val" if i % 5 == 4 else "train" for i in range(10)]
    assert "Every fifth video" in chosen.holdout
    assert MAX_VIDEOS >= HOLD_OUT_WHOLE_FROM


def test_clips_do_not_cross_cuts(tmp_path: Path) -> None:
    """Three shots of one brightness each: the clips stay inside them."""
    import av
    import numpy as np

    with av.open(str(tmp_path / "shots.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(150):
            level = (30, 200, 90)[number // 50]
            picture = np.full((48, 64, 3), level, np.uint8)
            picture[:, number % 64] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    chosen = select([str(tmp_path)], 0.6)
    assert chosen.footage[0].cuts == pytest.approx((2.0, 4.0))
    assert any("2 cuts" in note for note in chosen.notes)
    spans = [(part.start, part.end, part.split) for part in chosen.stretches]
    for begin, end, split in spans:
        assert not any(begin < cut < end for cut in (2.0, 4.0)), (begin, end, split)
    assert {split for _, _, split in spans} == {"train", "val"}


def test_doctor_names_every_decoder_and_what_it_would_use() -> None:
    process = start("doctor")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    backends = available_backends()
    assert all(name in said for name in backends)
    assert "decoder=auto takes" in said
    assert "torch" in said
