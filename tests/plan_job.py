"""Plans made in processes that kill themselves: `python plan_job.py FOLDER` leaves one there for each of `STEPS`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from framestream.pipeline.probe import VideoInfo
from framestream.tools import plan_schema
from framestream.tools.inputs import Source, Unusable
from framestream.tools.plan_store import PlanStore
from framestream.tools.probing import Probed
from framestream.tools.shard_options import Cutting, Filters, ShardOptions

OPTIONS = ShardOptions(
    samples_per_shard=100,
    cutting=Cutting(clip_seconds=0.4, val_tail=0.3),
    filters=Filters(min_seconds=0.6),
    drop_duplicates=True,
)
SETTINGS = {"options": OPTIONS.to_json(), "encoder": "x264"}
NUM_INPUTS = 2500
STEPS = ("listing", "listed", "probing", "deciding", "decided")  # where a job can be killed: in the middle, at the end


def items(num_inputs: int = NUM_INPUTS) -> Iterator[Source | Unusable]:
    """Inputs of all kinds: those that cannot be used, shared keys, named twice, parts of one video."""
    for number in range(num_inputs):
        name = f"folder/{number:05d}.mp4"
        if number % 50 == 7:
            yield Unusable(name, "cannot be read (No such file or directory)")
        elif number % 50 == 9:
            yield Source("/videos/folder/../folder/00000.mp4", "folder/00000.mp4", "a", start=0.0, end=float(number))
        else:
            path = "/videos/" + (name if number % 50 != 11 else "folder/00002.mp4")
            key = f"key-{number // 3}"
            yield Source(path, name, key, f"caption {number}", user={"n": number}, size=1000 + number, version="v1")


def outcome(number: int) -> Probed | str:
    """What probing an input gives: every tenth is broken, every eighth has the pictures of another."""
    if number % 10 == 3:
        return f"{number}: it is no video"
    num_frames = 10 + number * 37 % 190
    content = f"{number - number % 8 if number % 8 == 1 else number:064x}"
    times = tuple(frame / 25 + frame % 2 / 100 for frame in range(num_frames)) if number % 6 == 0 else None
    keys = tuple(range(0, num_frames, 12))
    info = VideoInfo(num_frames, 25.0, num_frames / 25, 64, 48, "h264", 0, keys, times, pix_fmt="yuv420p")
    return Probed(info, 1000 + number, content, f"caption {number}", ())


def make_plan(path: Path, kill_at: str = "") -> None:
    """Make the plan, or go on with one that was begun."""

    def reached(step: str) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def listing() -> Iterator[Source | Unusable]:
        for number, item in enumerate(items()):
            if number == NUM_INPUTS // 2:
                reached("listing")
            yield item
        reached("listed")

    def progress(done: int, total: int) -> None:
        reached("deciding" if done < total else "decided")

    with PlanStore.open(path) if path.exists() else PlanStore.create(path, SETTINGS) as plan:
        if plan.stage == "listing":
            plan.add_inputs(listing())
        if plan.stage == "probing":
            for number, _ in plan.to_probe():
                plan.record(number, outcome(number))
                if plan.num_probed == 1700:
                    reached("probing")
            plan.decide(OPTIONS, progress)


def _killed(path: Path, step: str) -> bool:
    child = os.fork()
    if child == 0:
        try:
            make_plan(path, step)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    plan_schema._CACHE_KIB = 32  # so that pages are in the file, and the old ones in the journal, before a commit
    for each in STEPS:
        if not _killed(Path(sys.argv[1]) / each, each):
            sys.exit(f"the plan was not killed at {each}")
