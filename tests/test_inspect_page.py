"""The page of `framestream inspect`: whole, true, safe against what is in the data, and usable by everybody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from framestream.pipeline.shards import ShardWriter
from framestream.tools.inspect_command import inspect
from framestream.tools.set_files import REJECTS_FILE, REPORT_FILE

from devtools import Browser, browser
from page_checks import Page, page_text
from remote_storage import http_storage, s3_server, s3_storage
from synthetic_shards import make_shards, small_video
from tars import tiny_meta, tiny_video, write_tar

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202egnp.exe\0 "
SECTIONS = [
    "What is in it",
    "Distributions",
    "What the model sees",
    "The mask",
    "Time of an epoch",
    "What became of the inputs",
    "How this was made",
]
QUICK: dict[str, Any] = {"image_size": 48, "seconds": 0.0, "workers": 1, "num_fast": 4, "num_slow": 3, "patches": 4}


def made(target: Path | str, output: Path, **options: Any) -> str:
    assert inspect([str(target)], output=str(output), **{**QUICK, **options}) == 0
    return output.read_text(encoding="utf-8")


def check(text: str) -> Page:
    """The page is whole and self-contained, and its structure says what its looks say."""
    page = Page(text)
    assert not page.unbalanced
    assert not page.open
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.tags:  # nothing is loaded, nothing runs
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert values.get(name, "data:").startswith(("data:", "#")), (tag, values[name][:80])
        assert not [name for name in values if name.startswith("on")]
        for name in ("aria-labelledby", "href"):
            if values.get(name, "").removeprefix("#") and not values[name].startswith("data:"):
                assert values[name].removeprefix("#") in ids or tag in ("image", "use"), values[name]
    assert not re.search(r"url\((?!#)|@import", text)
    assert [said for level, said in page.headings if level == "h2"] == SECTIONS
    levels = [int(level[1]) for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("table") == kinds.count("caption")
    assert all("scope" in values for tag, values in page.tags if tag == "th")
    assert all(kinds.count(landmark) == 1 for landmark in ("header", "main", "nav", "footer"))
    assert all(values.get("alt") for tag, values in page.tags if tag == "img")
    for values in (values for tag, values in page.tags if tag == "svg"):
        assert values.get("aria-hidden") or (values["role"] == "img" and len(values["aria-label"]) > 20)
    assert dict(page.tags)["html"]["lang"] == "en"
    return page


def row(text: str, said: str) -> list[str]:
    """The cells of the table row whose heading is `said`."""
    found = re.search(rf"<tr[^>]*><th scope=\"row\">{re.escape(said)}</th>(.*?)</tr>", text)
    assert found, said
    return re.findall(r"<td>(.*?)</td>", found[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val, with a clip that is no video, one that is too short, one without text, one with a hostile one."""
    root = tmp_path_factory.mktemp("set")
    video, info = small_video(0, 32, (96, 64), ".mp4")
    short, short_info = small_video(1, 3, (64, 96), ".mp4")
    with ShardWriter(root / "train", samples_per_shard=4) as writer:
        writer.write("hostile", video, "mp4", {**info, "codec": HOSTILE}, HOSTILE + "A" * 1_000_000)
        writer.write("good", video, "mp4", info, "a dog")
        writer.write("short", short, "mp4", short_info, "a cat")
        writer.write("broken", b"this is no video" * 64, "mp4", info, "nothing")
        writer.write("silent", video, "mp4", info)
        writer.write("empty", video, "mp4", {"num_frames": "many"}, "a bird")
    make_shards(root / "val", num_samples=2, samples_per_shard=2)
    report = {
        "inputs": {"found": 20, "sampled": 8, "rejected": 7, "filtered": 4, "duplicate": 1, HOSTILE: 3},
        "filtered": {"min_seconds": 4},
    }
    (root / REPORT_FILE).write_text(json.dumps(report))
    rejects = [{"source": f"a/{k}.mp4", "reason": f"a/{k}.mp4: frame {k * 3} of 90 does not decode"} for k in range(5)]
    rejects += [{"source": HOSTILE, "reason": HOSTILE}]
    lines = [json.dumps(reject) for reject in rejects]
    (root / REJECTS_FILE).write_text("\n".join([*lines, "no JSON", "[1]", ""]))
    return root


