"""Real ranks under torchrun: equal batch counts, no hang, every sample once, one stream on any number of ranks."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.order import SampleOrder, rank_rows
from framestream.pipeline.shards import ShardWriter

import torchrun
from loader_setup import make_loader
from model_setup import PATCHES, SIDE, small_module
from rank_job import ELASTIC_BATCH, ELASTIC_STAGES, EPOCHS, elastic_loader, rows_of
from synthetic_shards import clip_key, small_video

VICTIM = 1  # the rank that meets all damaged samples
SIZES = (7, 1, 4, 5)  # samples of each shard

SCENARIOS: dict[str, dict[str, Any]] = {
    "shuffled": {"batch_size": 2, "num_workers": 2, "random_end": True},
    "whole": {"batch_size": 2, "num_workers": 1, "random_end": True, "drop_last": False},
    "evaluation": {"batch_size": 2, "shuffle": False, "drop_last": False},
    "one_shard": {"batch_size": 1, "num_workers": 3, "drop_last": False},  # fewer shards than workers
    "trainer": {"batch_size": 2, "num_workers": 1, "random_end": True, "drop_last": False, "decode_on": "trainer"},
}


def sizes_of(name: str) -> tuple[int, ...]:
    return (7,) if name == "one_shard" else SIZES


def uneven_shards(folder: Path, sizes: tuple[int, ...], bad: set[int] | None = None) -> Path:
    """Shards of the given sizes; the samples of `bad`, counted through all shards, are no video."""
    number = 0
    folder.mkdir(parents=True)
    for shard, size in enumerate(sizes):
        with ShardWriter(folder / f"part{shard}", prefix="clips", samples_per_shard=size) as writer:
            for _ in range(size):
                video, info = small_video(number, 24, (96, 64), ".mp4")
                data = b"this is no video" * 64 if number in (bad or ()) else video
                writer.write(clip_key(number), data, "mp4", {**info, "user": {"number": number}}, f"clip {number}")
                number += 1
        for file in (folder / f"part{shard}").glob("clips*"):
            file.rename(folder / f"part{shard}-{file.name}")
    return folder


def owner(position: int, samples: int, global_batch: int, ranks: int) -> int:
    """The rank that has a position of an epoch among its rows."""
    start = position // global_batch * global_batch
    rows = min(global_batch, samples - start)
    return next(rank for rank in range(ranks) if position - start in rank_rows(rows, rank, ranks))


def damage_for(options: dict[str, Any], sizes: tuple[int, ...], ranks: int) -> tuple[int, set[int]]:
    """A seed, and samples that in every epoch fall to `VICTIM`, in a batch that `drop_last` keeps."""
    samples, global_batch = sum(sizes), options["batch_size"] * ranks
    wanted = 1 if len(sizes) == 1 else 2
    for seed in range(1000):
        order = SampleOrder(sizes, seed=seed, shuffle=options.get("shuffle", True))
        common = set(range(samples))
        for epoch in range(EPOCHS):
            mine = set()
            for position in range(samples // global_batch * global_batch):
                if owner(position, samples, global_batch, ranks) == VICTIM:
                    shard, sample = order.at(epoch, position)
                    mine.add(sum(sizes[:shard]) + sample)
            common &= mine
        if len(common) >= wanted:
            return seed, set(sorted(common)[:wanted])
    raise AssertionError("No seed brings the damaged samples to one rank.")


class Job:
    """What a job on `ranks` ranks got to do, and what each of them reported."""

    def __init__(self, folder: Path, ranks: int, elastic_from: Path | None = None) -> None:
        self.folder, self.ranks = folder, ranks
        self.orphans: list[int] = []  # workers of ranks that were killed
        self.options: dict[str, dict[str, Any]] = {}
        self.bad: dict[str, set[int]] = {}
        for name, options in SCENARIOS.items():
            seed, self.bad[name] = damage_for(options, sizes_of(name), ranks)
            self.options[name] = {**options, "seed": seed}
            uneven_shards(folder / name, sizes_of(name), self.bad[name])
        if elastic_from is None:
            uneven_shards(folder / "elastic", (11, 2, 16), {4, 20})
        else:
            (folder / "elastic").symlink_to(elastic_from / "elastic")
            (folder / "elastic.json").write_bytes((elastic_from / "elastic.json").read_bytes())
        (folder / "plan.json").write_text(json.dumps(self.options))

    def read(self) -> Job:
        self.results = [json.loads((self.folder / f"rank{rank}.json").read_text()) for rank in range(self.ranks)]
        return self


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """All scenarios on 2 ranks, and the first stage of the elastic run, killed in the middle of an epoch."""
    job = Job(tmp_path_factory.mktemp("two"), 2)
    process = torchrun.start("rank_job.py", 2, job.folder)
    doomed = [job.folder / f"doomed{rank}.json" for rank in range(2)]
    deadline = time.monotonic() + torchrun.LIMIT_S
    while not all(path.exists() for path in doomed):
        if process.poll() is not None or time.monotonic() > deadline:
            torchrun.finish(process, job.folder, 0.1)
            raise AssertionError("The job ended before it was killed.")
        time.sleep(0.05)
    marked = [json.loads(path.read_text()) for path in doomed]
    process.kill()
    for ids in marked:
        os.kill(ids["rank"], signal.SIGKILL)
    process.wait()
    job.orphans = [pid for ids in marked for pid in ids["workers"]]
    return job.read()


@pytest.fixture(scope="module")
def three(two: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """All scenarios on 3 ranks, and the elastic run, which goes on there."""
    job = Job(tmp_path_factory.mktemp("three"), 3, elastic_from=two.folder)
    torchrun.finish(torchrun.start("rank_job.py", 3, job.folder), job.folder)
    return job.read()


def in_one_process(job: Job, name: str, shards: Path | None = None) -> list[list[list[list[Any]]]]:
    """Rows by epoch and batch of one process with the same global batch."""
    options = {**job.options[name], "num_workers": 0}
    options["batch_size"] *= job.ranks
    loader = make_loader(shards or job.folder / name, max_reject_share=1.0, rank=0, world_size=1, **options)
    return [[rows_of(batch) for batch in loader] for _ in range(EPOCHS)]


# -- every rank its rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["two", "three"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_together_give_what_one_process_gives(
    name: str, ranks: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    job: Job = request.getfixturevalue(ranks)
    results = [result[name] for result in job.results]
    drop_last = SCENARIOS[name].get("drop_last", True)
    samples, global_batch = sum(sizes_of(name)), SCENARIOS[name]["batch_size"] * job.ranks
    batches = samples // global_batch + (not drop_last)
    assert samples % global_batch, "the scenario is about a last partial batch"
    assert {result["length"] for result in results} == {batches}
    assert all(result["state"] == results[0]["state"] for result in results)

    whole = in_one_process(job, name)
    clean = in_one_process(job, name, uneven_shards(tmp_path / "clean", sizes_of(name)))
    for epoch in range(EPOCHS):
        own = [result["epochs"][epoch] for result in results]
        assert {len(mine) for mine in own} == {batches}
        merged = [[row for row in chain(*parts) if not row[2]] for parts in zip(*own, strict=True)]
        assert merged == whole[epoch]
        drawn = sorted(spare_for or key for key, spare_for, _, _ in chain(*merged))
        keys = [clip_key(number) for number in range(samples)]
        assert drawn == keys if not drop_last else len(set(drawn)) == len(drawn) == batches * global_batch
        for merged_rows, clean_rows in zip(merged, clean[epoch], strict=True):
            for row, undisturbed in zip(merged_rows, clean_rows, strict=True):
                assert row == undisturbed or row[1] == undisturbed[0]  # or a spare in its place
    assert (clean[0] == clean[1]) == (not SCENARIOS[name].get("shuffle", True))


@pytest.mark.parametrize("ranks", ["two", "three"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_rejects_on_one_rank_leave_the_others_alone(name: str, ranks: str, request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(ranks)
    for rank, result in enumerate(result[name] for result in job.results):
        spares = [[row[1] for row in chain(*epoch) if row[1]] for epoch in result["epochs"]]
        if rank == VICTIM:
            assert [set(epoch) for epoch in spares] == [{clip_key(number) for number in job.bad[name]}] * EPOCHS
            assert result["rejects"][0] >= len(job.bad[name])
            assert result["rejects"][1] >= 2 * len(job.bad[name])
        else:
            assert spares == [[], []]
            assert result["rejects"] == [0, 0]


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_every_rank_has_a_row_in_every_batch(ranks: str, request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(ranks)
    padding = 0
    for name in SCENARIOS:
        for result in (result[name] for result in job.results):
            for batch in chain(*result["epochs"]):
                assert batch
                padding += sum(row[2] for row in batch)
    assert padding  # 7 samples do not fill the last batch of any number of ranks


# -- DistributedDataParallel -----------------------------------------------------------------------------


def test_ddp_trains_in_step_and_resumes_to_the_bit(two: Job) -> None:
    first, second = (result["ddp"] for result in two.results)
    for name, steps in (("whole", 10), ("resumed", 3)):  # 5 batches per epoch; 2 of the second were done
        assert len(first[name]["steps"]) == len(second[name]["steps"]) == steps
        gradients = [step[1] for step in first[name]["steps"]]
        assert gradients == [step[1] for step in second[name]["steps"]]
        assert len(set(gradients)) == steps
        assert first[name]["weights"] == second[name]["weights"]
    for run in (first, second):
        assert run["resumed"]["steps"] == run["whole"]["steps"][-3:]
        assert run["resumed"]["weights"] == run["whole"]["weights"]
    keys = [[step[2] for step in run["whole"]["steps"]] for run in (first, second)]
    assert keys == [
        [[row[0] for row in batch] for batch in chain(*result["whole"]["epochs"])] for result in two.results
    ]


def test_the_first_step_of_ddp_is_that_of_one_process(two: Job) -> None:
    options = {**two.options["whole"], "batch_size": 4, "num_workers": 0}
    loader = make_loader(
        two.folder / "whole", image_size=SIDE, patches_per_frame=PATCHES, max_reject_share=1.0,
        rank=0, world_size=1, **options,
    )  # fmt: skip
    loss = small_module()(next(iter(loader))).loss.item()
    losses = [result["ddp"]["whole"]["steps"][0][0] for result in two.results]
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-4)


# -- another number of ranks -----------------------------------------------------------------------------


def stage(folder: Path, ranks: int) -> list[list[list[Any]]]:
    """The global batches of a stage of the elastic run, as far as its state counts them."""
    logs = [(folder / f"elastic{ranks}-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    count = ELASTIC_STAGES[ranks]
    assert [len(log) for log in logs] == [count + 1] * ranks  # one more was at hand
    merged = [list(chain(*map(json.loads, lines))) for lines in zip(*logs, strict=True)]
    return [[row for row in rows if not row[2]] for rows in merged[:count]]


def test_a_killed_run_goes_on_with_three_ranks_and_then_alone(two: Job, three: Job) -> None:
    state = json.loads((two.folder / "elastic.json").read_text())
    assert (state["epoch"], state["consumed"]) == (0, 2 * ELASTIC_BATCH)
    state = json.loads((three.folder / "elastic.json").read_text())
    assert (state["epoch"], state["consumed"]) == (1, ELASTIC_BATCH)
    got = stage(two.folder, 2) + stage(three.folder, 3)
    alone = elastic_loader(three.folder, 1, num_workers=2)
    got += [rows_of(batch) for _ in range(2) for batch in alone]
    (three.folder / "unbroken").mkdir()
    (three.folder / "unbroken" / "elastic").symlink_to(two.folder / "elastic")
    unbroken = elastic_loader(three.folder / "unbroken", 1)
    expected = [rows_of(batch) for _ in range(3) for batch in unbroken]
    assert len(expected) == 15
    assert got == expected
    assert {row[1] for row in chain(*got) if row[1]} == {clip_key(4), clip_key(20)}


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie waits only to be counted by its parent


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc to look at processes")
def test_no_worker_outlives_its_killed_rank(two: Job) -> None:
    assert len(two.orphans) == 2
    deadline = time.monotonic() + 30
    while alive := [pid for pid in two.orphans if is_running(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} are still there"
        time.sleep(0.1)
