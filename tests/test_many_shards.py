"""What a large set costs: memory per shard, and nothing that grows faster than the number of shards."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from framestream.pipeline.shards import ShardSet, ShardWriter


def many_shards(folder: Path, count: int) -> Path:
    """`count` shards that are one and the same file under different names, and an index of them all."""
    with ShardWriter(folder / "one", samples_per_shard=2) as writer:
        for i in range(2):
            writer.write(f"k{i}", b"video", "mp4", {"n": i})
    entry = json.loads((folder / "one" / "index.json").read_bytes())["shards"][0]
    out = folder / "many"
    out.mkdir()
    names = [f"clips-{number:06d}" for number in range(count)]
    for name in names:
        for suffix in (".tar", ".idx.json"):
            os.link(folder / "one" / f"clips-000000{suffix}", out / f"{name}{suffix}")
    shards = [{**entry, "name": f"{name}.tar"} for name in names]
    (out / "index.json").write_text(json.dumps({"version": 1, "num_samples": 2 * count, "shards": shards}))
    return out


@pytest.mark.parametrize("count", [10, 10_000])
def test_a_shard_costs_half_a_kilobyte_whatever_their_number(tmp_path: Path, count: int) -> None:
    folder = many_shards(tmp_path, count)
    ShardSet.open(folder)  # what is imported and cached once
    tracemalloc.start()
    try:
        shards = ShardSet.open(folder)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (len(shards.names), shards.num_samples, shards.problems) == (count, 2 * count, ())
    path = len(str(folder))  # which every shard's place begins with
    assert held < (500 + path) * count + 10_000
    assert len(pickle.dumps(shards)) < (150 + path) * count + 2_000
    assert shards.read(*shards.locate(2 * count - 1)).key == "k1"


def test_opening_by_index_reads_no_shard_and_no_other_index(tmp_path: Path) -> None:
    folder = many_shards(tmp_path, 50)
    for path in folder.glob("*.idx.json"):
        path.unlink()
    content = bytes(os.stat(folder / "clips-000000.tar").st_size)
    (folder / "clips-000007.tar").unlink()
    (folder / "clips-000007.tar").write_bytes(content)  # not a tar at all, of the right size
    shards = ShardSet.open(folder)
    assert (shards.num_samples, shards.problems) == (100, ())
    assert not list(folder.glob("*.idx.json"))
