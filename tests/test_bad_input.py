"""What a user gets wrong, through the command line and the public API: a sentence, never a traceback or a hang."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from framestream.pipeline import ConfigError, FastSlowSampling, ShardError, build_loader
from framestream.pipeline.fresh_python import fresh_python
from framestream.tools.cli import main
from framestream.tools.config import parse

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
    assert (report["inputs"]["found"], report["inputs"]["sampled"], report["inputs"]["rejected"]) == (4, 1, 3)
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
    options = {"sampling": FastSlowSampling(2, 2), "image_size": 32, "patches_per_frame": 4, "batch_size": 1}
    loader = build_loader(shards, shuffle=False, max_reject_share=1.0, **options)
    assert 1 <= len(list(loader)) < 4
    assert "is cut" in caplog.text
    with pytest.raises(ShardError, match=r"of 4 samples are lost, more than max_reject_share=0\.05 allows"):
        build_loader(shards, **options)


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
        ("data: {shards: shards, sampling: {kind: fast_slow, fps: fast}}", "fps must be positive"),
        ("data: {shards: shards, sampling: {kind: length, num_frames: ten}}", "at least 1 frame, got 'ten'"),
        ("data: {shards: shards, sampling: {kind: [x]}}", "{'kind': ['x']}"),
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


def test_python_files_among_the_videos_are_not_run(framestream, tmp_path):
    videos = tmp_path / "in"
    videos.mkdir()
    make_video(videos / "good.mp4", num_frames=24)
    for name in ("numpy", "torch", "json", "signal", "av", "decord", "framestream", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    code, said = framestream("shard", "in", "--output", "out", "--clip-seconds", "0.5")
    assert code == 0, said
    code, said = framestream("verify", "out")
    assert code == 0, said
    # As Decord's process and the check of its GPU reader are started.
    command, environment = fresh_python("import numpy; print(numpy.__version__)")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(("1.", "2.")), done.stderr
    assert not (tmp_path / "marker").exists()


def test_an_output_that_cannot_be_written(framestream, tmp_path):
    (tmp_path / "file").touch()
    code, said = framestream("bench", "masks", "--output", "file/x", "--tokens", "256")
    assert code == 2
    assert "output file/x cannot be made" in said
    code, said = framestream("verify", "file")
    assert code == 2
    assert "file is a file: give the folder that holds it" in said


def test_what_the_system_refuses_is_a_sentence(framestream, tmp_path):
    shards = make_shards(tmp_path / "shards", num_samples=1)
    (shards / "index.json").unlink()
    (shards / "index.json").mkdir()
    code, said = framestream("verify", "shards", "--repair-index")
    assert code == 1
    assert "index.json: Is a directory." in said


CLASS = '{"class_path": "payload.Evil"}'


@pytest.mark.parametrize(
    "option",
    [
        *("--data", "--model", "--train", "--model.tower", "--data.sampling", "--data.mask", "--model.mask"),
        *("--model.tower.kind", "--model.tower.mean", "--model.tower.class_path", "--data.sampling.kind"),
    ],
)
@pytest.mark.parametrize("value", [CLASS, "payload.Evil", "sec.yaml"])
def test_an_option_cannot_run_code(option, value, framestream, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    (tmp_path / "payload.py").write_text("open('marker', 'w').close()\nclass Evil: pass\n")
    (tmp_path / "sec.yaml").write_text("class_path: payload.Evil\n")
    run = config(tmp_path, "data: {shards: shards}")
    for given in ((option, value), (f"{option}={value}",)):
        code, output = framestream("train", run, *given)
        assert code == 2, output
        if option in ("--data", "--model", "--train", "--model.tower"):
            assert "is a section; set its keys, e.g. --" in output
        assert not (tmp_path / "marker").exists()
        assert "payload" not in sys.modules


@pytest.mark.parametrize(
    "values", [{"class_path": "payload.Evil"}, {"model": "payload.Evil"}, {"model": {"tower": {"class_path": "p.E"}}}]
)
def test_values_from_code_import_nothing_either(values):
    with pytest.raises(ConfigError, match=r"unknown key|must be a section"):
        parse(values)


@pytest.mark.parametrize("name", ["num_fast", "num_slow", "fast_stride", "slow_stride"])
def test_a_sampling_of_nothing(name):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number >= 1, got 0"):
        FastSlowSampling(**{name: 0})
