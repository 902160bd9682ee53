"""Clips to a batch: names, shapes and dtypes of the contract, masks and positions that match the plan."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from framestream.pipeline.collate import ClipCollator
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.health import ClipReport
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import RULES, FrameMask, make_mask
from framestream.pipeline.sampling import FastSlowSampling


def clip(num_frames: int = 20, key: str = "a", order: str = "concat", **extra: Any) -> dict[str, Any]:
    plan = FastSlowSampling(num_fast=3, num_slow=2, order=order).plan(num_frames)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(num_frames)
    return {
        "frames": torch.randint(0, 256, (5, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "frame_index": torch.from_numpy(plan.frame_index),
        "frame_time": torch.from_numpy(plan.frame_index / 24).float(),
        "frame_stream": torch.from_numpy(plan.stream),
        "frame_valid": torch.from_numpy(plan.valid),
        "key": key,
        "text": f"text of {key}",
        "meta": {"of": key},
        "report": ClipReport({"decode_ms": 1.0}),
        **extra,
    }


def test_a_batch_is_the_contract_and_nothing_else() -> None:
    batch = ClipCollator(patches_per_frame=4)([clip(20, "a"), clip(2, "b")])
    shapes = {
        "video_frames": ((2, 5, 3, 8, 8), torch.uint8),
        "frame_index": ((2, 5), torch.int64),
        "frame_time": ((2, 5), torch.float32),
        "frame_stream": ((2, 5), torch.uint8),
        "frame_valid": ((2, 5), torch.bool),
        "frame_position_ids": ((2, 20), torch.int64),
    }
    assert type(batch) is dict
    assert set(batch) == {*shapes, "frame_mask", "keys", "text", "meta"}
    assert {name: (tuple(batch[name].shape), batch[name].dtype) for name in shapes} == shapes
    assert isinstance(batch["frame_mask"], FrameMask)
    assert batch["frame_mask"].batch_size == 2
    assert batch["keys"] == ["a", "b"]
    assert batch["text"] == ["text of a", "text of b"]
    assert batch["meta"] == [{"of": "a"}, {"of": "b"}]


@pytest.mark.parametrize("order", ["concat", "interleave", "time"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("patches", [4, (7, 3)])
def test_masks_and_positions_are_those_of_each_clip(order: str, rule: str, patches: Any) -> None:
    clips = [clip(20, "a", order), clip(2, "b", order), clip(20, "c", order)]
    batch = ClipCollator(patches_per_frame=patches, mask=rule, window_size=2)(clips)
    for row, one in enumerate(clips):
        layout = FrameLayout.from_arrays(one["frame_index"], one["frame_stream"], one["frame_valid"], patches)
        options = {"window_size": 2} if rule == "sliding_window" else {}
        expected = make_mask(rule, layout, **options)
        assert batch["frame_mask"][row] == expected
        assert torch.equal(batch["frame_mask"].matrix()[row], expected.matrix())
        counts = torch.tensor([patches if isinstance(patches, int) else patches[s] for s in one["frame_stream"]])
        assert torch.equal(batch["frame_position_ids"][row], one["frame_index"].repeat_interleave(counts))


def test_sequence_positions_count_frames() -> None:
    batch = ClipCollator(patches_per_frame=2, position_ids="sequence")([clip()])
    assert batch["frame_position_ids"][0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_function_of_the_layout_is_a_mask_too() -> None:
    batch = ClipCollator(patches_per_frame=2, mask=RULES["full"])([clip()])
    assert batch["frame_mask"].matrix().all()


@pytest.mark.parametrize("normalize", [((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), (0.5, 0.25)])
def test_normalize_gives_floats(normalize: Any) -> None:
    one = clip()
    frames = ClipCollator(patches_per_frame=1, normalize=normalize)([one])["video_frames"][0]
    mean, std = (torch.tensor(part).expand(3).view(3, 1, 1) for part in normalize)
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, (one["frames"].float() / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_no_entry_is_as_large_as_tokens_squared() -> None:
    batch = ClipCollator(patches_per_frame=256, block_mask=True)([clip(20), clip(9)])
    tokens = batch["frame_position_ids"].shape[1]
    assert tokens == 1280
    assert all(v.numel() < tokens * tokens / 16 for v in batch.values() if isinstance(v, torch.Tensor))
    assert len(pickle.dumps(batch["frame_mask"])) < 1000


def test_block_mask_is_torchs_own_and_pickles() -> None:
    batch = ClipCollator(patches_per_frame=50, block_mask=True)([clip(20), clip(2)])
    ours = pickle.loads(pickle.dumps(batch))["block_mask"]
    assert isinstance(ours, BlockMask)
    dense = batch["frame_mask"].dense()[:, 0]
    reference = create_block_mask(lambda b, h, q, k: dense[b, q, k], 2, None, 250, 250, device="cpu")
    assert torch.equal(ours.to_dense(), reference.to_dense())


def test_fields_are_stacked_where_they_fit() -> None:
    clips = [
        clip(20, "a", **{"same.npy": torch.ones(2), "ragged.npy": torch.ones(2), "label.json": {"x": 1}}),
        clip(20, "b", **{"same.npy": torch.zeros(2), "ragged.npy": torch.ones(3), "label.json": [2]}),
    ]
    batch = ClipCollator(patches_per_frame=1)(clips)
    assert batch["same.npy"].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert [len(v) for v in batch["ragged.npy"]] == [2, 3]
    assert batch["label.json"] == [{"x": 1}, [2]]


def test_clips_of_other_sizes_are_named() -> None:
    larger = clip(20, "big", frames=torch.zeros(5, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"\[5, 3, 8, 8\] in clip a and \[5, 3, 9, 9\] in big"):
        ClipCollator(patches_per_frame=1)([clip(20, "a"), larger])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patches_per_frame": 0}, "patches_per_frame is 0"),
        ({"patches_per_frame": (4, 0)}, r"patches_per_frame is \(4, 0\)"),
        ({"patches_per_frame": (1, 2, 3)}, "a pair"),
        ({"mask": "causal"}, "mask 'causal' is unknown; valid names are frame_causal"),
        ({"window_size": 0}, "window_size is 0"),
        ({"position_ids": "time"}, "position_ids is 'time'; valid values are source, sequence"),
        ({"normalize": (0.5, 0.0)}, "std must be positive"),
        ({"normalize": (0.5,)}, "must be a pair"),
        ({"normalize": ((0.5, 0.5), 1.0)}, "need 1 or 3 numbers"),
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ClipCollator(**{"patches_per_frame": 4, **options})
