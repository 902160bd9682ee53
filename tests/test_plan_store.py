"""The plan of a shard set: nothing is lost in it, nothing is made twice, whatever happens to the process."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.errors import ConfigError, ShardError
from framestream.pipeline.probe import VideoInfo
from framestream.tools import bench_assign
from framestream.tools.clips import Clip
from framestream.tools.inputs import Source, Unusable
from framestream.tools.plan_store import PlanStore
from framestream.tools.probing import Probed
from framestream.tools.shard_options import Cutting, Filters, ShardOptions

import plan_job

TABLES = ("meta", "inputs", "probes", "verdicts", "splits", "shards", "clips", "dropped")


def source(name: str, **fields: Any) -> Source:
    return replace(
        Source(f"/videos/{name}", name, name.split(".")[0].replace("/", "_"), size=1000, version="1"), **fields
    )


def probed(name: str = "", *, num_frames: int = 250, width: int = 640, **fields: Any) -> Probed:
    info = VideoInfo(num_frames, 25.0, num_frames / 25, width, 480, "h264", key_frames=tuple(range(0, num_frames, 50)))
    return Probed(**{"info": info, "size": 1000, "content": f"{name:0>64}", "text": None, "scenes": (), **fields})


Outcomes = dict[str, Probed | str]  # by source


def plan_of(
    path: Path,
    inputs: Iterable[Source | Unusable],
    options: ShardOptions,
    outcomes: Outcomes | None = None,
) -> PlanStore:
    """A decided plan; inputs without an outcome of their own have 10 s."""
    plan = PlanStore.create(path, {"options": options.to_json()})
    plan.add_inputs(inputs)
    for number, each in plan.to_probe():
        plan.record(number, (outcomes or {}).get(each.source, probed(each.source, text=each.text)))
    plan.decide(options)
    return plan


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All tables, row by row."""
    with sqlite3.connect(path) as db:
        return {table: sorted(db.execute(f"SELECT * FROM {table}"), key=repr) for table in TABLES}


def keys(plan: PlanStore, split: str | None = None) -> list[list[str]]:
    """Keys of the clips, shard by shard."""
    return [[clip.key for clip, _ in plan.clips_of(shard.split, shard.number)] for shard in plan.shards(split)]


# --- listing ----------------------------------------------------------------------------------------------------


def test_inputs_come_back_as_they_were_listed(tmp_path: Path) -> None:
    raw = os.fsdecode(b"/videos/\xff.mp4")  # a file name that is no Unicode
    listed = [
        source("a.mp4", text="a caption", split="test", start=1.5, end=3.0, user={"score": 3, "tags": ["x", None]}),
        Source(raw, "\\xff.mp4", "ff", text_file=os.fsdecode(b"/videos/\xff.txt")),
        source("ф.mkv", key="f", size=-1, version=""),
    ]
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs([*listed, Unusable(f"gone{raw}".encode("utf-8", "replace").decode(), f"{raw} is gone")])
        assert [number for number, _ in plan.to_probe()] == [0, 1, 2]
        got = [each for _, each in plan.to_probe()]
        assert got == listed
        assert got[0].user == listed[0].user  # which == leaves out
        assert (plan.num_inputs, plan.num_to_probe, plan.num_probed, plan.num_rejected) == (4, 3, 0, 1)


def test_shared_keys_get_a_hash_and_a_number_and_nobody_else_does(tmp_path: Path) -> None:
    inputs = [
        source("x/v.mp4", key="v"),
        source("y/v.mp4", key="v"),
        source("w.mp4"),
        source("r.mp4", key="v", start=1.0),
    ]
    inputs += [source("r.mp4", key="v", start=2.0), source("r.mp4", key="v", start=3.0)]
    with PlanStore.create(tmp_path / "a", {}) as plan:
        plan.add_inputs(inputs)
        found = [each.key for _, each in plan.sample(10)]
    assert len(set(found)) == len(found) == 6
    assert found[2] == "w"
    assert found[4] == f"{found[3]}-2"
    assert found[5] == f"{found[3]}-3"
    with PlanStore.create(tmp_path / "b", {}) as plan:  # a key that is what another one would become
        plan.add_inputs([*inputs[:2], source("z.mp4", key=found[0])])
        assert [each.key for _, each in plan.sample(10)] == [f"{found[0]}-2", found[1], found[0]]


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a-2"]), st.integers(0, 5), st.integers(0, 2)), max_size=12))
def test_keys_are_unique_and_kept_where_nobody_shares_them(rows: list[tuple[str, int, int]]) -> None:
    inputs = [source(f"{name}.mp4", key=key, start=float(start)) for key, name, start in rows]
    with tempfile.TemporaryDirectory() as folder, PlanStore.create(Path(folder, "plan"), {}) as plan:
        plan.add_inputs(inputs)
        found = [(each.key, inputs[number].key) for number, each in plan.sample(len(inputs))]
    assert len({key for key, _ in found}) == len(found) == len(set(rows))
    wanted = Counter(key for _, key in found)
    for key, asked in found:
        assert key.startswith(asked)
        assert (key == asked) == (wanted[asked] == 1)


