"""The formulas for operations, parameters and bytes against what is counted, and the arithmetic built on them."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from framestream.model.predictor import MLP_TOKENS, FramePredictor
from framestream.pipeline import build_loader
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import make_mask
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling
from framestream.tools.bench_rows import Row
from framestream.tools.bench_scaling import SIZES, counted_flops, scaling, training_step
from framestream.tools.cluster import Job, Node, needs
from framestream.tools.peak_memory import peak_bytes
from framestream.tools.scaling import StepSize, tower_flops

from model_setup import geometry_of
from synthetic_shards import make_shards

FEW = StepSize(clips=2, frames=8, patches=16, embedding_dim=48, width=64, layers=3, heads=4, context_dim=24)
MANY = replace(FEW, clips=16)  # more tokens than the MLP takes at once
WIDE = StepSize(clips=2, frames=8, patches=4, embedding_dim=192, width=192, layers=4, heads=4)  # gradients weigh most
STATES = replace(MANY, states=16, layers=2)
ALL = {"few": FEW, "many": MANY, "wide": WIDE, "states": STATES}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def predictor_of(size: StepSize) -> FramePredictor:
    return FramePredictor(
        size.embedding_dim,
        size.heads,
        size.layers,
        context_dim=size.context_dim,
        width=size.width,
        mlp_ratio=size.mlp_ratio,
        gradient_checkpointing=size.gradient_checkpointing,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_operations_are_those_that_are_counted(name, checkpointing):
    size = replace(ALL[name], gradient_checkpointing=checkpointing)
    assert counted_flops(training_step(size)) == pytest.approx(size.flops().total, rel=0.01)


def test_operations_of_a_sparse_mask_and_of_another_mlp():
    plan = FastSlowSampling(4, 4).plan(40)
    layout = FrameLayout.from_plan(plan, patches=16)
    mask = make_mask("sliding_window", layout, window_size=2)
    size = replace(FEW, mlp_ratio=1.5, density=mask.density)
    assert size.share < 0.3 < FEW.share
    predictor, geometry = predictor_of(size), geometry_of(layout, size.clips)
    tokens = torch.randn(size.clips, layout.num_tokens, size.embedding_dim)

    def step() -> None:
        predictor(tokens, geometry, mask)[0].square().sum().backward()

    assert counted_flops(step) == pytest.approx(size.flops().total, rel=0.01)


def test_operations_of_a_tower():
    # In train mode, where no fused path hides its products.
    vit = nn.TransformerEncoderLayer(48, 4, 80, dropout=0.0, batch_first=True)
    frames, patches, patch_values = 3, 16, 27
    embed = nn.Linear(patch_values, 48)

    def step() -> None:
        x = torch.randn(frames, patches, patch_values)
        vit(embed(x))

    expected = frames * tower_flops(patches, 48, 1, 80, patch_values)
    assert counted_flops(step) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_what_is_stored_of_them(name):
    size = replace(ALL[name], mlp_ratio=2.5)
    predictor = predictor_of(size)
    optimizer = torch.optim.AdamW(predictor.parameters())
    for parameter in predictor.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert sum(p.numel() for p in predictor.parameters()) == size.parameters()
    averages = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert 2 * sum(p.nbytes for p in predictor.parameters()) + averages == size.state_bytes()
    assert sum(p.nbytes for p in predictor.parameters()) + averages == size.checkpoint_bytes()


@pytest.mark.parametrize("product_bytes", [4, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["many", "wide", "states"])
def test_the_worst_moment_is_as_large_as_measured(name, checkpointing, product_bytes):
    size = replace(ALL[name], gradient_checkpointing=checkpointing, product_bytes=product_bytes)
    assert size.peak_bytes() == pytest.approx(peak_bytes(training_step(size)), rel=0.15)


def test_each_block_keeps_what_the_formula_says():
    peaks = [peak_bytes(training_step(replace(MANY, layers=layers))) for layers in (2, 4)]
    assert (peaks[1] - peaks[0]) / 2 == pytest.approx(MANY.kept_per_block(), rel=0.01)


@pytest.mark.slow
def test_the_published_sizes_fit_and_the_benchmark_says_so():
    sizes = SIZES[:3]  # the last takes as long as all others
    rows: list[Row] = scaling(1, "cpu", sizes)
    assert len(rows) == 3
    for row in rows:
        assert row.facts["GFLOP formula / measured"] == pytest.approx(1, abs=0.02)
        assert row.facts["peak formula / measured"] == pytest.approx(1, abs=0.15)
        assert row.facts["tokens/s"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [({"clips": 0}, "clips is 0"), ({"density": 1.5}, "density is 1.5"), ({"product_bytes": 3}, "product_bytes is 3")],
)
def test_impossible_sizes_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(FEW, **change)


def test_impossible_machines_are_refused():
    with pytest.raises(ConfigError, match=r"utilisation is 1\.5"):
        Node(utilisation=1.5)
    with pytest.raises(ConfigError, match="clips_per_core is 0"):
        Job(FEW, clips_per_core=0)
    with pytest.raises(ConfigError, match="nodes is 0"):
        needs(Job(FEW), Node(), 0)


def test_what_a_cluster_needs_by_hand():
    size = replace(FEW, clips=10)
    flops = size.flops().total / 10 + 8 * 1e9
    node = Node(
        gpus=4, peak_flops=2 * flops * 50, utilisation=0.5, decode_cores=10, storage_bytes_s=1e6, link_bytes_s=1e9
    )
    job = Job(size, tower_flops=1e9, clips=1_000_001, clip_bytes=1000, clips_per_core=15)
    one, three = needs(job, node), needs(job, node, 3)
    assert (one.steps, three.steps) == (25_001, 8_334)  # of 40 and of 120 clips, the last one part filled
    assert one.clips_s == pytest.approx(200)  # four GPUs of 50
    assert one.step_s == three.step_s == pytest.approx(10 / 50)
    assert three.hours == pytest.approx(1_000_001 / 600 / 3600)
    assert one.decode_cores_per_gpu == pytest.approx(50 / 15)
    assert one.limits["decoding"] == pytest.approx(150)
    assert one.first_limit == "decoding"
    # Every machine fetches the clips of all: what storage gives one of them bounds the run, however many there are.
    assert one.storage_bytes_s == pytest.approx(200 * 1000)
    assert three.storage_bytes_s == pytest.approx(600 * 1000)
    assert one.limits["storage"] == three.limits["storage"] == pytest.approx(1000)
    assert one.link_bytes_s == 0
    assert three.link_bytes_s == pytest.approx(2 * 2 / 3 * 4 * size.parameters() / three.step_s)
    assert three.limits["gradients"] == pytest.approx(three.clips_s * 1e9 / three.link_bytes_s)


def test_each_machine_fetches_all_shards(tmp_path):
    """Two ranks with caches of their own, as on two machines: half of the clips each, and all of the bytes."""
    make_shards(tmp_path / "shards", num_samples=24, samples_per_shard=8, num_frames=4)
    name = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(str(tmp_path / "shards"), f"/{tmp_path.name}", recursive=True)
    clips = []
    for rank in (0, 1):
        cache = tmp_path / f"cache{rank}"
        with closing(
            build_loader(
                name,
                sampling=DenseSampling(2),
                image_size=16,
                patches_per_frame=1,
                batch_size=1,
                num_workers=0,
                rank=rank,
                world_size=2,
                cache_dir=cache,
            )
        ) as loader:
            clips += [key for batch in loader for key in batch["keys"]]
        assert len({path.name for path in cache.rglob("*.tar")}) == 3
    assert len(set(clips)) == 24


def test_the_page_has_the_figures_of_the_formulas():
    """The cluster table of docs/SCALING.md, row by row."""
    page = (Path(__file__).parents[1] / "docs" / "SCALING.md").read_text()
    siglip = StepSize(8, 16, 256, 1152, 1152, product_bytes=2, mlp_tokens=MLP_TOKENS[1])
    pixels = StepSize(32, 16, 256, 768, 256, product_bytes=2, mlp_tokens=MLP_TOKENS[1])
    jobs = {"SigLIP": Job(siglip, tower_flops(256, 1152, 27, 4304, 588)), "pixels": Job(pixels)}
    found = re.findall(r"^\| (SigLIP|pixels), (\d+) nodes? \|(.*)\|$", page, re.MULTILINE)
    assert [(name, nodes) for name, nodes, _ in found] == [(n, c) for n in jobs for c in ("1", "64")]
    for name, nodes, cells in found:
        need = needs(jobs[name], Node(), int(nodes))
        slowed = jobs[name].clips / need.limits[need.first_limit] / 60
        expected = [
            f"{need.steps:,}",
            f"{need.clips_s:,.0f}",
            f"{60 * need.hours:,.1f} min",
            f"{need.decode_cores_per_gpu:.1f}",
            f"{need.storage_bytes_s / 1e9:.2f} GB/s",
            f"{need.link_bytes_s / 1e9:.1f} GB/s",
            f"{need.first_limit}, {slowed:,.1f} min",
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected
