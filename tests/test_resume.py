"""Resume: the rest of the stream, exactly, after any batch, any number of times, on any number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.errors import StateError

from loader_setup import digest, keys, make_loader, stream, write_shards
from synthetic_shards import clip_key, make_shards

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 clips in 4 shards, one of them damaged."""
    return write_shards(tmp_path_factory.mktemp("shards"), 13, 4, bad={5})


def loader_of(shards: Path, **options: Any) -> Any:
    return make_loader(shards, **{"random_end": True, "max_reject_share": 1.0, "window_shards": 2, **options})


def saved_after(shards: Path, epochs: int, batches: int, **options: Any) -> dict[str, Any]:
    """The state after some full epochs and some batches, through JSON as in a checkpoint."""
    loader = loader_of(shards, **options)
    for _ in range(epochs):
        list(loader)
    for number, _ in enumerate(loader, 1):
        if number == batches:
            break
    return json.loads(json.dumps(loader.state_dict()))


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("batches", [1, 4, 6])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 1), (0, 2)])
def test_the_rest_of_the_stream_is_exact(shards: Path, epochs: int, batches: int, before: int, after: int) -> None:
    whole = loader_of(shards)
    expected = [stream(whole) for _ in range(epochs + 2)]
    state = saved_after(shards, epochs, batches, num_workers=before)
    assert (state["epoch"], state["consumed"]) == (epochs, 2 * batches)
    loader = loader_of(shards, num_workers=after)
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    assert stream(loader) == expected[epochs][batches:]
    assert stream(loader) == expected[epochs + 1]
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stored_order_of_an_evaluation_resumes_too(shards: Path, workers: int) -> None:
    options: dict[str, Any] = {"shuffle": False, "drop_last": False}
    whole = loader_of(shards, **options)
    expected = [stream(whole) for _ in range(2)]
    state = saved_after(shards, 0, 5, **options)
    loader = loader_of(shards, num_workers=workers, **options)
    loader.load_state_dict(state)
    assert stream(loader) == expected[0][5:]
    assert stream(loader) == expected[1]
    loader.close()


def test_after_the_last_batch_comes_an_empty_remainder_and_the_next_epoch(shards: Path) -> None:
    loader = loader_of(shards)
    epochs = [keys(loader) for _ in range(3)]
    for options in ({}, {"drop_last": False}):
        state = saved_after(shards, 1, 99, **options)
        assert state["consumed"] == (13 if options else 12)
        resumed = loader_of(shards, **options)
        resumed.load_state_dict(state)
        assert keys(resumed) == []
        assert keys(resumed)[:6] == epochs[2]


def test_resuming_again_and_again_loses_nothing(shards: Path) -> None:
    whole = loader_of(shards)
    expected = stream(whole) + stream(whole)
    got: list[Any] = []
    state = loader_of(shards).state_dict()
    while len(got) < len(expected):
        loader = loader_of(shards)  # a new process would be no different: see the killed one below
        loader.load_state_dict(state)
        for batch in loader:
            got.append(digest(batch))
            break
        state = json.loads(json.dumps(loader.state_dict()))
        if state["consumed"] == 12:
            rest = loader_of(shards)
            rest.load_state_dict(state)
            assert keys(rest) == []
            next(iter(rest), None)
            state = {**state, "epoch": state["epoch"] + 1, "consumed": 0}
    assert got == expected


def test_a_state_may_be_loaded_in_the_middle_of_a_loop(shards: Path) -> None:
    loader = loader_of(shards)
    expected = [keys(loader) for _ in range(2)]
    state = saved_after(shards, 0, 2)
    loop = iter(loader)
    next(loop)
    loader.load_state_dict(state)
    assert next(loop, None) is None
    assert keys(loader) == expected[0][2:]
    assert keys(loader) == expected[1]


