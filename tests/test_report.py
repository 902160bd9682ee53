"""The report page, from results made by hand: complete, honest about bad numbers, safe against odd names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout, next_frame_targets
from framestream.pipeline.masks import make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling, Sampling
from framestream.tools.report import verdict, write_report
from framestream.tools.results import ClipView, Forecast, MaskView, RunResults, Source, Stage, versions

from page_checks import check_page, page_text, replaced

SIZE, STEPS = 16, 3


def errors(ratio: float | None, frames: int = 12) -> dict[str, Any]:
    return {"model": (ratio or 0.0) * 2.5, "copy_last": 2.5, "frames": frames, "ratio": ratio}


def made(sampling: Sampling | None = None, key: str = "clip-00001") -> tuple[RunResults, dict[str, np.ndarray]]:
    plan = (sampling or FastSlowSampling(num_fast=4, num_slow=3)).plan(20)
    layout = FrameLayout.from_plan(plan, 4)
    mask = make_mask("time_causal", layout)
    draw = np.random.default_rng(0)

    def picture(*shape: int) -> np.ndarray:
        return draw.integers(0, 256, (*shape, SIZE, SIZE, 3), dtype=np.uint8)

    stream, valid = plan.stream.tolist(), plan.valid.tolist()
    pictures = {"clip0": picture(plan.num_frames), "forecast0_last": picture()}
    pictures |= {"forecast0_true": picture(STEPS), "forecast0_model": picture(STEPS)}
    results = RunResults(
        title="a test",
        created="2024-02-29 12:00",
        device="the CPU",
        seconds=83.25,
        stages=[Stage("Shard", 12.5, "20 clips"), Stage("Train", 70.75, "9 steps")],
        sources=[Source(f"{key}.mp4", 640, 360, 29.97, 12.0, 15, 5)],
        holdout={"text": "The last part is held out.", "share": 0.2, "gap_seconds": 0.25},
        evaluation={
            "clips": 5,
            "teacher_forced": errors(0.8123),
            "slow": errors(0.7),
            "rollout": [errors(0.85, 5), errors(0.9, 5), errors(1.2, 5)],
            "forced_steps": [errors(0.85, 5), errors(0.84, 5), errors(0.83, 5)],
            "leaking_targets": 0,
            "seconds": 2.0,
        },
        train_curve=[[k, 1.0 / k] for k in range(1, 10)],
        held_out_curve=[[4, 0.9, 0.95], [9, 0.8123, 0.85]],
        clips=[
            ClipView(
                key,
                0.8,
                [k / 25 for k in range(20)],
                plan.frame_index.tolist(),
                (plan.frame_index / 25).tolist(),
                stream,
                valid,
            )
        ],
        mask=MaskView(
            "time_causal",
            ["".join(str(int(v)) for v in row) for row in mask.matrix().tolist()],
            plan.frame_index.tolist(),
            stream,
            valid,
            list(next_frame_targets(layout)),
            list(layout.patches),
            layout.num_tokens,
            mask.density,
            3,
            0,
            [{"rule": "time_causal", "density": mask.density, "leaking": 0}],
        ),
        forecasts=[Forecast(key, [0.04, 0.08, 0.12], [0.1, 0.2, 0.3], [0.2, 0.2, 0.0])],
        speed={"clips_per_s": 12.5, "wait_share": 0.03, "loader_clips_per_s": 100.0},
        loop_seconds={"wait": 2.0, "forward": 20.0, "backward": 30.0, "optimise": 3.0, "evaluate": 2.0, "other": 1.0},
        worker_seconds={"read": 0.5, "decode": 8.0, "transform": 1.0},
        model={"trained parameters": "1,000"},
        notes=["One run."],
        settings={"data": {"mask": "time_causal", "sampling": {"num_fast": 4}}, "output": "x"},
        versions=versions(),
    )
    return results, pictures


def written(folder: Path, results: RunResults, pictures: dict[str, np.ndarray]) -> Path:
    results.save(folder, pictures)
    return write_report(folder)


def test_page_is_whole_and_says_its_own_numbers(tmp_path: Path) -> None:
    results, pictures = made()
    path = written(tmp_path, results, pictures)
    page = check_page(path)
    text = page_text(page)
    assert "with 19% less error" in text
    assert "below 1 for 2 of 3 frames" in text
    for part in ("0.81", "1.200", "83 s", "640 × 360", "12.5 clips per second", "3.0 % of its time", "data.mask"):
        assert part in text, part
    again, arrays = RunResults.load(tmp_path)
    assert again == results
    assert all(np.array_equal(arrays[name], pictures[name]) for name in pictures)
    before = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == before  # the page is a function of the results


def test_every_frame_of_the_clip_is_shown_in_its_stream(tmp_path: Path) -> None:
    results, pictures = made()
    text = written(tmp_path, results, pictures).read_text()
    view = results.clips[0]
    for index, stream in zip(view.frame_index, view.stream, strict=True):
        assert f"<title>{'fast' if stream else 'slow'} frame {index}, {index / 25:.2f} s</title>" in text


def test_one_stream_without_slow_frames(tmp_path: Path) -> None:
    results, pictures = made(DenseSampling(5))
    results = replaced(results, evaluation={"slow": errors(None, 0)}, worker_seconds={}, held_out_curve=[[9, 0.8, 0.9]])
    page = check_page(written(tmp_path, results, pictures))
    assert "All slow frames" not in page_text(page)


def test_bad_results_are_called_bad() -> None:
    results, _ = made()
    worse = replaced(results, evaluation={"teacher_forced": errors(1.07), "rollout": [errors(1.1)]})
    headline, sentence = verdict(worse)
    assert "does not yet beat" in headline
    assert "1.07" in sentence
    assert "above 1 from the first frame on" in sentence
    mixed = replaced(results, evaluation={"rollout": [errors(1.1), errors(0.9)]})
    assert "not on its own output" in verdict(mixed)[0]


def test_what_was_not_measured_is_told_apart(tmp_path: Path) -> None:
    results, pictures = made()
    unforced = replaced(results, evaluation={"teacher_forced": errors(None, 0)})
    assert verdict(unforced)[0] == "Nothing was measured from true history."
    assert "below 1 for 2 of 3 frames" in verdict(unforced)[1]
    short = replaced(results, evaluation={"rollout": [errors(None, 0)] * 3})
    assert "with 19% less error" in verdict(short)[0]
    assert "error is 0.81 of" in verdict(short)[1]
    assert "not measured (no held-out clip is long enough" in verdict(short)[1]
    few = replaced(results, evaluation={"rollout": [errors(0.9, 2)] * 3, "forced_steps": [errors(0.9, 2)] * 3})
    assert "the last 3 of each held-out clip that is long enough" in page_text(
        check_page(written(tmp_path, few, pictures))
    )
    nothing = replaced(results, evaluation={"teacher_forced": errors(None, 0), "rollout": [errors(None, 0)] * 3})
    assert verdict(nothing)[0] == "Nothing was measured."
    none = replaced(
        results,
        evaluation={"rollout": [], "forced_steps": []},
        forecasts=[],
        held_out_curve=[[4, 0.9, None], [9, 0.8123, None]],
    )
    text = page_text(check_page(written(tmp_path, none, pictures)))
    assert "not measured (the settings ask for none)" in text
    assert "This run generated no frames" in text
    assert "nothing to see" in text
    check_page(written(tmp_path, replaced(none, held_out_curve=[]), pictures))


def test_leaks_are_those_of_all_held_out_clips(tmp_path: Path) -> None:
    results, pictures = made()
    assert "The mask shows no frame its own target" in verdict(results)[1]
    assert "the same target frames" in page_text(check_page(written(tmp_path, results, pictures)))
    leaky = replaced(results, evaluation={"leaking_targets": 37, "forced_steps": [errors(0.8, 2)] * 3})
    leaky.mask.leaking = 4  # of the clip that the mask is drawn of
    assert "37 frames of the held-out clips their own target; those are left out" in verdict(leaky)[1]
    text = page_text(check_page(written(tmp_path, leaky, pictures)))
    assert "the same target frames" not in text
    assert "2 / 5" in text


def test_odd_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\"'&"
    results, pictures = made(key=name)
    page = check_page(written(tmp_path, results, pictures))
    assert f"{name}.mp4" in page_text(page)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(tmp_path)
    results, pictures = made()
    results.save(tmp_path, pictures)
    (tmp_path / "results.json").write_text('{"title": 1}')
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(tmp_path)


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 820, 1400])
def test_page_in_a_browser(width: int, tmp_path: Path) -> None:
    """Chromium renders it without an error, and nothing is wider than the window."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium, and this machine has none")
    page = written(tmp_path, *made())
    probe = tmp_path / "probe.html"
    script = "<script>document.title = 'width ' + document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    done = subprocess.run(
        [
            browser,
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    content, window = (int(part) for part in title.removeprefix("width ").split(" of "))
    assert content <= window
    assert "Uncaught" not in done.stderr