def test_what_is_named_twice_is_a_duplicate_of_the_first(tmp_path: Path) -> None:
    inputs = [source("a.mp4"), replace(source("b.mp4"), path="/videos/x/../a.mp4"), source("a.mp4", start=1.0)]
    with plan_of(tmp_path / "plan", [*inputs, inputs[2]], ShardOptions()) as plan:
        assert list(plan.left_out()) == [
            {"source": "b.mp4", "rule": "named twice", "of": "a.mp4"},
            {"source": "a.mp4", "rule": "named twice", "of": "a.mp4"},
        ]
        assert plan.accounts([]).duplicates == 2


def test_other_texts_and_keys_of_one_part_are_inputs_of_their_own(tmp_path: Path) -> None:
    first = source("a.mp4", start=1.0, text="a dog")
    inputs = [
        first, replace(first, text="a cat"), replace(first, key="mine"), replace(first, key="mine", text="a cat"),
        replace(first, path="/videos/./a.mp4", source="/videos/a.mp4", key="videos_a"), first,
    ]  # fmt: skip
    with plan_of(tmp_path / "all", inputs, ShardOptions()) as plan:
        assert [entry["rule"] for entry in plan.left_out()] == ["named twice", "named twice"]
        assert (plan.num_usable, plan.num_to_probe, plan.accounts([]).sampled) == (4, 1, 4)
        clips = [clip for clip, _ in plan.clips_of("", 0)]
        assert [clip.source.text for clip in clips] == ["a dog", "a cat", "a dog", "a cat"]
        assert len({clip.key for clip in clips}) == 4
    with plan_of(tmp_path / "no copies", inputs, ShardOptions(drop_duplicates=True)) as plan:
        assert Counter(entry["rule"] for entry in plan.left_out()) == {"named twice": 2, "same pictures": 3}
        assert [clip.source.text for clip, _ in plan.clips_of("", 0)] == ["a dog"]


def test_an_address_is_one_input_where_its_key_is_that_of_its_name(tmp_path: Path) -> None:
    url = "s3://bucket/many/v.mp4"
    by_name = Source(url, url, "many_v", size=10)  # as a manifest names it, and as a folder has it
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs([by_name, Source(url, "v.mp4", "v", size=10), Source(url, url, "own", size=10)])
        assert (plan.num_inputs, plan.num_usable) == (3, 2)


