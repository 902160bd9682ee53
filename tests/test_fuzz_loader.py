"""Damaged videos and metadata through the whole loader: shards, worker processes, spares, the list of rejects.

Whatever a sample holds, an epoch has the batches that were promised, every sample is delivered or listed as a
reject, its neighbours come to the bit, and no clip has another number of frames than its metadata says or, where
it has none, than its bytes hold. How often other pixels come without a sign is counted, not asserted: only a
checksum can tell, and with one it is never.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from framestream.pipeline.decode import available_backends
from framestream.pipeline.loader import build_loader
from framestream.pipeline.sampling import FastSlowSampling, Sampling
from framestream.pipeline.shards import ShardWriter

from damage import KINDS
from fuzz_inputs import (
    IMAGE_SIZE,
    MODES,
    SAMPLING,
    SEEDS,
    SOUND,
    SOURCES,
    Input,
    bytes_inputs,
    clip,
    encode,
    json_inputs,
    reference,
    with_neighbours,
)
from results import publish, table
from synthetic import read_indices

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(280)]

PER_SHARD, BATCH = 40, 5
OUTCOMES = ("refused", "exact", "other pixels", "another frame", "other count", "wrong count")

Tally = dict[tuple[str, str], Counter[str]]  # (mode, kind) -> outcome -> inputs


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Collects what became of every input, and publishes it at the end."""
    counts: Tally = defaultdict(Counter)
    yield counts
    kinds = list(dict.fromkeys(kind for _, kind in counts))
    rows = []
    for mode in dict.fromkeys(mode for mode, _ in counts):
        total: Counter[str] = Counter()
        for kind in kinds:
            if found := counts.get((mode, kind)):
                total += found
                rows.append([mode, kind, sum(found.values()), *(found[outcome] for outcome in OUTCOMES)])
        rows.append([mode, "**all**", sum(total.values()), *(total[outcome] for outcome in OUTCOMES)])
    figures = [dict(zip(("mode", "kind", "inputs", *OUTCOMES), row, strict=True)) for row in rows]
    publish(request.config, "fuzz", figures, table(("JSON", "damage", "inputs", *OUTCOMES), rows))