@pytest.fixture(scope="module")
def page_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    made(folder, path, sheets=8)
    return path


def test_page_is_whole_and_says_what_is_there(page_path: Path) -> None:
    text = page_path.read_text()
    page = check(text)
    assert "<title>8 clips, " in text
    assert row(text, "Samples") == ["6", "2"]
    assert row(text, "Shards") == ["2", "1"]
    assert row(text, "Samples without a text") == ["1", "0"]
    assert row(text, "Samples whose metadata does not describe the video") == ["1", "0"]
    assert row(text, "Samples too short for the sampling") == ["1", "0"]
    said = page_text(page)
    assert "1 of 8 clips that were decoded for this page cannot be used" in said
    assert "It cannot be used." in said
    assert "No text." in said
    for key in ("good", "short", "broken", "silent", "empty", "clip-0000"):
        assert key in [heading for level, heading in page.headings if level == "h3"] or f"<bdi>{key}</bdi>" in text


def test_frames_of_a_clip_are_those_of_the_sampling(page_path: Path) -> None:
    """7 frames of 32 at 24 a second: slow ones over all of it, fast ones at its end."""
    text = page_path.read_text()
    article = text[text.index("<bdi>good</bdi></h3>") :].partition("</article>")[0]
    frames = re.findall(r"<th scope=\"row\">(\d+)</th><td>(\w+)</td><td>(\d+)</td><td>([\d.]+)</td><td>(\w+)", article)
    assert [(stream, int(frame)) for _, stream, frame, _, _ in frames] == [
        ("slow", 0), ("slow", 10), ("slow", 21), ("fast", 28), ("fast", 29), ("fast", 30), ("fast", 31)
    ]  # fmt: skip
    assert [seconds for *_, seconds, _ in frames][:2] == ["0.000", "0.417"]
    assert frames[0][-1] == "yes"  # a key frame
    assert article.count("data:image/webp;base64,") == 7
    assert article.count('class="key"') == 6  # one every 6 frames
    assert "3 slow frames from 0.00 to 0.88 s; 4 fast frames from 1.17 to 1.29 s" in article


def test_rejects_are_grouped_by_cause(page_path: Path) -> None:
    said = page_text(Page(page_path.read_text()))
    assert "6 rejects for 2 reasons" in said
    assert "…: frame N of N does not decode" in said
    assert "2 lines of rejects.jsonl cannot be read" in said
    for words in ("found 20", "sampled 8", "duplicate 1", "min seconds 4"):
        assert words in said


def test_hostile_texts_stay_text(page_path: Path) -> None:
    data = page_path.read_bytes()
    assert b"<script" not in data
    assert b"\x1b" not in data
    assert b"\0" not in data
    assert "\u202e".encode() not in data
    assert "<script>alert(1)</script>" in page_text(Page(data.decode()))
    assert "A" * 1000 not in data.decode()
    assert len(data) < 500_000


def test_mask_and_its_leaks(folder: Path, page_path: Path, tmp_path: Path) -> None:
    assert "No frame can see what it has to predict" in page_path.read_text()
    text = made(folder / "val", tmp_path / "page.html", mask="fast_slow", sheets=1)
    said = page_text(check(text))
    assert "2 of 5 frames can see what they have to predict" in said
    assert "The mask fast_slow lets 2 frames see what they predict." in said
    assert "is not there: the shards were not written by framestream shard" in said


def test_the_page_names_the_split_that_was_timed(tmp_path: Path) -> None:
    make_shards(tmp_path / "s" / "small", num_samples=1)
    make_shards(tmp_path / "s" / "large", num_samples=3)
    text = page_text(check(made(tmp_path / "s", tmp_path / "page.html", sheets=1)))
    assert "for the 4 clips of the 2 splits, of which only the split large was timed" in text