def test_parts_of_one_video_are_probed_once_and_keep_their_own_texts(tmp_path: Path) -> None:
    parts = [source("a.mp4", start=float(n), end=n + 2.0, text=f"part {n}") for n in range(3)]
    parts.append(source("a.mp4", text_file="/videos/a.txt", end=5.0))
    parts.append(source("a.mp4", text_file="/videos/a.txt", start=5.0))
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs(parts)
        assert [number for number, _ in plan.to_probe()] == [0, 3]
        plan.record(0, probed(text="part 0"))
        plan.record(3, probed(text="from the file"))
        plan.decide(ShardOptions())
        clips = plan.clips_of("", 0)
        texts = [clip.source.text for clip, _ in clips]
        assert texts == ["part 0", "part 1", "part 2", "from the file", "from the file"]
        assert [clip.frames for clip, _ in clips] == [(0, 50), (25, 75), (50, 100), (0, 125), (125, 250)]
        assert all(clip.source.text_file is None for clip, _ in clips)


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"options": {"cutting": {"clip_seconds": 2.0}}}, lambda i: i, "clip_seconds was 1.0, now it is 2.0"),
        ({}, lambda i: i, "clip_seconds was 1.0, now it is None"),
        (None, lambda i: i[:-1], "input d.mp4 is gone"),
        (None, lambda i: i[1:], "input a.mp4 is gone"),
        (None, lambda i: [source("new.mp4"), *i], "input new.mp4 is new"),
        (None, lambda i: [*i, i[0]], "input a.mp4 is new"),
        (None, lambda i: [i[1], i[0], *i[2:]], "the inputs come in another order"),
        (None, lambda i: [i[0], replace(i[1], size=7), *i[2:]], "the size of input b.mp4 has changed"),
        (None, lambda i: [i[0], replace(i[1], version="2"), *i[2:]], "the time or version of input b.mp4 has changed"),
        (None, lambda i: [*i[:2], replace(i[2], start=2.0), i[3]], "the start of input c.mp4 has changed"),
        (None, lambda i: [replace(i[0], text="x"), *i[1:]], "the text of input a.mp4 has changed"),
        (None, lambda i: [replace(i[0], user={"x": 1}), *i[1:]], "the metadata of input a.mp4 has changed"),
        (None, lambda i: [replace(i[0], key="x"), *i[1:]], "the key of input a.mp4 has changed"),
        (None, lambda i: [*i[:2], Unusable("c.mp4", "it is gone"), i[3]], "input c.mp4 cannot be used: it is gone"),
        (None, lambda i: [*i[:3], source("d.mp4")], "input d.mp4 can be used now"),
    ],
)  # fmt: skip
def test_what_differs_from_an_earlier_listing_is_named(tmp_path: Path, settings: Any, change: Any, words: str) -> None:
    before = {"options": {"cutting": {"clip_seconds": 1.0}}}
    inputs = [source("a.mp4"), source("b.mp4"), source("c.mp4", start=1), Unusable("d.mp4", "it is gone")]
    with PlanStore.create(tmp_path / "plan", before) as plan:
        plan.add_inputs(inputs)
        assert plan.difference(before, iter(inputs)) == ""
        for _ in range(2):
            assert plan.difference(before if settings is None else settings, iter(change(inputs))) == words
        assert plan.difference(before, iter(inputs)) == ""


def test_a_sample_is_spread_evenly_over_what_can_be_used(tmp_path: Path) -> None:
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs(Unusable("x", "gone") if n % 4 == 0 else source(f"{n}.mp4") for n in range(400))
        for n in (1, 7, 30, 300):
            numbers = [number for number, _ in plan.sample(n)]
            assert len(set(numbers)) == n
            gaps = [b - a for a, b in zip([-1, *numbers], numbers, strict=False)]
            assert max(gaps) - min(gaps) <= 4
        assert len(plan.sample(1000)) == 300
        assert plan.sample(0) == []


# --- deciding ---------------------------------------------------------------------------------------------------