def test_a_fresh_state_starts_at_the_beginning(shards: Path) -> None:
    first = loader_of(shards)
    state = first.state_dict()
    assert (state["epoch"], state["consumed"]) == (0, 0)
    second = loader_of(shards)
    list(second)
    second.load_state_dict(state)
    assert stream(second) == stream(first)


def test_the_trainer_side_resumes_alike(shards: Path) -> None:
    state = saved_after(shards, 1, 3, decode_on="trainer", num_workers=1)
    loader, whole = loader_of(shards), loader_of(shards)
    list(whole)
    loader.load_state_dict(state)
    assert stream(loader) == stream(whole)[3:]


# -- killed ----------------------------------------------------------------------------------------------

VICTIM = """
import json, os, sys
sys.path.insert(0, {tests!r})
from loader_setup import make_loader

loader = make_loader({shards!r}, random_end=True, max_reject_share=1.0, window_shards=2, num_workers=2)
if os.path.exists({state!r}):
    with open({state!r}) as file:
        loader.load_state_dict(json.load(file))
for epoch in range(100):
    for batch in loader:
        state = loader.state_dict()
        with open({state!r} + ".new", "w") as file:
            json.dump(state, file)
        os.replace({state!r} + ".new", {state!r})
        print(json.dumps([state["epoch"], state["consumed"], batch["keys"]]), flush=True)
"""