def write(folder: Path, inputs: list[Input], mode: str) -> list[str]:
    """Shards with these samples, and the paths of the shards. Foreign ones are plain tars without any index."""
    if mode != "foreign":
        with ShardWriter(folder, samples_per_shard=PER_SHARD) as writer:
            for one in inputs:
                writer.write(one.key, one.video, one.ext, json.loads(one.json or b"{}"))
        return sorted(map(str, folder.glob("*.tar")))
    folder.mkdir()
    for start in range(0, len(inputs), PER_SHARD):
        with tarfile.open(folder / f"plain-{start:06d}.tar", "w") as tar:
            for one in inputs[start : start + PER_SHARD]:
                for ext, data in ((one.ext, one.video), ("json", one.json)):
                    if data is not None:
                        info = tarfile.TarInfo(f"{one.key}.{ext}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return sorted(map(str, folder.glob("*.tar")))


def frames_held(data: bytes) -> set[int]:
    """How many frames these bytes hold, to a reader that conceals what it can: decoded, stored, and stored from the
    first key frame on. They differ where a picture is too damaged to come out."""
    decoded = stored = from_key = 0
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        for packet in container.demux(container.streams.best("video")):
            stored += packet.size > 0
            from_key += packet.size > 0 and bool(from_key or packet.is_keyframe)
            try:
                decoded += len(packet.decode())
            except av.error.FFmpegError:
                continue
    return {decoded, stored, from_key}


class Epoch:
    """One epoch in stored order, checked as a whole, and what became of each sample."""

    def __init__(
        self, folder: Path, inputs: list[Input], mode: str, sampling: Sampling = SAMPLING, decoder: str = "pyav"
    ) -> None:
        shards = write(folder / "shards", inputs, mode)
        rejects = folder / "rejects.jsonl"
        loader = build_loader(
            shards,
            sampling=sampling,
            image_size=IMAGE_SIZE,
            patches_per_frame=4,
            batch_size=BATCH,
            num_workers=2,
            shuffle=False,
            drop_last=False,
            max_reject_share=1.0,
            rejects_path=rejects,
            cache_dir=folder / "cache",
            timeout_s=20,
            decoder=decoder,
        )
        try:
            batches = list(loader)
        finally:
            loader.close()
        expected = [min(BATCH, len(inputs) - start) for start in range(0, len(inputs), BATCH)]
        assert len(loader) == len(batches) == len(expected)
        assert [len(batch["keys"]) for batch in batches] == expected
        self.rows: list[dict[str, Any]] = [
            {name: batch[name][row] for name in ("keys", "meta", "video_frames", "frame_index", "frame_time")}
            for batch in batches
            for row in range(len(batch["keys"]))
        ]
        self.refused: dict[str, str] = {}
        for row, one in zip(self.rows, inputs, strict=True):
            if row["meta"].get("spare_for", row["keys"]) != one.key:
                raise AssertionError(f"{one.key} is neither delivered nor replaced; its row holds {row['keys']}")
            if "spare_for" in row["meta"]:
                self.refused[one.key] = row["meta"]["rejects"][0]["reason"]
        lines = [json.loads(line) for line in rejects.read_text().splitlines()] if rejects.exists() else []
        assert sorted(line["key"] for line in lines) == sorted(self.refused)
        if decoder == "pyav":  # Decord puts the time of day into its errors
            assert all(self.refused[line["key"]] == line["reason"] for line in lines)
        assert all(line["shard"] in shards and line["key"] in line["reason"] for line in lines)
        assert loader.stats()["spares"] == len(self.refused)


def same_pixels(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    return torch.equal(row["frame_index"], expected["frame_index"]) and torch.equal(
        row["video_frames"], expected["frames"]
    )


def shows_another(row: dict[str, Any]) -> bool:
    """Whether a frame of a row is, by what is drawn in it, another one than it should be."""
    for frame, index in zip(row["video_frames"], row["frame_index"].tolist(), strict=True):
        with contextlib.suppress(ValueError):  # cannot be read any more
            if read_indices(frame[None]) != [index]:
                return True
    return False


def check_neighbours(epoch: Epoch, sound: set[str], expected: dict[str, Any]) -> None:
    """Whatever stands in a row, a sound sample in it is exact: by the bit, and by what is drawn in its frames."""
    assert not sound & epoch.refused.keys()
    for row in epoch.rows:
        if row["keys"] in sound:
            assert same_pixels(row, expected)
            assert read_indices(row["video_frames"]) == row["frame_index"].tolist()


def outcome_of(row: dict[str, Any], one: Input, mode: str, expected: dict[str, Any]) -> str:
    """What a delivered sample of a damaged video is."""
    if same_pixels(row, expected):
        return "exact"
    if torch.equal(row["frame_index"], expected["frame_index"]):
        return "another frame" if shows_another(row) else "other pixels"
    if mode != "foreign":
        return "wrong count"
    count = int(row["frame_index"].max()) + 1
    right = torch.from_numpy(SAMPLING.plan(count).frame_index)
    return (
        "other count" if torch.equal(row["frame_index"], right) and count in frames_held(one.video) else "wrong count"
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_damage_costs_only_its_own_sample(source: str, mode: str, tmp_path: Path, tally: Tally) -> None:
    inputs = with_neighbours(bytes_inputs(source, mode), source, mode)
    epoch = Epoch(tmp_path, inputs, mode)
    expected = reference(source)
    check_neighbours(epoch, {one.key for one in inputs if one.kind == SOUND}, expected)
    wrong = []
    for row, one in zip(epoch.rows, inputs, strict=True):
        if one.kind == SOUND:
            continue
        outcome = "refused" if one.key in epoch.refused else outcome_of(row, one, mode, expected)
        tally[mode, one.kind][outcome] += 1
        damaged = one.kind not in ("wrong extension", SOUND)
        if (
            outcome == "wrong count"
            or (one.kind in ("no video", "random bytes") and outcome != "refused")
            or (not damaged and outcome != "exact")
            or (mode == "checksum" and damaged and outcome != "refused")
            or (mode == "packets" and outcome not in ("refused", "exact"))
        ):
            wrong.append((one.key, outcome, row["frame_index"].tolist()))
    assert not wrong


@pytest.mark.parametrize("source", ["h264 mp4, sound", "vp9 webm", "mpeg4 mp4"])
def test_damage_under_decord_costs_only_its_own_sample(source: str, tmp_path: Path, tally: Tally) -> None:
    """Decord can end its process on such input. Its pixels differ a little, so they are compared with some slack."""
    if available_backends()["decord"]:
        pytest.skip(available_backends()["decord"])
    inputs = with_neighbours(bytes_inputs(source, "metadata"), source, "metadata")
    epoch = Epoch(tmp_path, inputs, "metadata", decoder="decord")
    expected = reference(source)
    sound = {one.key for one in inputs if one.kind == SOUND}
    assert not sound & epoch.refused.keys()
    for row, one in zip(epoch.rows, inputs, strict=True):
        assert torch.equal(row["frame_index"], expected["frame_index"])
        if row["keys"] in sound:
            assert read_indices(row["video_frames"]) == row["frame_index"].tolist()
        if one.kind != SOUND:
            near = (row["video_frames"].float() - expected["frames"].float()).abs().mean() < 4
            outcome = "exact" if near else "another frame" if shows_another(row) else "other pixels"
            tally["metadata, decord", one.kind]["refused" if one.key in epoch.refused else outcome] += 1


@pytest.mark.parametrize(
    "sampling", [SAMPLING, FastSlowSampling(num_fast=4, num_slow=4, fps=12)], ids=["by index", "by time"]
)
@pytest.mark.parametrize("source", SOURCES)
def test_wrong_metadata_never_moves_a_frame(source: str, sampling: Sampling, tmp_path: Path, tally: Tally) -> None:
    inputs = with_neighbours(json_inputs(source), source, "foreign")
    epoch = Epoch(tmp_path, inputs, "foreign", sampling)
    expected = reference(source, sampling)
    check_neighbours(epoch, {one.key for one in inputs if one.kind == SOUND}, expected)
    wrong = []
    for row, one in zip(epoch.rows, inputs, strict=True):
        if one.kind == SOUND:
            continue
        exact = same_pixels(row, expected) and torch.allclose(row["frame_time"], expected["frame_time"], atol=1e-3)
        outcome = "refused" if one.key in epoch.refused else "exact" if exact else "wrong count"
        tally["wrong", one.kind][outcome] += 1
        if outcome == "wrong count":
            wrong.append((one.key, row["frame_index"].tolist(), row["frame_time"].tolist()))
    assert not wrong
    # Metadata that contradicts itself is passed over, and the video is asked; metadata that could be right is believed.
    if "timestamps" not in clip(source)[1]:
        assert {f"num-frames-{n}" for n in (31, 60)} <= epoch.refused.keys()


def test_there_are_enough_inputs_and_each_can_be_made_again() -> None:
    assert len(SOURCES) * len(KINDS) * len(SEEDS) * len(MODES) >= 2000
    for source in SOURCES:
        data = clip(source)[0]
        assert encode(source) == data
        first, second = (list(bytes_inputs(source, "metadata")) for _ in range(2))
        assert first == second
        assert all(one.video != data for one in first if one.kind in KINDS)
        assert len({one.key for one in first}) == len(first)