def test_every_input_ends_in_exactly_one_way(tmp_path: Path) -> None:
    inputs = [
        source("good.mp4"), Unusable("gone.mp4", "it is gone"), source("broken.mp4"), source("short.mp4"),
        source("small.mp4"), source("copy.mp4"), source("good.mp4"), source("tiny.mp4"), source("other.mp4"),
        source("good.mp4", key="beyond", start=11.0),
    ]  # fmt: skip
    outcomes: Outcomes = {
        "broken.mp4": "it is no video",
        "short.mp4": probed("short", num_frames=20),
        "small.mp4": probed("small", width=100),
        "copy.mp4": probed("good.mp4"),
        "tiny.mp4": probed("tiny", num_frames=40),
    }
    filters = Filters(min_seconds=1, min_side=240)
    options = ShardOptions(cutting=Cutting(clip_seconds=4.0), filters=filters, drop_duplicates=True)
    with plan_of(tmp_path / "plan", inputs, options, outcomes) as plan:
        accounts = plan.accounts([])
        assert accounts.found == 10
        assert (accounts.sampled, accounts.rejected, accounts.duplicates) == (2, 3, 2)
        assert accounts.filtered == {"min_seconds": 1, "min_side": 1, "shorter than half a clip": 1}
        assert (accounts.clips_planned, accounts.clips_written, accounts.clips_rejected) == (6, 6, 0)
        assert accounts.clips_dropped == {"remainder shorter than half a clip": 1}
        assert list(plan.rejects([])) == [
            {"source": "gone.mp4", "reason": "it is gone"},
            {"source": "broken.mp4", "reason": "it is no video"},
            {"source": "good.mp4", "reason": "its row asks for 11 to 10 s, the video has 10.000 s"},
        ]
        assert list(plan.left_out()) == [
            {"source": "short.mp4", "rule": "min_seconds", "reason": "its 0.8 s are fewer than min_seconds 1"},
            {
                "source": "small.mp4",
                "rule": "min_side",
                "reason": "its 100 pixels of the shorter side are fewer than min_side 240",
            },
            {"source": "copy.mp4", "rule": "same pictures", "of": "good.mp4"},
            {"source": "good.mp4", "rule": "named twice", "of": "good.mp4"},
            {"source": "tiny.mp4", "rule": "shorter than half a clip"},
        ]
        assert keys(plan) == [[*(f"good-{n:05d}" for n in range(3)), *(f"other-{n:05d}" for n in range(3))]]


def test_clips_that_could_not_be_made_are_rejects_and_their_input_is_one_when_all_are_lost(tmp_path: Path) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=5.0))
    with plan_of(tmp_path / "plan", [source("a.mp4"), source("b.mp4"), source("c.mp4")], options) as plan:
        lost = [("c-00001", "damaged"), ("a-00001", "timed out"), ("a-00000", "died")]
        accounts = plan.accounts(lost)
        assert (accounts.sampled, accounts.rejected) == (2, 1)
        assert (accounts.clips_planned, accounts.clips_written, accounts.clips_rejected) == (6, 3, 3)
        assert list(plan.rejects(lost)) == [
            {"source": "a.mp4", "reason": "died", "key": "a-00000", "start": 0.0, "end": 5.0},
            {"source": "a.mp4", "reason": "timed out", "key": "a-00001", "start": 5.0, "end": 10.0},
            {"source": "c.mp4", "reason": "damaged", "key": "c-00001", "start": 5.0, "end": 10.0},
        ]
        assert plan.accounts([]).clips_written == 6
        with pytest.raises(ShardError, match="no such clip"):
            plan.accounts([("d-00000", "died")])


def test_videos_come_back_whole_with_their_clips(tmp_path: Path) -> None:
    stamps = tuple(n / 25 + n % 2 / 100 for n in range(250))
    info = VideoInfo(250, 25.0, 10.0, 1080, 1920, "hevc", 90, (0, 48, 96), stamps, True, "yuv420p10le")
    plain = VideoInfo(100, 30000 / 1001, 3.3366666, 64, 48, "vp9")
    outcomes: Outcomes = {
        "a.mp4": probed(info=info, size=77, text="found beside it", scenes=(60,)),
        "b.mp4": probed(info=plain),
    }
    options = ShardOptions(cutting=Cutting(scene_threshold=0.3))
    inputs = [source("a.mp4", text_file="/videos/a.txt", size=-1), source("b.mp4")]
    with plan_of(tmp_path / "plan", inputs, options, outcomes) as plan:
        (first, one), (second, two), (third, three) = plan.clips_of("", 0)
    assert one == two == info
    assert three == plain
    expected = replace(inputs[0], text="found beside it", text_file=None, size=77)  # type: ignore[type-var]
    assert isinstance(expected, Source)
    assert first == Clip(expected, "a-00000", 0.0, round(stamps[60], 6), (0, 60))
    assert second == Clip(expected, "a-00001", round(stamps[60], 6), 10.0, (60, 250))
    assert third.frames is None


def test_splits_of_a_manifest_and_train_for_all_others(tmp_path: Path) -> None:
    inputs = [source("a.mp4", split="test"), source("b.mp4"), source("c.mp4", split="unseen")]
    with plan_of(tmp_path / "plan", inputs, ShardOptions(), {"c.mp4": "broken"}) as plan:
        assert plan.splits() == ["test", "train", "unseen"]
        assert [(shard.split, shard.num_clips) for shard in plan.shards()] == [("test", 1), ("train", 1)]
        assert keys(plan, "train") == [["b"]]