def test_a_run_killed_twice_goes_on_where_it_was(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    script = VICTIM.format(tests=str(TESTS), shards=str(shards), state=str(path))
    whole = loader_of(shards)
    expected = [keys(whole) for _ in range(6)]
    place = 0  # batches that the saved state has seen
    for lines in (3, 5):  # the second run reaches the second epoch
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None
            for number in range(lines):
                epoch, consumed, got = json.loads(victim.stdout.readline())
                assert 6 * epoch + consumed // 2 == place + number + 1
                assert got == expected[epoch][consumed // 2 - 1]
            os.kill(victim.pid, signal.SIGKILL)
        state = json.loads(path.read_text())
        assert 6 * state["epoch"] + state["consumed"] // 2 >= place + lines
        place = 6 * state["epoch"] + state["consumed"] // 2
    assert state["epoch"] >= 1
    loader, whole = loader_of(shards), loader_of(shards)
    for _ in range(state["epoch"]):
        list(whole)
    loader.load_state_dict(state)
    assert stream(loader) == stream(whole)[state["consumed"] // 2 :]
    assert stream(loader) == stream(whole)


# -- ranks -----------------------------------------------------------------------------------------------


def ranks_of(shards: Path, world_size: int, **options: Any) -> list[Any]:
    """One loader per rank, of global batch 4."""
    return [
        loader_of(shards, batch_size=4 // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def global_batches(loaders: list[Any], batches: int | None = None) -> list[list[str]]:
    """The global batches that the ranks deliver together; all ranks have to deliver equally many."""
    loops = [iter(loader) for loader in loaders]
    merged = []
    while batches is None or len(merged) < batches:
        rows = [next(loop, None) for loop in loops]
        if all(row is None for row in rows):
            return merged
        assert all(row is not None for row in rows)
        merged.append(list(chain(*(row["keys"] for row in rows))))
    return merged


def test_a_run_moves_between_numbers_of_ranks(shards: Path) -> None:
    whole = loader_of(shards, batch_size=4)
    expected = [*keys(whole), *keys(whole), *keys(whole)]  # 3 batches each
    got: list[list[str]] = []
    state = None
    for world_size, batches in ((1, 1), (2, 1), (4, 2), (1, 1), (2, 2), (1, 2)):
        loaders = ranks_of(shards, world_size)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        while batches:
            part = global_batches(loaders, batches)
            got += part
            batches -= len(part)
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert got == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_partial_global_batch_is_spread_over_all_ranks(shards: Path, world_size: int) -> None:
    loaders = ranks_of(shards, world_size, drop_last=False, shuffle=False)
    assert {len(loader) for loader in loaders} == {4}
    own, padding = [], []
    counts = set()
    for loader in loaders:
        batches = list(loader)
        counts.add(len(batches))
        assert all(batch["keys"] for batch in batches)
        for batch in batches:
            for key, meta in zip(batch["keys"], batch["meta"], strict=True):
                (padding if meta.get("padding") else own).append(meta.get("spare_for", key))
        assert loader.state_dict()["consumed"] == 13
    assert counts == {4}
    assert sorted(own) == [clip_key(number) for number in range(13)]
    assert padding == [clip_key(12)] * (world_size - 1)


# -- refusals --------------------------------------------------------------------------------------------


def test_a_state_of_something_else_is_refused_by_part(shards: Path, tmp_path: Path) -> None:
    state = saved_after(shards, 0, 2)
    others = {
        "seed was 3, is 4": {"seed": 4},
        "global_batch was 2, is 3": {"batch_size": 3},
        "sampling was .FastSlowSampling.* is .DenseSampling": {"sampling": {"kind": "dense", "num_frames": 3}},
        "order was 'shuffled, windows of 2 shards', is 'stored'": {"shuffle": False},
        "drop_last was True, is False": {"drop_last": False},
        "random_end was True, is False": {"random_end": False},
        "order was .* windows of 2 .* is .* windows of 3": {"window_shards": 3},
    }
    for text, options in others.items():
        with pytest.raises(StateError, match=text):
            loader_of(shards, **options).load_state_dict(state)
    other = make_shards(tmp_path, num_samples=14, samples_per_shard=4)
    with pytest.raises(StateError, match=r"data was .*; samples was 13, is 14.*strict=False"):
        loader_of(other).load_state_dict(state)


def test_the_fingerprint_ignores_where_and_with_how_many_it_runs(shards: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in shards.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    state = saved_after(shards, 0, 2)
    loader = loader_of(moved, batch_size=1, rank=1, world_size=2, num_workers=1, image_size=32, mask="full")
    loader.load_state_dict(state)
    assert len(list(loader)) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "crop": "random", "normalize": (0.5, 0.5)},
        {"mask": "sliding_window", "window_size": 2, "position_ids": "sequence"},
        {"patches_per_frame": 9, "pack_to": 144, "fields": ("json",)},
    ],
    ids=str,
)
def test_settings_of_the_look_alone_may_differ_from_those_of_the_state(shards: Path, options: dict[str, Any]) -> None:
    loader, whole = loader_of(shards, **options), loader_of(shards)
    loader.load_state_dict(saved_after(shards, 0, 2))
    assert [batch["keys"] for batch in loader] == [batch["keys"] for batch in whole][2:]


def test_another_state_is_accepted_when_asked_to(shards: Path) -> None:
    state = saved_after(shards, 1, 2)
    loader, whole = loader_of(shards, seed=9), loader_of(shards, seed=9)
    list(whole)
    loader.load_state_dict(state, strict=False)
    assert loader.epoch == 1
    assert stream(loader) == stream(whole)[2:]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 99}, "version 99"),
        ({"epoch": -1}, "epoch=-1"),
        ({"consumed": "4"}, "consumed='4'"),
        ({"consumed": 10**9}, "consumed 1000000000 samples of an epoch, but there are 13"),
        ({"fingerprint": "x"}, "fingerprint"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_broken_states_are_refused(shards: Path, change: dict[str, Any], text: str, strict: bool) -> None:
    loader = loader_of(shards)
    with pytest.raises(StateError, match=text):
        loader.load_state_dict({**loader.state_dict(), **change}, strict=strict)


@pytest.mark.parametrize("state", [{}, {"epoch": 1, "consumed": 3}, [1, 2], None])
def test_what_is_no_state_is_refused(shards: Path, state: Any) -> None:
    with pytest.raises(StateError, match=r"state_dict\(\)"):
        loader_of(shards).load_state_dict(state)
