"""What a user gets wrong, through the command line and the public API: a sentence, never a traceback or a hang."""

from __future__ import annotations

import json
import sys

import pytest

from framestream.pipeline import ConfigError, FastSlowSampling, build_loader
from framestream.tools.cli import main

from synthetic import make_video
from synthetic_shards import make_shards


@pytest.fixture
def framestream(tmp_path, monkeypatch, capfd):
    """Run the command in an empty folder: (exit code, what it said). Anything but a return or SystemExit fails."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return run


def test_a_folder_without_video(framestream, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no film here")
    code, said = framestream("shard", "in", "--output", "out")
    assert code == 2
    assert "there is no video in in" in said
    assert ".mp4" in said
    assert not list(tmp_path.glob("out/**/*.tar"))


def test_unreadable_files_among_good_ones(framestream, tmp_path):
    videos = tmp_path / "in"
    videos.mkdir()
    make_video(videos / "good.mp4", num_frames=24)
    (videos / "text.mp4").write_text("not a video")
    (videos / "empty.mp4").touch()
    (videos / "cut.mp4").write_bytes((videos / "good.mp4").read_bytes()[:700])
    code, said = framestream("shard", "in", "--output", "out")
    assert code == 0, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["inputs"]["found"], report["inputs"]["used"], report["inputs"]["rejected"]) == (4, 1, 3)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["source"].rsplit("/")[-1] for reject in rejects) == ["cut.mp4", "empty.mp4", "text.mp4"]
    assert all(len(reject["reason"]) > 20 for reject in rejects)


def test_a_tar_cut_in_the_middle(framestream, tmp_path, caplog):
    shards = make_shards(tmp_path / "shards", num_samples=4, samples_per_shard=4)
    (tar,) = shards.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 5 // 8])
    code, said = framestream("verify", "shards")
    assert code == 1
    assert "is cut" in said
    loader = build_loader(
        shards, sampling=FastSlowSampling(2, 2), image_size=32, patches_per_frame=4, batch_size=1, shuffle=False
    )
    assert 1 <= len(list(loader)) < 4
    assert "is cut" in caplog.text


def config(folder, text):
    model = "" if "model" in text or text[0] == "-" else "\nmodel: {embedding_dim: 768}"
    (folder / "run.yaml").write_text(text + model)
    return "run.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {shards: shards, batch_sizes: 2}", "batch_sizes"),
        ("modle: {num_layers: 2}", "modle"),
        ("model: {use_frame_casual_mask: true}", "use_frame_casual_mask"),
        ("data: {shards: shards, sampling: {kind: fast_slow, num_fast: 0}}", "num_fast"),
        ("data: {shards: shards, sampling: {kind: fast_slow, num_quick: 2}}", "num_quick"),
        ("data: {shards: shards, sampling: {kind: dense, num_frames: 0}}", "num_frames"),
        ("data: {shards: nowhere}", "nowhere"),
        ("data: {shards: shards, mask: casual}", "casual"),
        ("data: {shards: shards, decoder: ffmpeg}", "ffmpeg"),
        ("train: {steps: many}", "steps"),
        ("- just\n- a list", "sections"),
        ("data: {shards: 'pipe:cat shards/x.tar'}", "pipe:"),
        ("data: [", "YAML"),
    ],
)
def test_a_config_that_is_wrong(text, said, framestream, tmp_path):
    (tmp_path / "shards").mkdir()
    code, output = framestream("train", config(tmp_path, text))
    assert code in (1, 2), output
    assert said in output
    assert len(output) < 3000


@pytest.mark.parametrize(
    "text",
    [
        "data: {sampling: {class_path: subprocess.Popen, init_args: {args: [touch, marker]}}}",
        "data: {sampling: {kind: {class_path: subprocess.Popen, init_args: {args: [touch, marker]}}}}",
        "data: {sampling: {class_path: payload.Evil}}",
        "data: {sampling: {kind: {class_path: payload.Evil}}}",
        "model: {mask: {class_path: payload.Evil}}",
        "model: {mask: payload.evil}",
        "data: {mask: payload.evil}",
        "model: {tower: {class_path: payload.Evil}}",
        "data: !!python/object/apply:os.system ['touch marker']",
    ],
)
def test_a_config_cannot_run_code(text, framestream, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    (tmp_path / "payload.py").write_text("open('marker', 'w').close()\nclass Evil: pass\ndef evil(layout): pass\n")
    code, output = framestream("train", config(tmp_path, text))
    assert code == 2, output
    assert not (tmp_path / "marker").exists()
    assert "payload" not in sys.modules


@pytest.mark.parametrize("name", ["num_fast", "num_slow", "fast_stride", "slow_stride"])
def test_a_sampling_of_nothing(name):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number >= 1, got 0"):
        FastSlowSampling(**{name: 0})
