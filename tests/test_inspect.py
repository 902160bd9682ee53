"""`framestream inspect`: what it reads of shards, how it groups rejects, and one sample in the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.model.reconstruction_config import ReconstructionConfig
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling
from framestream.pipeline.shards import ShardWriter
from framestream.tools.cli import build_parser
from framestream.tools.inspect_command import inspect
from framestream.tools.inspect_figures import histogram, number, spelled
from framestream.tools.inspect_rejects import MAX_GROUPS, OTHER, cause_of, group_rejects, read_account
from framestream.tools.inspect_run import LAYERS
from framestream.tools.inspect_sample import close_keys
from framestream.tools.inspect_splits import chosen_places, open_splits, spread
from framestream.tools.inspect_summary import Facts, read_facts
from framestream.tools.inspect_text import long_time, shown, size

from synthetic_shards import make_shards, small_video
from tars import tiny_meta, tiny_video, write_tar


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


def facts_of(folder: Path, **limits: int) -> list[Facts]:
    splits = open_splits([str(folder)])
    places = chosen_places(splits, **{"max_samples": 1000, "max_shards": 4, **limits})
    return [read_facts(s, p, FastSlowSampling(), lambda: None) for s, p in zip(splits, places, strict=True)]


# -- text ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(), st.integers(1, 50))
def test_shown_text_is_short_and_harmless(text: str, limit: int) -> None:
    said = shown(text, limit)
    assert len(said) <= limit
    assert said.isprintable() or all(c.isprintable() or ord(c) > 127 for c in said)
    said.encode("utf-8")
    assert not set(said) & set("\x00\x1b\n\r\t\x7f\x9b\u202a\u202e\u2066\u2069\u200f\u2028")


def test_shown_text_keeps_what_can_be_read() -> None:
    assert shown("Ein  Hund\nspringt – 狗跳 👩‍🔬 مرحبا") == "Ein Hund springt – 狗跳 👩‍🔬 مرحبا"
    assert shown("a\u202egnp.exe\x1b[2J\udc80") == "a\\u202egnp.exe\\x1b[2J\\udc80"
    assert shown("x" * 1_000_000, 20) == "x" * 19 + "…"


def test_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 999_600_000, 5e12)] == [
        "0 bytes", "999 bytes", "1 kB", "12.3 MB", "1 GB", "5 TB"
    ]  # fmt: skip
    said = [long_time(s) for s in (0.004, 1.5, 59, 600, 3600 * 5.25, 86400 * 30)]
    assert said == ["4 ms", "1.5 s", "59 s", "10 min", "5.2 h", "30 days"]


# -- which samples ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 10_000))
def test_spread_is_even(count: int, of: int) -> None:
    chosen = spread(count, of)
    assert len(chosen) == min(count, of)
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < of
    steps = np.diff(chosen)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


def test_splits_of_a_folder(tmp_path: Path) -> None:
    make_shards(tmp_path / "s" / "train", num_samples=9, samples_per_shard=2)
    make_shards(tmp_path / "s" / "val", num_samples=1)
    splits = open_splits([str(tmp_path / "s")])
    assert [(split.name, len(split.shards)) for split in splits] == [("train", 9), ("val", 1)]
    assert splits[1].num_bytes == (tmp_path / "s" / "val" / "clips-000000.tar").stat().st_size
    places = chosen_places(splits, max_samples=4, max_shards=1)  # max_shards is for remote ones
    assert [len(chosen) for chosen in places] == [3, 1]
    assert len({shard for shard, _ in places[0]}) == 3
    several = open_splits([str(tmp_path / "s" / "train" / f"clips-00000{k}.tar") for k in (0, 3)])
    assert [(split.name, len(split.shards)) for split in several] == [("", 4)]
    with pytest.raises(ConfigError, match="max_samples and max_shards have to be at least 1, got 0"):
        chosen_places(splits, 0, 1)


# -- metadata --------------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_metadata(tmp_path: Path) -> None:
    long, long_info = small_video(0, 48, (96, 64), ".mp4")  # a key frame every 6 frames, 24 a second
    short, short_info = small_video(1, 6, (64, 96), ".mp4")
    varying = {**long_info, "timestamps": [k / 20 for k in range(48)], "has_audio": True, "rotation": 90}
    with ShardWriter(tmp_path / "s", samples_per_shard=3) as writer:
        writer.write("a", long, "mp4", long_info, "four")
        writer.write("b", short, "mp4", short_info)
        writer.write("c", long, "mp4", varying, "sevenly")
        writer.write("d", long, "mp4", {"fps": -1}, "x")
    [facts] = facts_of(tmp_path / "s")
    assert (facts.samples, facts.read, facts.shards, facts.described) == (4, 4, 2, 3)
    assert facts.whole
    assert list(facts.numbers["duration"]) == [2.0, 0.25, 2.0]
    assert list(facts.numbers["gop"]) == [6.0, 6.0, 6.0]
    assert list(facts.numbers["characters"]) == [4, 7, 1]
    assert facts.kinds["size"] == {"96 × 64": 2, "64 × 96": 1}
    assert facts.kinds["fps"] == {"24": 2, "variable": 1}
    assert facts.kinds["orientation"] == {"wide": 2, "upright": 1}
    marks = {mark: count for mark, count in facts.marks.items() if count}
    assert marks == {"no_text": 1, "short": 1, "undescribed": 1, "variable": 1, "sound": 1, "rotated": 1}
    [some] = facts_of(tmp_path / "s", max_samples=2)
    assert (some.read, some.whole) == (2, False)
    assert some.seconds == pytest.approx(4 * np.mean([some.numbers["duration"]]))


def test_shards_of_others_and_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    video = tiny_video(0)
    members = [("a.mp4", video), ("b.mp4", video), ("b.json", b"{"), ("c.mp4", video), ("c.json", b"[1]")]
    write_tar(tmp_path / "s" / "a.tar", [*members, ("d.txt", b"lonely")])
    write_tar(tmp_path / "s" / "b.tar", [("e.mp4", video), ("e.json", json.dumps(tiny_meta(0)).encode())])
    open_splits([str(tmp_path / "s")])  # indexes them
    data = (tmp_path / "s" / "b.tar").read_bytes()
    splits = open_splits([str(tmp_path / "s")])
    (tmp_path / "s" / "b.tar").write_bytes(data[:600])  # cut after it was listed
    [places] = chosen_places(splits, 100, 4)
    facts = read_facts(splits[0], places, DenseSampling(4), lambda: None)
    assert facts.marks["no_json"] == 1
    assert facts.marks["damaged_json"] == 2
    assert facts.marks["unreadable"] == 1
    assert facts.read == 4
    assert facts.num_problems >= 2
    assert any("'d' has no video" in problem for problem in facts.problems)
    assert any("b.tar" in problem for problem in facts.problems)


def test_impossible_lengths_cost_nothing(tmp_path: Path) -> None:
    """Metadata of somebody else: a plan over all these frames would need gigabytes."""
    video, info = small_video(0, 6, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("a", video, "mp4", {**info, "num_frames": 10**10, "fps": 20_000.0, "duration": 5e5})
    splits = open_splits([str(tmp_path / "s")])
    facts = read_facts(splits[0], [(0, 0)], FastSlowSampling(fps=8.0), lambda: None)
    assert facts.described == 1


# -- distributions ---------------------------------------------------------------------------------------------------


def test_distributions_in_words() -> None:
    assert spelled(np.array([2.0, 2.0]), "seconds") == "all 2 seconds"
    assert spelled(np.arange(1.0, 102.0), "frames") == "from 1 to 101 frames, median 51, half of them from 26 to 76"
    assert [number(n) for n in (0, 0.5, 1.333, 12.34, 99.96, 12_345.6)] == ["0", "0.5", "1.33", "12.3", "100", "12,346"]


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.lists(st.floats(0, 1e6), max_size=5))
def test_any_distribution_is_drawn(first: list[float], second: list[float]) -> None:
    series = [("a", np.array(first))] + ([("b", np.array(second))] if second else [])
    drawn = histogram("x", "Duration", "seconds", series)
    assert drawn.startswith("<svg viewBox=")
    assert "nan" not in drawn.lower()


# -- rejects ---------------------------------------------------------------------------------------------------------


def test_equal_causes_are_one_group() -> None:
    names = [f"dir/v{k}.mp4" for k in range(7)]
    reasons = [f"{name}: frame {k} of 9,000 is 0.{k} s late" for k, name in enumerate(names)]
    lines = [json.dumps({"source": s, "reason": r, "key": None}) for s, r in zip(names, reasons, strict=True)]
    lines += [json.dumps({"source": "x", "reason": "took longer than 600 s"}), "", "{", "[]", '{"source": "y"}']
    groups, damaged = group_rejects(lines)
    assert [(group.reason, group.count) for group in groups] == [
        ("…: frame N of N is N s late", 7), ("took longer than N s", 1)
    ]  # fmt: skip
    assert [source for source, _ in groups[0].examples] == ["dir/v0.mp4", "dir/v1.mp4", "dir/v2.mp4"]
    assert damaged == 3
    assert cause_of("sha256 is 0123456789abcdef, not fedcba98765432100") == "shaN is N, not N"


def test_a_million_causes_take_little_memory() -> None:
    names = ("".join(chr(97 + k // 26**p % 26) for p in range(4)) for k in range(3 * MAX_GROUPS))
    groups, _ = group_rejects(json.dumps({"source": "s", "reason": f"cause {name}"}) for name in names)
    assert len(groups) == MAX_GROUPS + 1
    assert groups[0].reason == OTHER
    assert sum(group.count for group in groups) == 3 * MAX_GROUPS


@pytest.mark.parametrize(
    ("report", "inputs", "rules"),
    [
        (
            {"inputs": {"found": 9, "sampled": 4, "duplicate": 1}, "filtered": {"min_side": 4}},
            [("found", 9), ("sampled", 4), ("duplicate", 1)],
            [("min side", 4)],
        ),
        (
            {"inputs": {"found": 9, "used": 8, "dropped": {"named twice": 1}}, "clips": {"dropped": {"too short": 2}}},
            [("found", 9), ("used", 8)],
            [("named twice", 1), ("clips: too short", 2)],
        ),
        ({"inputs": [1], "filtered": "x", "clips": None}, [], []),
    ],
)
def test_report_of_any_form(tmp_path: Path, report: object, inputs: object, rules: object) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report))
    account = read_account(tmp_path)
    assert (account.inputs, account.rules) == (inputs, rules)
    assert account.missing == {"rejects.jsonl": "is not there"}


def test_damaged_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[]")
    (tmp_path / "rejects.jsonl").write_bytes(b"\xff\xfe\n")
    account = read_account(tmp_path)
    assert account.missing == {"report.json": "is damaged (it holds no object)"}
    assert account.damaged_lines == 1


# -- one sample ------------------------------------------------------------------------------------------------------


def test_a_sound_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, info = small_video(1, 40, (96, 64), ".mp4")  # a key frame every 12 frames
    with ShardWriter(tmp_path / "s" / "val") as writer:
        writer.write("good", video, "mp4", {**info, "user": {"x": "\x1b[31m"}}, "one\u202etwo", {"npy": b"12345"})
    assert inspect([str(tmp_path / "s"), "good"], num_fast=2, num_slow=2, image_size=32) == 0
    said = capsys.readouterr().out
    assert re.search(rf"mp4\s+{len(video):,} ", said)
    assert re.search(r"npy\s+5 ", said)
    assert re.search(r"key_frames\s+frames \(4\): 0, 12, 24, 36", said)
    assert "listed, and used for decoding" in said
    assert "Text: one\\u202etwo" in said
    rows = re.findall(r"^ +(\d+) +(slow|fast) +(\d+) +([\d.]+) *(.*?) *$", said, re.MULTILINE)
    assert [row[1:3] for row in rows] == [("slow", "0"), ("slow", "20"), ("fast", "38"), ("fast", "39")]
    assert rows[0][4] == "key frame"
    assert "It decodes, in" in said
    assert "has the SHA-256" in said
    assert "\x1b" not in said


def test_broken_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, info = small_video(0, 12, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("noise", b"this is no video" * 9, "mp4", info)
    assert inspect([str(tmp_path / "s"), "noise"]) == 1
    assert "It is broken: " in capsys.readouterr().out
    tar = tmp_path / "t.tar"
    write_tar(tar, [("a.mp4", video), ("a.json", b"{"), ("b.json", b"{}"), ("c.mp4", video), ("c.json", b"{}")])
    assert inspect([str(tar), "a"], image_size=32) == 1
    assert "the .json of sample 'a'" in capsys.readouterr().out
    assert inspect([str(tar), "b"]) == 1  # left out of the set
    assert "b is broken: t.tar: sample 'b' has no video" in capsys.readouterr().out
    assert inspect([str(tar), "c"], image_size=32) == 0  # metadata of somebody else is no fault


def test_a_changed_video_is_broken_though_it_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, info = small_video(0, 12, (96, 64), ".mp4")
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("a", video, "mp4", {**{k: v for k, v in info.items() if k != "packets"}, "sha256": "0" * 64})
    assert inspect([str(tmp_path / "s"), "a"], image_size=32) == 1
    said = capsys.readouterr().out
    assert said.count("It is broken") == 1
    assert "its bytes have changed" in said


def test_unknown_keys_and_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "s", num_samples=6, samples_per_shard=2)
    assert inspect([str(tmp_path / "s"), "clip-003"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "no sample with the key clip-003 among 6" in said
    assert "clip-0003" in said
    assert inspect([str(tmp_path / "s"), "zzz"]) == 2
    assert "none is like it" in capsys.readouterr().out
    assert inspect([str(tmp_path / "nowhere"), "a"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_close_keys_are_found_wherever_they_differ() -> None:
    keys = [f"holiday-{k:06d}" for k in range(50_000)]
    assert close_keys("holiday-0312x5", iter(keys))[0] in {f"holiday-0312{k}5" for k in range(10)}
    assert "holiday-000017" in close_keys("oliday-000017", iter(keys))
    assert close_keys("qqqq", iter(keys)) == []


# -- the command -----------------------------------------------------------------------------------------------------


def test_impossible_requests(tmp_path: Path) -> None:
    shards = str(make_shards(tmp_path / "s", num_samples=1))
    for target, options, match in (
        ([shards], {}, "1 word was given: name shards and the key of one sample, or shards and --output"),
        ([shards, "a", "b"], {}, "3 words were given"),
        ([shards], {"output": str(tmp_path / "s" / "clips-000000.tar")}, "has to end in .html"),
        ([shards], {"output": str(tmp_path / "no" / "page.html")}, "there is no folder"),
        ([shards], {"output": str(tmp_path / "p.html"), "mask": "causal"}, "mask 'causal' is unknown"),
        ([shards], {"output": str(tmp_path / "p.html"), "num_fast": 0}, "num_fast must be a whole number"),
        ([shards], {"output": str(tmp_path / "p.html"), "sheets": 0}, "sheets is 0"),
        ([shards], {"output": str(tmp_path / "p.html"), "sheets": 500}, "at most 50"),
        ([shards], {"output": str(tmp_path / "p.html"), "workers": -1}, "workers and seconds"),
        ([shards], {"output": str(tmp_path / "p.html"), "image_size": 0}, "image_size is 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            inspect(target, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "p.html").exists()


def test_every_option_is_explained() -> None:
    parser = build_parser("inspect", inspect, ("target", "+"))
    parsed = parser.parse_args(["a", "b", "--output", "p.html", "--num-slow", "4", "--fps", "8", "--sampling", "dense"])
    assert (parsed.target, parsed.num_slow, parsed.fps, parsed.sampling) == (["a", "b"], 4, 8.0, "dense")
    assert all(action.help for action in parser._actions)


def test_layers_are_those_of_the_models_default() -> None:
    assert ReconstructionConfig().num_layers == LAYERS