@pytest.mark.parametrize("options", [ShardOptions(val_share=0.1), ShardOptions(cutting=Cutting(1.0, val_tail=0.1))])
def test_named_splits_and_made_ones_exclude_each_other(tmp_path: Path, options: ShardOptions) -> None:
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs([source("a.mp4", split="test")])
        with pytest.raises(ConfigError, match=r"splits \(test\)"):
            plan.check_splits(options)
        plan.record(0, probed())
        with pytest.raises(ConfigError, match="use one of them"):
            plan.decide(options)
        assert plan.stage == "probing"


def test_held_out_videos_stay_so_when_others_come(tmp_path: Path) -> None:
    options = ShardOptions(val_share=0.3, samples_per_shard=1000)
    few = [source(f"{n}.mp4") for n in range(0, 200, 2)]
    parts = [source("17.mp4", start=float(n), end=n + 1.0, key=f"part{n}") for n in range(5)]
    with plan_of(tmp_path / "few", few, options) as plan:
        assert plan.splits() == ["train", "val"]
        before = {split: set(keys(plan, split)[0]) for split in ("train", "val")}
    with plan_of(tmp_path / "more", [source(f"{n}.mp4") for n in range(200)] + parts, options) as plan:
        after = {split: set(keys(plan, split)[0]) for split in ("train", "val")}
    assert before["train"] < after["train"]
    assert before["val"] < after["val"]
    assert {f"part{n}" for n in range(5)} <= after["train"] or {f"part{n}" for n in range(5)} <= after["val"]


def test_rows_of_one_video_go_the_same_way_however_they_name_it(tmp_path: Path) -> None:
    options = ShardOptions(val_share=0.5, samples_per_shard=1000)

    def rows(n: int) -> list[Source]:
        names = (f"many/{n}.mp4", f"./many/{n}.mp4", f"/videos/many/{n}.mp4", f"many/../many/{n}.mp4")
        row = source(f"many/{n}.mp4", size=n, version=str(n))
        spelled = [replace(row, source=name, start=float(k), end=k + 1.0) for k, name in enumerate(names)]
        paths = [f"/videos/{name}" if not name.startswith("/") else name for name in names]
        return [
            replace(each, path=path, version=str(k)) for k, (each, path) in enumerate(zip(spelled, paths, strict=True))
        ]

    def sides(name: str, inputs: list[Source]) -> dict[str, set[str]]:
        """Of every path, the splits that its rows are in."""
        found: dict[str, set[str]] = {}
        with plan_of(tmp_path / name, inputs, options) as plan:
            for split in ("train", "val"):
                for clip, _ in plan.clips_of(split, 0):
                    found.setdefault(os.path.normpath(clip.source.path), set()).add(split)
        return found

    first = sides("first", [rows(n)[0] for n in range(40)])
    every = sides("every", [rows(n)[0] for n in range(40)] + [row for n in range(50) for row in rows(n)])
    assert all(len(splits) == 1 for splits in every.values())
    assert {path: every[path] for path in first} == first
    assert set().union(*first.values()) == {"train", "val"}


def test_the_tail_of_a_video_is_held_out_of_all_its_rows(tmp_path: Path) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=1.0, val_tail=0.25, val_gap=0.5), samples_per_shard=1000)
    spans = [(None, None), (0.0, 6.0), (4.2, None), (6.3, 9.9), (None, 7.8)]
    rows = [source("a.mp4", key=f"r{n}", start=a, end=b) for n, (a, b) in enumerate(spans)]
    with plan_of(tmp_path / "rows", [*rows, source("b.mp4")], options) as plan:
        train, val = ([clip for clip, _ in plan.clips_of(split, 0)] for split in ("train", "val"))
    assert max(clip.end for clip in train if clip.source.source == "a.mp4") <= 7.0
    assert min(clip.start for clip in val if clip.source.source == "a.mp4") >= 7.5
    assert {clip.source.key for clip in val} >= {"r0", "r2", "r3"}
    assert {clip.start for clip in val if clip.source.source == "b.mp4"} == {8.0, 9.0}


