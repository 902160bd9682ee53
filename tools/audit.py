"""`framestream audit`: a proof that the model which a config or a checkpoint describes is causal."""

from __future__ import annotations

import json as to_json
import sys
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from framestream.pipeline.errors import ConfigError, FramestreamError

from .audit_influence import Influence, audit_module
from .audit_model import audit_reconstruction
from .audit_report import Check, ModelAudit
from .progress import reporting

__all__ = ["Check", "Influence", "ModelAudit", "audit", "audit_module", "audit_reconstruction"]

_LEAKS_SHOWN = 3  # of each check
COLUMNS = 80


def audit(
    target: str,
    *,
    shards: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    seed: int = 0,
    overrides: list[str] = [],  # noqa: B006 - never changed
    output: str | None = None,
    json: bool = False,
) -> int:
    """Prove that a model is causal: that no prediction has seen what it has to predict.

    The model is built as training builds it, in fp32 and eval mode, and run on two random clips in the layout of the
    config: one of the length at which its mask shows most targets, and one too short for its sampling. No data is
    needed. Then

    frames      every frame is changed in turn; predictions of frames that must not see it stay equal in every bit,
                and those that may see it change. Which may is (A | I)^L: the mask A through the L layers.
    errors      the error of each frame depends on what its prediction sees and on its target, and the loss is the
                mean of exactly the errors that count.
    states      hidden states of a language model, with their times, are changed in turn: no frame reads a later one.
    gradient    the same from the other end: derivatives of what each frame gives to the loss, in one backward pass.
    targets     targets that can be seen are found, counted, and must not be in the loss.
    rollout     generated frames do not depend on true frames after the history.

    A pair that is allowed and has no influence is reported and is no failure, unless no frame influences any other.

    Examples:
        framestream audit demo
        framestream audit runs/mine --output audit.png
        framestream audit long --overrides model.tower.kind=pixel model.embedding_dim=768

    Args:
        target: a training config, by path or name; a run folder, whose newest checkpoint is taken; or a checkpoint.
        shards: take two clips of these shards in place of random ones.
        device: cpu or cuda. Large towers take minutes on a CPU: they run once for each frame.
        seed: of the random clips and of the changes.
        overrides: settings to change, as section.key=value; another tower, for example, to audit only the predictor.
        output: also write the picture there, e.g. audit.png.
        json: print one JSON object with all checks and matrices in place of the picture.

    Returns:
        Exit code: 0 when the model is causal, 1 when something leaks, 2 when nothing can be proved or the request is
        impossible.
    """
    try:
        if seed < 0:
            raise ConfigError(f"--seed must not be negative, got {seed}.")
        title, found, notes = _run(target, shards, device, seed, overrides)
        if output is not None:
            from .audit_picture import write_picture

            write_picture(found, output, title)
    except (FramestreamError, OSError) as err:
        print(f"framestream audit: {err}", file=sys.stderr)
        return 2
    if json:
        print(to_json.dumps({"target": target, "title": title, "notes": notes, **found.to_json()}))
    else:
        _show(title, found, notes)
    return 1 if found.leaks else 2 if found.proves_nothing else 0


def _run(
    target: str, shards: str | None, device: str, seed: int, overrides: list[str]
) -> tuple[str, ModelAudit, list[str]]:
    from .audit_batch import build_subject, find_subject, random_batch, real_batch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device here; use cpu.")
    subject = find_subject(target, overrides)
    module, patches, notes = build_subject(subject, torch.device(device), seed)
    if shards is None:
        batch: Any = random_batch(subject.config, patches, seed)
    else:
        batch = real_batch(subject.config, patches, shards)
        notes.append(f"clips {', '.join(batch['keys'])}")
    with reporting("audit", counted="leaks") as reporter:
        found = audit_reconstruction(
            module, batch, seed=seed, progress=lambda done, total, leaks: reporter.step("runs", done, total, leaks)
        )
    layout = found.layouts[0]
    rule, _ = subject.config.mask()
    title = (
        f"{subject.name}: {layout.num_frames} frames ({sum(layout.stream)} fast, "
        f"{layout.num_frames - sum(layout.stream)} slow), {layout.num_tokens} tokens, {found.num_layers} layers, {rule}"
    )
    return title, found, notes


def _show(title: str, found: ModelAudit, notes: list[str]) -> None:
    from .audit_picture import picture

    console = Console(width=COLUMNS, highlight=False)
    console.print(Text(title, style="bold"))
    for note in notes:
        console.print(Text(note, style="dim"))
    console.print()
    lines = picture(found)
    for line in lines:
        console.print(line, no_wrap=True, crop=False)
    if not lines:
        console.print("More than 32 frames: --output audit.png shows them.")
    console.print()
    table = Table.grid(padding=(0, 1))
    for check in found.checks:
        mark = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        table.add_row(mark, Text(check.name, style="bold"), Text("\n".join(_lines(check))))
    console.print(table)
    console.print()
    console.print(verdict(found))


def _lines(check: Check) -> list[str]:
    lines = [check.said]
    if not check.passed:
        lines = check.leaks[:_LEAKS_SHOWN]
        if more := len(check.leaks) - len(lines):
            lines.append(f"and {more} more")
    if check.silent:
        lines.append(f"{check.silent} pairs that are allowed had no influence")
    return lines + check.notes


def verdict(found: ModelAudit) -> Text:
    """The last line."""
    if found.leaks:
        return Text("NOT CAUSAL: information reaches predictions that must not have it.", style="bold red")
    if found.proves_nothing:
        return Text("NOTHING PROVED: no frame influences any other, whatever the mask allows.", style="bold red")
    return Text("Causal: no prediction in the loss depends on its target or on what comes later.", style="bold green")
