"""The code in README.md and docs/ runs as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from synthetic_shards import make_project

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"<!-- test: (?P<name>[\w-]+) -->\n```python\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = {(page.name, m["name"]): m["code"] for page in PAGES for m in MARKED.finditer(page.read_text())}
RESUMED = ("plain-pytorch", "plain-ddp")  # they go on where they were, and also after their end


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    """Where the folders lie that the pages assume."""
    return tmp_path_factory.mktemp("projects")


@pytest.mark.parametrize("block", BLOCKS, ids="-".join)
def test_code_on_the_pages_runs(block, projects):
    project = make_project(projects, BLOCKS[block])
    for _ in range(2 if block[1] in RESUMED else 1):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKS[block]], cwd=project, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_tested_and_every_link_leads_somewhere(page):
    text = page.read_text()
    assert len(re.findall(r"^```python", text, re.MULTILINE)) == len(MARKED.findall(text))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "uses.md", "loader.md", "frameworks.md"])
def test_pages_read_the_folder_that_the_first_page_makes(name):
    (page,) = [page for page in PAGES if page.name == name]
    code = "".join(re.findall(r"^```py(?:thon)?\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE))
    assert "--output shards/ " in PAGES[0].read_text()
    assert "--val-share" in PAGES[0].read_text()
    assert set(re.findall(r'"shards/([^"]*)"', code)) <= {"train", "train/*.tar"}
    assert "shards/train" in code


def test_commands_on_the_pages_exist():
    from framestream.tools.cli import COMMANDS

    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for command in re.findall(r"^(?:.* )?framestream (\w+)", block, re.MULTILINE):
                assert command in COMMANDS, command
            for target in re.findall(r"(?:^|\s)make ([\w-]+)", block):
                assert f"\n{target}:" in makefile, target
    assert shutil.which("framestream", path=str(Path(sys.executable).parent))