def test_both_sides_of_a_split_exist_even_without_a_clip(tmp_path: Path) -> None:
    with plan_of(tmp_path / "plan", [source("a.mp4")], ShardOptions(val_share=1e-9)) as plan:
        assert plan.splits() == ["train", "val"]
        assert list(plan.shards("val")) == []
        assert plan.clips_of("val", 0) == []


def test_shards_end_at_their_samples_or_bytes(tmp_path: Path) -> None:
    outcomes: Outcomes = {f"{n}.mp4": probed(str(n), size=400 if n != 4 else 5000) for n in range(8)}
    options = ShardOptions(samples_per_shard=3, bytes_per_shard=1000)
    with plan_of(tmp_path / "plan", [source(f"{n}.mp4") for n in range(8)], options, outcomes) as plan:
        assert keys(plan) == [["0", "1"], ["2", "3"], ["4"], ["5", "6"], ["7"]]
        assert [(shard.number, shard.num_clips) for shard in plan.shards()] == [(0, 2), (1, 2), (2, 1), (3, 2), (4, 1)]


def test_a_digest_names_all_that_decides_a_shard(tmp_path: Path) -> None:
    options = ShardOptions(samples_per_shard=2)
    inputs = [source(f"{n}.mp4") for n in range(4)]

    def digests(name: str, settings: dict[str, Any], sources: list[Source], **fields: Any) -> list[str]:
        with PlanStore.create(tmp_path / name, settings) as plan:
            plan.add_inputs(sources)
            for number, each in plan.to_probe():
                plan.record(number, probed(each.source, **(fields if number == 3 else {})))
            plan.decide(options)
            return [shard.digest for shard in plan.shards()]

    first = digests("a", {}, inputs)
    assert first == digests("again", {}, inputs)
    assert len(set(first)) == 2
    assert first == digests("moved", {}, [replace(each, path=f"/elsewhere/{each.source}") for each in inputs])
    assert not set(first) & set(digests("other", {"encoder": "x265"}, inputs))
    changes: list[dict[str, Any]] = [{"text": "another"}, {"size": 7}, {"content": "7"}, {"num_frames": 7}]
    for number, change in enumerate(changes):
        changed = digests(f"probe{number}", {}, inputs, **change)
        assert changed[0] == first[0]
        assert changed[1] != first[1]
    for number, change in enumerate([{"user": {"x": 1}}, {"key": "k"}, {"start": 1.0}, {"source": "s"}]):
        changed = digests(f"listed{number}", {}, [*inputs[:3], replace(inputs[3], **change)])  # type: ignore[arg-type]
        assert changed[0] == first[0]
        assert changed[1] != first[1]


def test_the_order_in_which_outcomes_come_changes_nothing(tmp_path: Path) -> None:
    plan_job.make_plan(tmp_path / "in order")
    with PlanStore.create(tmp_path / "shuffled", plan_job.SETTINGS) as plan:
        plan.add_inputs(plan_job.items())
        numbers = [number for number, _ in plan.to_probe()]
        random.Random(1).shuffle(numbers)
        for number in numbers:
            plan.record(number, plan_job.outcome(number))
            plan.record(number, "an outcome that comes late")
        plan.decide(plan_job.OPTIONS)
    expected = contents(tmp_path / "in order")
    assert contents(tmp_path / "shuffled") == expected
    assert len({row[4] for row in expected["clips"]}) == len(expected["clips"]) > 5000


def test_stages_cannot_be_skipped_or_repeated(tmp_path: Path) -> None:
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        with pytest.raises(ShardError, match="stage 'listing'"):
            plan.decide(ShardOptions())
        plan.add_inputs([source("a.mp4")])
        with pytest.raises(ShardError, match="stage 'probing'"):
            plan.add_inputs([source("a.mp4")])
        with pytest.raises(ShardError, match="1 inputs of the plan are not probed"):
            plan.decide(ShardOptions())
        with pytest.raises(ShardError, match="needs the stage 'decided'"):
            list(plan.shards())
        plan.record(0, probed())
        plan.decide(ShardOptions())
        with pytest.raises(ShardError, match="stage 'decided'"):
            plan.decide(ShardOptions())


# --- the file ---------------------------------------------------------------------------------------------------


