"""One self-contained HTML page from the results of a run: no script, no request, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import figures
from .pages import page_environment
from .results import ClipView, RunResults

REPORT_FILE = "report.html"


def _lookup(results: Any, path: str) -> Any:
    """`evaluation.rollout.0.ratio` -> the value there; dataclasses, dicts and lists alike."""
    value = results
    for part in path.split("."):
        if isinstance(value, list):
            value = value[int(part)]
        elif isinstance(value, Mapping):
            value = value[part]
        else:
            value = getattr(value, part)
    return value


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 3 min 05 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def verdict(results: RunResults) -> tuple[str, str]:
    """A headline and a sentence that say what the numbers say, good or bad."""
    forced = results.evaluation["teacher_forced"]["ratio"]
    steps = [step["ratio"] for step in results.evaluation["rollout"]]
    rolled = bool(steps) and steps[0] is not None
    if forced is None and not rolled:
        headline = "Nothing was measured."
    elif forced is None:
        headline = "Nothing was measured from true history."
    elif forced < 1 and (not rolled or steps[0] < 1):
        headline = f"The next frame, with {1 - forced:.0%} less error than repeating the last one."
    elif forced < 1:
        headline = "Better than repeating the last frame on true history, not on its own output."
    else:
        headline = "The model does not yet beat repeating the last frame."
    beaten = 0
    while beaten < len(steps) and steps[beaten] is not None and steps[beaten] < 1:
        beaten += 1
    if not rolled:
        reason = "no held-out clip is long enough, or nothing in them moves" if steps else "the settings ask for none"
        reach = f"frames generated from its own output were not measured ({reason})"
    elif beaten == len(steps):
        reach = f"all {beaten} frames that it generates from its own output stay below 1"
    elif beaten:
        reach = f"generating from its own output it stays below 1 for {beaten} of {len(steps)} frames"
    else:
        reach = "generating from its own output it is above 1 from the first frame on"
    if forced is None:
        found = (
            "No prediction from true history could be scored: the held-out clips are too short, nothing in them moves, "
            "or the mask gives every target away"
        )
    else:
        found = (
            f"On held-out clips the model's error is {forced:.2f} of the error of repeating the last frame "
            "(below 1 is better)"
        )
    return headline, f"{found}; {reach}. {_mask_sentence(results)}"


def _mask_sentence(results: RunResults) -> str:
    leaking = results.evaluation["leaking_targets"]
    if not leaking:
        return "The mask shows no frame its own target."
    return (
        f"The mask shows {leaking} frames of the held-out clips their own target; those are left out of the numbers "
        "from true history."
    )


def _shares(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    total = sum(seconds.values())
    return [
        {"name": name, "seconds": value, "share": value / total if total else 0.0}
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        if total and value / total >= 0.0005
    ]


def _forecast_view(results: RunResults, pictures: Mapping[str, np.ndarray], number: int) -> dict[str, Any]:
    """Pictures of one forecast as data URIs; both difference rows share one scale."""
    forecast = results.forecasts[number]
    last, true, model = (pictures[f"forecast{number}_{part}"] for part in ("last", "true", "model"))
    gaps = [np.abs(a.astype(np.float32) - b).mean(-1) / 255 for a in true for b in (last,)]
    scale = max(0.05, float(np.quantile(np.stack(gaps), 0.995)))
    ratio = [m / c if c > 0 else None for m, c in zip(forecast.model_error, forecast.copy_last_error, strict=True)]
    return {
        "forecast": forecast,
        "scale": scale,
        "last": figures.png_uri(last),
        "true": [figures.png_uri(image) for image in true],
        "model": [figures.png_uri(image) for image in model],
        "model_gap": [figures.difference_uri(m, t, scale) for m, t in zip(model, true, strict=True)],
        "copy_gap": [figures.difference_uri(last, t, scale) for t in true],
        "ratio": ratio,
    }


def render_report(results: RunResults, pictures: Mapping[str, np.ndarray]) -> str:
    """The whole page as a string.

    Every number on it stands in a `<data>` element whose `data-key` is its path in results.json.
    """
    from markupsafe import Markup

    def number(path: str, style: str = "{:.2f}", scale: int = 1) -> Markup:
        value = _lookup(results, path)
        if value is None:
            return Markup("<span>not measured</span>")
        text = style.format(value * scale) if not isinstance(value, str) else value
        return Markup('<data data-key="{}" value="{}">{}</data>').format(path, repr(value), text)

    def seconds(path: str) -> Markup:
        value = _lookup(results, path)
        return Markup('<data data-key="{}" value="{}">{}</data>').format(path, repr(value), duration(value))

    environment = page_environment()
    environment.filters["duration"] = duration
    evaluation = results.evaluation
    forced = [step["ratio"] for step in evaluation["forced_steps"]]
    rollout = [step["ratio"] for step in evaluation["rollout"]]
    headline, sentence = verdict(results)
    charts = {
        "loss": Markup(figures.loss_chart(results.train_curve, "Training loss by optimiser step.")),
        "held_out": Markup(
            figures.held_out_chart(
                results.held_out_curve, "Error divided by copy-last error on held-out clips, by optimiser step."
            )
        ),
        "ratios": Markup(
            figures.ratio_chart(
                forced,
                rollout,
                "Error divided by copy-last error, teacher-forced and generated, frames 1 to "
                f"{len(rollout)}; the table beside it has the numbers.",
            )
        ),
        "mask": Markup(figures.mask_picture(results.mask)),
        "clips": [Markup(figures.timeline(clip, pictures[f"clip{i}"])) for i, clip in enumerate(results.clips)],
        "shared": [_shared(clip) for clip in results.clips],
    }
    return environment.get_template("report.html.j2").render(
        r=results,
        n=number,
        s=seconds,
        headline=headline,
        sentence=sentence,
        charts=charts,
        forecasts=[_forecast_view(results, pictures, i) for i in range(len(results.forecasts))],
        stage_shares=_shares({stage.name: stage.seconds for stage in results.stages}),
        loop_shares=_shares(results.loop_seconds),
        worker_shares=_shares(results.worker_seconds),
        settings=_flatten(results.settings),
        rolled_clips="each held-out clip"
        if rollout and evaluation["rollout"][0]["frames"] == evaluation["clips"]
        else "each held-out clip that is long enough",
        same_frames=bool(rollout)
        and all(
            a["frames"] == b["frames"] for a, b in zip(evaluation["forced_steps"], evaluation["rollout"], strict=True)
        ),
    )


def _shared(clip: ClipView) -> str:
    """How many source frames both streams want."""
    wanted = [
        {clip.frame_index[i] for i in range(len(clip.stream)) if clip.stream[i] == stream and clip.valid[i]}
        for stream in (0, 1)
    ]
    both = len(wanted[0] & wanted[1])
    return f"{both} frame{'' if both == 1 else 's'}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def write_report(folder: Path | str) -> Path:
    """Read results.json and pictures.npz of a run folder and write report.html beside them."""
    folder = Path(folder)
    results, pictures = RunResults.load(folder)
    path, temporary = folder / REPORT_FILE, folder / f".{REPORT_FILE}.tmp"
    temporary.write_text(render_report(results, pictures), encoding="utf-8")
    temporary.replace(path)
    return path