def test_nothing_but_broken_clips(tmp_path: Path) -> None:
    """Foreign shards without metadata, of which no clip decodes: the page is made, and says so."""
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s" / "a.tar", [(f"k{n}.mp4", b"no video") for n in range(3)])
    said = page_text(check(made(tmp_path / "s", tmp_path / "page.html")))
    assert "3 clips" in said
    assert "None of the 3 clips that were decoded for this page can be used." in said
    assert "No clip could be made, so nothing was measured." in said
    assert "there is nothing to draw" in said


def test_remote_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of a web server; of many shards only some are fetched, and the page says so."""
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))
    make_shards(tmp_path / "s" / "train", num_samples=12, samples_per_shard=2)
    with http_storage(tmp_path / "s") as storage:
        text = made(storage.url, tmp_path / "page.html", max_shards=2, sheets=2)
        fetched = {request.path for request in storage.proxy.requests if request.path.endswith(".tar")}
    check(text)
    assert row(text, "Samples") == ["12"]
    assert row(text, "Samples looked at") == ["4"]
    assert len(fetched) == 2
    assert "evenly spread over 2 shards" in text


@pytest.mark.slow
def test_shards_in_a_bucket_are_reached_with_storage_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))
    make_shards(tmp_path / "s", num_samples=2, samples_per_shard=2)
    with s3_server() as server, s3_storage(tmp_path / "s", server, "clips") as storage:
        text = made(storage.url, tmp_path / "page.html", sheets=1, storage_options=storage.options)
    assert row(text, "Samples") == ["2"]
    assert "the loader itself" in page_text(check(text))


@pytest.mark.slow
def test_ten_thousand_samples_make_a_small_page(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", samples_per_shard=500) as writer:
        for number in range(10_000):
            writer.write(f"clip-{number:05d}", tiny_video(number % 3), "mp4", tiny_meta(number % 3), f"number {number}")
    text = made(tmp_path / "s", tmp_path / "page.html")
    assert row(text, "Samples looked at") == ["10,000"]
    assert len(text) < 1_000_000
    text = made(tmp_path / "s", tmp_path / "page.html", max_samples=100)
    check(text)
    assert row(text, "Samples looked at") == ["100"]
    assert "From the metadata of 100 of 10,000 samples, evenly spread" in text


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 820, 1280])
def test_nothing_is_wider_than_the_window(page_path: Path, chromium: Browser, width: int) -> None:
    chromium.open(page_path, width)
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    assert not chromium.errors
    assert chromium.ask("document.title").endswith("framestream inspect")
    assert chromium.ask("[...document.images].every(image => image.alt)")


@pytest.mark.browser
def test_tab_reaches_everything_in_order(page_path: Path, chromium: Browser) -> None:
    """Links, details and every region that scrolls, each with a visible focus; the first leads past the header."""
    chromium.open(page_path, 400)
    chromium.ask("window.all = [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')]; 0")
    # What is inside of closed details cannot be seen, and is passed over.
    closed = "e.closest('details:not([open])') && e.tagName != 'SUMMARY'"
    wanted = chromium.ask(f"all.flatMap((e, number) => {closed} ? [] : [number])")
    reached = []
    for _ in wanted:
        chromium.press("Tab", 9)
        reached.append(chromium.ask("all.indexOf(document.activeElement)"))
        assert chromium.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == wanted
    assert len(wanted) > 30
    chromium.ask("all[0].focus()")
    chromium.press("Enter", 13)
    assert chromium.ask("document.querySelector('summary').parentElement.open") is False
    chromium.ask("document.querySelector('summary').focus()")
    chromium.press(" ", 32)
    assert chromium.ask("document.querySelector('summary').parentElement.open") is True


CONTRAST = """(() => {
  const parse = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), ink = parse(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([e.tagName, e.className.baseVal || e.className, e.textContent.slice(0, 40), ratio]);
  }
  return low.slice(0, 10);
})()"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(page_path: Path, chromium: Browser, scheme: str) -> None:
    chromium.open(page_path, 1280, scheme=scheme)
    assert chromium.ask("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert chromium.ask(CONTRAST) == []