def test_a_killed_plan_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(plan_job.__file__), str(tmp_path)], check=True)
    assert any(p.name.endswith("-journal") for p in tmp_path.iterdir())
    plan_job.make_plan(tmp_path / "whole")
    for step in plan_job.STEPS:
        path = tmp_path / step
        with PlanStore.open(path) as plan:
            if step in ("listing", "listed"):
                assert (plan.stage, plan.num_inputs) == ("listing", 0)
            else:
                assert (plan.stage, plan.num_inputs) == ("probing", plan_job.NUM_INPUTS)
                assert plan.num_probed >= 1700 - 1000
                assert (plan.num_probed == plan.num_to_probe) == (step != "probing")
        plan_job.make_plan(path)
        assert contents(path) == contents(tmp_path / "whole"), step
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["whole", *plan_job.STEPS])


def killed_plan(folder: Path) -> Path:
    """A plan of which a transaction was half written, with the journal that undoes it."""
    plan_of(folder / "whole", [source("a.mp4")], ShardOptions()).__exit__(None, None, None)
    db = sqlite3.connect(folder / "whole", isolation_level=None)
    db.execute("PRAGMA cache_size = 1")
    db.execute("BEGIN")
    db.executemany("INSERT INTO dropped VALUES (?, 1)", ((f"rule {n}",) for n in range(5000)))
    path = folder / "plan"
    for suffix in ("", "-journal"):  # as a kill leaves them
        shutil.copy(f"{folder / 'whole'}{suffix}", f"{path}{suffix}")
    db.execute("ROLLBACK")
    db.close()
    assert path.read_bytes() != (folder / "whole").read_bytes()
    return path


def test_reading_a_plan_undoes_first_what_a_killed_process_had_half_written(tmp_path: Path) -> None:
    path = killed_plan(tmp_path)
    with PlanStore.open(path, readonly=True) as plan:
        assert plan.accounts([]).clips_dropped == {}
    assert contents(path) == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan", "whole"]


def test_a_half_written_plan_that_cannot_be_put_right_names_the_command_that_does() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        path = killed_plan(folder)
        said = folder / "said"
        said.touch()
        for each, mode in ((path, 0o444), (Path(f"{path}-journal"), 0o444), (said, 0o666), (folder, 0o555)):
            each.chmod(mode)
        child = os.fork()
        if child == 0:  # a process that must not write there, as on a file system mounted for reading only
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                PlanStore.open(path, readonly=True)
            except ShardError as err:
                said.write_text(str(err))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        folder.chmod(0o755)
        for words in (f"plan {path} was left half written", "`framestream shard INPUTS --output OUTPUT`"):
            assert words in said.read_text()
        path.chmod(0o644)
        with PlanStore.open(path) as plan:  # which needs no more than the right to write
            assert plan.accounts([]).clips_dropped == {}


def test_a_finished_plan_is_one_file_that_can_be_read_elsewhere(tmp_path: Path) -> None:
    inputs = [source("a.mp4"), source("b.mp4")]
    with plan_of(tmp_path / "plan", inputs, ShardOptions()) as plan:
        assert [p.name for p in tmp_path.iterdir()] == ["plan"]
        expected = (list(plan.shards()), plan.clips_of("", 0), plan.accounts([("a", "lost")]))
    away = tmp_path / "away #1 %20"
    away.mkdir()
    shutil.copy(tmp_path / "plan", away / "plan")
    before = (away / "plan").read_bytes()
    (away / "plan").chmod(0o444)
    away.chmod(0o555)
    try:
        with PlanStore.open(away / "plan", readonly=True) as plan:
            assert (list(plan.shards()), plan.clips_of("", 0), plan.accounts([("a", "lost")])) == expected
            assert plan.difference({"options": ShardOptions().to_json()}, iter(inputs)) == ""
            assert plan.difference(plan.settings, [source("a.mp4")]) == "input b.mp4 is gone"
        with pytest.raises(ShardError, match="readonly"), PlanStore.open(away / "plan", readonly=True) as plan:
            plan.record(0, "no")
    finally:
        away.chmod(0o755)
    assert (away / "plan").read_bytes() == before
    assert [p.name for p in away.iterdir()] == ["plan"]


