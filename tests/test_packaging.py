"""The package as others get it: a wheel in their environment, beside their own `model`, `pipeline` and `tools`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from synthetic_shards import make_shards

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The wheel of this tree, unpacked as an installation would, in front of everything else on the path."""
    work = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(work), str(ROOT)], check=True, timeout=240)
    (wheel,) = work.glob("framestream-*.whl")
    site = work / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_from(folder: Path, site: Path, code: str) -> str:
    """Run code as a user would from `folder`, whose own packages win over everything installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(site)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"framestream"}
    held = installed / "framestream"
    assert {p.name for p in held.iterdir()} == {"pipeline", "model", "tools", "configs"}
    for package in ("pipeline", "model", "tools"):
        assert (held / package / "py.typed").exists()
    assert (held / "tools" / "templates" / "report.html.j2").exists()
    assert (held / "configs" / "demo.yaml").exists()


def test_a_host_project_keeps_its_own_packages(installed, tmp_path):
    for name in ("model", "pipeline", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'host {name}'\n")
    shards = make_shards(tmp_path / "shards", num_samples=4, samples_per_shard=2)
    code = f"""
import model, pipeline, tools
assert [m.OWNER for m in (model, pipeline, tools)] == ["host model", "host pipeline", "host tools"]

import framestream.pipeline, framestream.model, framestream.tools.cli
assert framestream.pipeline.__file__.startswith({str(installed)!r}), framestream.pipeline.__file__

import glob
import webdataset as wds
from torch.utils.data import DataLoader
from framestream.pipeline import ClipCollator, ClipDataset, ClipTransform, FastSlowSampling, build_loader

sampling = FastSlowSampling(num_fast=2, num_slow=2)
collate = ClipCollator(patches_per_frame=4)
loader = build_loader({str(shards)!r}, sampling=sampling, image_size=32, patches_per_frame=4, batch_size=2,
                      num_workers=1, shuffle=False)
turnkey = [key for batch in loader for key in batch["keys"]]

urls = sorted(glob.glob({str(shards)!r} + "/*.tar"))
pipe = wds.WebDataset(urls, shardshuffle=False).map(ClipTransform(sampling, image_size=32))
plain = [key for batch in pipe.batched(2, collation_fn=collate) for key in batch["keys"]]

data = ClipDataset({str(shards)!r}, sampling=sampling, image_size=32)
map_style = [key for batch in DataLoader(data, batch_size=2, collate_fn=collate) for key in batch["keys"]]
assert turnkey == plain == map_style and len(turnkey) == 4, (turnkey, plain, map_style)
print("ok")
"""
    assert run_from(tmp_path, installed, code).endswith("ok\n")


def test_the_pure_parts_need_torch_and_numpy_alone(tmp_path, installed):
    code = """
import sys
from framestream.pipeline import FastSlowSampling, FrameLayout, SampleOrder, time_causal
from framestream.model.attention import frame_attention
from framestream.model.predictor import FramePredictor
layout = FrameLayout.from_plan(FastSlowSampling().plan(16), patches=4)
time_causal(layout).block_mask()
extra = {"av", "decord", "webdataset", "torchvision", "fsspec", "matplotlib", "rich", "jsonargparse", "jinja2"}
print(sorted(extra & set(sys.modules)))
"""
    assert run_from(tmp_path, installed, code) == "[]\n"


@pytest.mark.parametrize("package", ["pipeline", "model"])
def test_public_names_resolve(package):
    module = __import__(f"framestream.{package}", fromlist=["*"])
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert dir(module) == module.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_imports_point_one_way():
    allowed = {
        "pipeline": {"pipeline"},
        "model": {"pipeline", "model"},
        "tools": {"pipeline", "model", "tools", "configs"},
    }
    for package, below in allowed.items():
        for file in (ROOT / package).rglob("*.py"):
            home = ("framestream", *file.relative_to(ROOT).parent.parts)
            for name in imported(ast.parse(file.read_text()), home):
                top, _, rest = name.partition(".")
                assert top not in ("pipeline", "model", "tools", "configs"), (file, name)
                assert top != "framestream" or rest.partition(".")[0] in below, (file, name)


def imported(tree: ast.AST, home: tuple[str, ...]) -> Iterator[str]:
    """Full names of all that a module of the package `home` imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (*home[: len(home) - node.level + 1], node.module) if node.level else (node.module,)
            yield from (".".join(filter(None, (*base, alias.name))) for alias in node.names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from framestream import tools", ["framestream.tools"]),
        ("def f():\n    import framestream.tools.cli", ["framestream.tools.cli"]),
        ("from ..tools import cli", ["framestream.tools.cli"]),
        ("from .. import tools", ["framestream.tools"]),
        ("from .sampling import FAST", ["framestream.model.sampling.FAST"]),
        ("'framestream.tools'", []),
    ],
)
def test_imports_are_read_as_python_reads_them(source, names):
    assert list(imported(ast.parse(source), ("framestream", "model"))) == names


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "verify"),
        (["--version"], 0, "framestream 0."),
        ([], 2, "usage: framestream COMMAND"),
        (["sharp"], 2, "unknown command 'sharp'; commands are shard,"),
        (["shard"], 2, "required"),
        (["shard", "--help"], 0, "--samples-per-shard"),
        (["verify", "--help"], 0, "--repair-index"),
        (["demo", "--help"], 0, "--videos"),
        (["train", "--help"], 0, "--train.steps"),
        (["doctor", "--speed", "9"], 2, "--speed"),
        (["verify", "no-such-folder"], 2, "no-such-folder"),
    ],
)
def test_the_command_line(arguments, code, said, tmp_path):
    command = [sys.executable, "-m", "framestream.tools.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
