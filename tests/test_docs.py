"""The pages in docs/: their navigation, links, pictures, reference, commands, and code that is marked `<!-- run -->`.

Blocks that are marked `<!-- test: name -->` are run by test_readme.py, each in a process of its own; those here share
this process, which is quicker, or are steps of the tutorial, which need each other.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from framestream.tools import config as configs
from framestream.tools.cli import COMMANDS, build_parser
from framestream.tools.draw_docs import draw_docs
from framestream.tools.train import train

from synthetic import video_bytes
from synthetic_shards import make_project
from train_setup import write_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
SITE_TOOL = Path(os.environ.get("MKDOCS") or shutil.which("mkdocs", path=str(Path(sys.executable).parent)) or "")


class Block(NamedTuple):
    """A marked block: `kind` is run or file, `name` what stands behind it."""

    kind: str
    name: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    marked = re.compile(r"<!-- (run|file): ([^>]+) -->\n```(\w+)\n(.*?)```", re.DOTALL)
    return [Block(*found.groups()) for found in marked.finditer(page.read_text())]


def commands(page: Path) -> Iterator[list[str]]:
    """Every `framestream` command of a page's shell blocks, as words without the first."""
    for text in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for k, word in enumerate(words):
                if word in ("framestream", "framestream.tools.cli") and k + 1 < len(words):
                    yield words[k + 1 :]
                    break


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, on GitHub as on the site."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(part)


def named_in_reference() -> list[str]:
    return re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)


def test_the_navigation_holds_every_page_once() -> None:
    assert Counter(leaves(SITE["nav"])) == Counter(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_their_anchors_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith("http"):
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_anchors_are_found_as_they_are_written() -> None:
    assert "from-the-api-of-lmms_enginemodels" in anchors(DOCS / "migration.md")
    assert "nowhere" not in anchors(DOCS / "migration.md")


def tiles(path: Path, side: int = 8) -> np.ndarray:
    """Mean colours of a picture's squares: letters that are set a little differently change them little."""
    picture = np.asarray(Image.open(path).convert("RGB"), np.float64)
    rows, columns = (length // side for length in picture.shape[:2])
    return picture[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).mean((1, 3))


def test_pictures_are_what_the_package_draws_now(tmp_path: Path) -> None:
    for name, drawn in draw_docs(tmp_path).items():
        kept = DOCS / "images" / f"{name}.png"
        assert Image.open(drawn).size == Image.open(kept).size, name
        furthest = np.abs(tiles(drawn) - tiles(kept)).max()
        assert furthest < 120, f"{name} is {furthest:.0f} off: run python -m framestream.tools.draw_docs docs/images"


def test_every_picture_is_shown_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for picture in (DOCS / "images").glob("*.png"):
        assert f"images/{picture.name})" in text, picture.name


def test_the_reference_holds_every_public_name() -> None:
    named = named_in_reference()
    assert max(Counter(named).values()) == 1
    for package in ("framestream.pipeline", "framestream.model"):
        missing = {f"{package}.{name}" for name in import_module(package).__all__} - set(named)
        assert not missing
    for name in named:
        home, _, last = name.rpartition(".")
        assert inspect.getdoc(getattr(import_module(home), last)), name


def test_the_reference_holds_every_command() -> None:
    text = (DOCS / "reference.md").read_text()
    assert re.findall(r"^\| `framestream (\w+)` \| (.*?) \|", text, re.MULTILINE) == [
        (name, command.summary) for name, command in COMMANDS.items()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_have_options_that_exist(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.kind == "file":
            Path(block.name).write_text(block.code)
    for name, *words in commands(page):
        command = COMMANDS[name]
        if name == "train":
            assert configs.load_config(words[0], words[1:]).data.shards
        elif not command.parses_itself:
            function = getattr(import_module(f"framestream.tools.{command.module}"), command.function)
            build_parser(name, function, command.positional).parse_args(words)  # exits where it does not understand


def test_no_block_of_python_is_left_out() -> None:
    for page in PAGES:
        text = page.read_text()
        run = sum(block.language == "py" for block in blocks(page))
        elsewhere = len(re.findall(r"<!-- lightning -->\n```py\n", text))  # test_frameworks.py
        assert len(re.findall(r"^```py\n", text, re.MULTILINE)) == run + elsewhere, page.name


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the folders lie that the pages assume."""
    return tmp_path_factory.mktemp("projects")


SHARED = [(page, block) for page in PAGES if page.name != "tutorial.md" for block in blocks(page)]


@pytest.mark.parametrize(("page", "block"), SHARED, ids=[f"{page.name}-{block.name}" for page, block in SHARED])
def test_code_on_the_pages_runs(page: Path, block: Block, projects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_project(projects, block.code)
    monkeypatch.chdir(folder)
    if "runs/first" in block.code:  # what the tutorial has trained
        config = write_config(folder / "first.yaml", folder / "shards", folder / "runs" / "first", steps=1)
        assert train(configs.load_config(config)) == 0
    assert (block.kind, block.language) == ("run", "py")
    exec(compile(block.code, f"{page.name}: {block.name}", "exec"), {"__name__": "__main__"})


TUTORIAL = blocks(DOCS / "tutorial.md")
MADE = {  # what must be there after each step
    "dry run": [],
    "shard": ["shards/train/index.json", "shards/val/index.json", "shards/report.json", "shards.html"],
    "batch": ["mask.png"],
    "first.yaml": ["first.yaml"],
    "try": ["runs/try/evaluation.json", "runs/try/metrics.jsonl"],
    "generate": ["next-3.png", "my_model/model.safetensors"],
    "open": [],
}


class Walk:
    """A folder with videos in which the tutorial is followed, each step once, however many tests ask for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, 0
        (folder / "my_videos").mkdir()
        for number, gop in enumerate((12, 50)):
            video = video_bytes(".mp4", num_frames=180, size=(160, 120), gop=gop)
            (folder / "my_videos" / f"film-{number}.mp4").write_bytes(video)

    def to(self, last: int) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
        for step in TUTORIAL[self.done : last + 1]:
            if step.kind == "file":
                (self.folder / step.name).write_text(step.code)
            else:
                words = ["bash", "-e", "-c"] if step.language == "bash" else [sys.executable, "-c"]
                options: dict[str, Any] = {"cwd": self.folder, "env": environment, "text": True}
                done = subprocess.run([*words, step.code], capture_output=True, **options)
                assert done.returncode == 0, f"{step.name}: {done.stdout}{done.stderr}"
            self.done += 1


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(tmp_path_factory.mktemp("tutorial"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(TUTORIAL)), ids=[step.name for step in TUTORIAL])
def test_the_tutorial_leads_from_videos_to_a_model(number: int, walk: Walk) -> None:
    walk.to(number)
    if walk.done == 1:  # nothing but the dry run
        assert not (walk.folder / "shards").exists()
    for made in MADE[TUTORIAL[number].name]:
        assert (walk.folder / made).stat().st_size > 100, made


@pytest.mark.slow
@pytest.mark.skipif(not SITE_TOOL.is_file(), reason="needs mkdocs beside this Python, or its path in MKDOCS")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    installed = tmp_path / "build" / "types" / "framestream"
    installed.mkdir(parents=True)
    for package in ("pipeline", "model", "tools"):
        (installed / package).symlink_to(ROOT / package)
    (tmp_path / "docs").symlink_to(DOCS)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run([SITE_TOOL, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "build" / "site" / "reference" / "index.html").read_text()
    for name in named_in_reference():
        assert f'id="{name}"' in reference, name