def test_files_that_are_no_plan_of_this_version_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    with pytest.raises(ShardError, match="does not exist"):
        PlanStore.open(path)
    path.write_bytes(b"")
    with pytest.raises(ShardError, match="is no plan of framestream"):
        PlanStore.open(path)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ShardError, match="is damaged"):
        PlanStore.open(path, readonly=True)
    with pytest.raises(ShardError, match="exists already"):
        PlanStore.create(path, {})
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE inputs (x)")
    db.close()
    with pytest.raises(ShardError, match="is no plan of framestream"):
        PlanStore.open(path)
    path.unlink()
    PlanStore.create(path, {}).__exit__(None, None, None)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(ShardError, match="has version 2, this framestream reads version 5"):
        PlanStore.open(path)


@pytest.mark.parametrize("damage", ["short", "overwritten"])
def test_a_damaged_plan_is_said_to_be_one_and_gives_no_other_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "plan"
    plan_job.make_plan(path)
    whole = path.read_bytes()
    noise = random.Random(3)
    errors = []
    for _ in range(20):
        place = noise.randrange(200, len(whole) - 5000)
        behind = b"" if damage == "short" else noise.randbytes(5000) + whole[place + 5000 :]
        path.write_bytes(whole[:place] + behind)
        try:
            read_all(path)
        except ShardError as err:
            errors.append(str(err))
    assert len(errors) >= (20 if damage == "short" else 5)  # what is in a cell can be overwritten unnoticed
    assert all(str(path) in error for error in errors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DELETE FROM verdicts WHERE number = 1", "it has 2 inputs and verdicts on 1"),
        ("DELETE FROM clips WHERE input = 1", "its inputs have 6 clips, its shards 6, and 3 are there"),
        ("UPDATE shards SET num_clips = 2", "its inputs have 6 clips, its shards 2, and 6 are there"),
    ],
)
def test_a_plan_that_does_not_add_up_is_damaged(tmp_path: Path, change: str, words: str) -> None:
    options = ShardOptions(cutting=Cutting(clip_seconds=4.0))
    plan_of(tmp_path / "plan", [source("a.mp4"), source("b.mp4")], options).__exit__(None, None, None)
    with sqlite3.connect(tmp_path / "plan") as db:
        db.execute(change)
    db.close()
    with PlanStore.open(tmp_path / "plan", readonly=True) as plan, pytest.raises(ShardError) as caught:
        plan.accounts([])
    for part in (str(tmp_path / "plan"), "is damaged", words, "begin anew"):
        assert part in str(caught.value)


def read_all(path: Path) -> None:
    with PlanStore.open(path) as plan:
        for shard in plan.shards():
            plan.clips_of(shard.split, shard.number)
        plan.accounts([])
        list(plan.rejects([]))


def test_another_process_that_writes_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PlanStore.create(tmp_path / "plan", {}) as plan:
        plan.add_inputs([source("a.mp4")])
    other = sqlite3.connect(tmp_path / "plan", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("framestream.tools.plan_schema.LOCK_TIMEOUT_S", 0.1)
    with pytest.raises(ShardError, match="locked"):
        PlanStore.open(tmp_path / "plan")
    other.close()


# --- size -------------------------------------------------------------------------------------------------------

_MEMORY = """
import resource, sys
from pathlib import Path
from framestream.tools import bench_assign
from framestream.tools import plan_schema
from framestream.tools.probing import Probed  # loads what would else be counted as growth
plan_schema._CACHE_KIB = 1024
path = Path(sys.argv[1])
marks = []
for number, rows in enumerate((4_000, 100_000)):
    bench_assign._make(path / str(number), rows)
    bench_assign._decide(path / str(number), bench_assign.CASES["whole files"])
    marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(marks[1] - marks[0])
"""


@pytest.mark.slow
def test_memory_stays_flat_in_the_number_of_inputs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 25 << 10  # KiB: that is 270 bytes for an input, and one Source alone takes more


def test_the_benchmark_of_deciding_measures_what_it_says() -> None:
    figures = bench_assign.measure(600)
    assert list(figures) == list(bench_assign.CASES)
    for row in figures.values():
        assert row["clips"] > 300
        assert row["peak_mb"] > 10
        assert row["shards"] >= 2
