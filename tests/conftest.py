"""Shared fixtures, one thread for torch, and a stated reason for every test that this machine cannot run."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

from loader_setup import BAD, write_shards
from synthetic import make_video
from synthetic_shards import make_shards

torch.set_num_threads(1)

# On a busy machine one example takes long now and then: that is no failure.
hypothesis.settings.register_profile("framestream", deadline=None)
hypothesis.settings.load_profile("framestream")

# Compiled code of its own: what another run or version has left in the shared cache may be damaged.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="framestream-compiled-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 48 frames, 160 x 96, H.264 with B-frames, GOP 12, frame i carrying the index i."""
    return make_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="session")
def clip(clip_path: Path) -> bytes:
    """The bytes of `clip_path`."""
    return clip_path.read_bytes()


@pytest.fixture(scope="session")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with videos as people have them: three good ones of different kinds, and one in a subfolder."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    make_video(folder / "short.mp4", num_frames=20, fps=24)
    make_video(folder / "long.mp4", num_frames=72, fps=30, audio=True)
    make_video(folder / "upright.mov", num_frames=40, size=(96, 160), rotation=90)
    make_video(folder / "more" / "web.webm", codec="vp9", num_frames=40, fps=25)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 clips in 3 shards."""
    return make_shards(tmp_path_factory.mktemp("shards"), num_samples=13, samples_per_shard=5)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips in 3 shards, two of them no video at all."""
    return write_shards(tmp_path_factory.mktemp("damaged"), 12, 4, bad=BAD)
