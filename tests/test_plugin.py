"""The three ways into somebody else's training code: turnkey, any webdataset pipeline, any torch DataLoader."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.dataset import ClipDataset
from framestream.pipeline.errors import ConfigError, RejectLimitError, SampleError
from framestream.pipeline.transforms import ClipTransform

from loader_setup import FRAMES, IMAGE_SIZE, PATCHES, SAMPLING, make_loader, stream, write_shards
from synthetic import read_indices
from synthetic_shards import clip_key, make_shards, small_video

CONTRACT = {
    "video_frames": torch.uint8,
    "frame_index": torch.int64,
    "frame_time": torch.float32,
    "frame_stream": torch.uint8,
    "frame_valid": torch.bool,
    "frame_position_ids": torch.int64,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 clips in 3 shards."""
    return make_shards(tmp_path_factory.mktemp("shards"), num_samples=9, samples_per_shard=4)


def tars(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def collator(**options: Any) -> ClipCollator:
    return ClipCollator(patches_per_frame=PATCHES, **options)


def dataset(shards: Path, **options: Any) -> ClipDataset:
    return ClipDataset(shards, sampling=SAMPLING, image_size=IMAGE_SIZE, **options)


def check(batch: dict[str, Any]) -> None:
    """The contract, and the frames by their pixels."""
    rows = len(batch["keys"])
    assert set(batch) == {*CONTRACT, "frame_mask", "keys", "text", "meta"}
    for name, dtype in CONTRACT.items():
        assert batch[name].dtype == dtype
        assert batch[name].shape[0] == rows
    assert batch["video_frames"].shape == (rows, FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["frame_mask"].batch_size == rows
    for frames, index in zip(batch["video_frames"], batch["frame_index"], strict=True):
        assert read_indices(frames) == index.tolist()


# -- level 2: webdataset ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_webdataset_pipeline(shards: Path, workers: int) -> None:
    pipeline = (
        wds.WebDataset(tars(shards), shardshuffle=False)
        .map(ClipTransform(SAMPLING, image_size=IMAGE_SIZE, random_end=True))
        .batched(2, collation_fn=collator())
    )
    batches = list(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))
    for batch in batches:
        check(batch)
        assert batch["text"] == [f"clip number {int(key.split('-')[1])}" for key in batch["keys"]]
    assert sorted(key for batch in batches for key in batch["keys"]) == [clip_key(n) for n in range(9)]
    ends = {key: i for batch in batches for key, i in zip(batch["keys"], batch["frame_index"][:, -1], strict=True)}
    assert len({int(end) for end in ends.values()}) > 1


def test_a_pipeline_may_pass_bad_samples_by(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, 6, 3, bad={1, 4})
    pipeline = wds.WebDataset(tars(folder), shardshuffle=False).map(
        ClipTransform(SAMPLING, image_size=IMAGE_SIZE), handler=wds.ignore_and_continue
    )
    assert [clip["key"] for clip in pipeline] == [clip_key(n) for n in (0, 2, 3, 5)]
    strict = wds.WebDataset(tars(folder), shardshuffle=False).map(ClipTransform(SAMPLING, image_size=IMAGE_SIZE))
    with pytest.raises(SampleError, match=clip_key(1)):
        list(strict)


def test_decoded_samples_are_refused_with_advice(shards: Path) -> None:
    pipeline = wds.WebDataset(tars(shards), shardshuffle=False).decode().map(ClipTransform(SAMPLING))
    with pytest.raises(ConfigError, match=r"put this step before any \.decode"):
        next(iter(pipeline))


def test_shards_made_by_others_serve_with_their_own_members(tmp_path: Path) -> None:
    video, _ = small_video(1, 32, (96, 64), ".mp4")
    file = io.BytesIO()
    np.save(file, np.arange(6).reshape(2, 3))
    with wds.TarWriter(str(tmp_path / "others-000.tar")) as tar:
        for number in range(3):
            members = {"mp4": video, "cls": number, "actions.npy": file.getvalue(), "label.json": {"n": number}}
            tar.write({"__key__": f"dir/sample{number}", **members})
    with tarfile.open(tmp_path / "others-000.tar") as tar:
        assert "dir/sample0.actions.npy" in tar.getnames()
    loader = make_loader(tmp_path, batch_size=3, shuffle=False, fields=("actions.npy", "label.json"))
    batch = next(iter(loader))
    assert batch["actions.npy"].shape == (3, 2, 3)
    assert batch["label.json"] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert read_indices(batch["video_frames"][0]) == batch["frame_index"][0].tolist()
    clip = next(
        iter(
            wds.WebDataset(tars(tmp_path), shardshuffle=False).map(
                ClipTransform(SAMPLING, image_size=IMAGE_SIZE, fields=("actions.npy", "label.json"))
            )
        )
    )
    assert clip["label.json"] == {"n": 0}
    assert torch.equal(clip["actions.npy"], batch["actions.npy"][0])


# -- level 3: any DataLoader -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "multiprocessing_context": "fork", "pin_memory": True},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ],
    ids=str,
)
def test_a_plain_dataloader(shards: Path, options: dict[str, Any]) -> None:
    loader = DataLoader(dataset(shards), batch_size=4, collate_fn=collator(block_mask=False), **options)
    batches = list(loader)
    for batch in batches:
        check(batch)
    assert [key for batch in batches for key in batch["keys"]] == [clip_key(n) for n in range(9)]


def test_a_block_mask_leaves_a_worker(shards: Path) -> None:
    loader = DataLoader(dataset(shards), batch_size=3, num_workers=1, collate_fn=collator(block_mask=True))
    token = torch.arange(FRAMES * PATCHES)
    for batch in loader:
        rule = batch["block_mask"].mask_mod
        for row, dense in enumerate(batch["frame_mask"].dense()[:, 0]):
            assert torch.equal(rule(torch.tensor(row), torch.tensor(0), token[:, None], token[None, :]), dense)


def test_indexing_is_that_of_a_sequence(shards: Path) -> None:
    clips = dataset(shards)
    assert len(clips) == 9
    assert clips[8]["key"] == clips[-1]["key"] == clip_key(8)
    assert clips[torch.tensor(3)]["key"] == clip_key(3)
    for index in (9, -10):
        with pytest.raises(IndexError, match=r"outside a dataset of 9 clips"):
            clips[index]


def test_random_samplers_work_and_epochs_draw_other_moments(shards: Path) -> None:
    clips = dataset(shards, random_end=True)
    loader = DataLoader(clips, batch_size=3, shuffle=True, num_workers=1, collate_fn=collator())
    moments = []
    for epoch in (0, 1, 0):
        clips.set_epoch(epoch)
        moments.append({k: i.tolist() for b in loader for k, i in zip(b["keys"], b["frame_index"], strict=True)})
    assert moments[0] == moments[2] != moments[1]
    assert moments[2] == {k: i.tolist() for b in loader for k, i in zip(b["keys"], b["frame_index"], strict=True)}


def test_bad_samples_become_marked_spares(tmp_path: Path) -> None:
    clips = dataset(write_shards(tmp_path, 7, 3, bad={1, 4}))
    for number in range(7):
        clip = clips[number]
        if number in (1, 4):
            assert clip["meta"]["spare_for"] == clip_key(number)
            assert clip["meta"]["rejects"][0]["key"] == clip_key(number)
            assert clip["key"] not in (clip_key(1), clip_key(4))
            assert clips[number]["key"] == clip["key"]
        else:
            assert clip["key"] == clip_key(number)
            assert "spare_for" not in clip["meta"]
        assert read_indices(clip["frames"]) == clip["frame_index"].tolist()


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=str)
def test_a_bad_sample_is_an_error_where_no_other_clip_may_stand_in(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_shards(tmp_path, 4, 2, bad={1})
    clips = dataset(folder, on_bad="raise")
    with pytest.raises(SampleError, match=clip_key(1)):
        clips[1]
    assert [clips[number]["key"] for number in (0, 2, 3)] == [clip_key(number) for number in (0, 2, 3)]
    with pytest.raises(SampleError, match=clip_key(1)):
        list(DataLoader(clips, batch_size=2, collate_fn=collator(), **options))
    with pytest.raises(ConfigError, match="on_bad is 'skip'; valid values are spare, raise"):
        dataset(folder, on_bad="skip")


def test_a_dataset_of_bad_samples_says_so_from_a_worker(tmp_path: Path) -> None:
    clips = dataset(write_shards(tmp_path, 3, 3, bad={0, 1, 2}))
    with pytest.raises(RejectLimitError, match="samples in a row could not be used"):
        list(DataLoader(clips, collate_fn=collator(), num_workers=1))


# -- level 1, the rest is in test_loader and test_frameworks ----------------------------------------------


def test_pinning_does_not_need_an_accelerator(shards: Path) -> None:
    for options in ({"num_workers": 1}, {}, {"decode_on": "trainer"}):
        assert stream(make_loader(shards, pin_memory=True, **options)) == stream(make_loader(shards))
