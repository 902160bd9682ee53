"""One sample to one clip: the right frames by pixels, seeded choices, refusals that name the sample."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from framestream.pipeline.errors import ConfigError, SampleError
from framestream.pipeline.probe import probe_video
from framestream.pipeline.sampling import DenseSampling, FastSlowSampling
from framestream.pipeline.shards import sample_from_members
from framestream.pipeline.transforms import ClipTransform, draw_at

from synthetic import read_indices, video_bytes

SAMPLING = FastSlowSampling(num_fast=4, num_slow=4)


@pytest.fixture(scope="module")
def video() -> bytes:
    return video_bytes(num_frames=40, size=(96, 64), gop=10)


def sample(video: bytes, key: str = "a", **members: bytes) -> Any:
    return sample_from_members(key, "s.tar", {"mp4": video, **{k.replace("_", "."): v for k, v in members.items()}})


def test_a_clip_holds_the_planned_frames(video: bytes) -> None:
    clip = ClipTransform(SAMPLING, image_size=48)(sample(video, txt=b"two words", json=b'{"user": 1}'))
    plan = SAMPLING.plan(40)
    assert clip["frames"].shape == (8, 3, 48, 48)
    assert clip["frames"].dtype == torch.uint8
    assert read_indices(clip["frames"]) == plan.frame_index.tolist() == clip["frame_index"].tolist()
    assert clip["frame_stream"].tolist() == [0] * 4 + [1] * 4
    assert clip["frame_valid"].all()
    assert clip["frame_time"].dtype == torch.float32
    assert clip["frame_time"].tolist() == pytest.approx([i / 24 for i in plan.frame_index], abs=1e-4)
    assert (clip["key"], clip["text"], clip["meta"]) == ("a", "two words", {"user": 1})
    assert set(clip["report"].timing) == {"read_ms", "decode_ms", "transform_ms"}
    assert min(clip["report"].timing.values()) > 0


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("image_size", [33, 64, 100])
def test_any_shape_becomes_a_square_and_keeps_its_middle(size: tuple[int, int], image_size: int) -> None:
    clip = ClipTransform(DenseSampling(2), image_size=image_size)(sample(video_bytes(num_frames=3, size=size)))
    assert clip["frames"].shape[-2:] == (image_size, image_size)
    assert read_indices(clip["frames"]) == [1, 2]


def test_times_are_real_in_a_variable_rate_clip() -> None:
    data = video_bytes(".mkv", num_frames=20, vfr=True)
    clip = ClipTransform(DenseSampling(20), image_size=48)(sample_from_members("v", "s.tar", {"mkv": data}))
    steps = clip["frame_time"].diff()
    assert read_indices(clip["frames"]) == list(range(20))
    assert float(steps.max()) > 2 * float(steps.min())


def test_fps_sampling_counts_on_the_resampled_clip(video: bytes) -> None:
    clip = ClipTransform(DenseSampling(5, fps=8), image_size=48)(sample(video))
    assert read_indices(clip["frames"]) == [27, 30, 33, 36, 39]


def test_short_clips_are_padded_and_say_so() -> None:
    clip = ClipTransform(SAMPLING, image_size=48)(sample(video_bytes(num_frames=3)))
    assert read_indices(clip["frames"]) == clip["frame_index"].tolist() == [0, 0, 1, 2, 0, 0, 1, 2]
    assert clip["frame_valid"].tolist() == [False, True, True, True] * 2


def test_the_moment_is_drawn_by_position_and_lacks_no_frame(video: bytes) -> None:
    transform = ClipTransform(SAMPLING, image_size=48, random_end=True, seed=1)

    def end(epoch: int, position: int) -> int:
        request = transform.request(sample(video), draw=draw_at(1, epoch, position))
        assert request.plan.valid.all()
        return int(request.plan.frame_index.max()) + 1

    ends = [end(epoch, position) for epoch in range(2) for position in range(150)]
    assert ends == [end(epoch, position) for epoch in range(2) for position in range(150)]
    assert ends[:150] != ends[150:]
    assert set(ends) == set(range(4, 41))  # from the first moment with four frames on


def test_without_a_position_the_key_draws_the_moment(video: bytes) -> None:
    transform = ClipTransform(DenseSampling(2), image_size=48, random_end=True)
    ends = {key: transform(sample(video, key))["frame_index"][-1].item() for key in "abcdefgh"}
    assert ends == {key: transform(sample(video, key))["frame_index"][-1].item() for key in "abcdefgh"}
    assert len(set(ends.values())) > 2
    other = ClipTransform(DenseSampling(2), image_size=48, random_end=True, seed=1)
    assert ends != {key: other(sample(video, key))["frame_index"][-1].item() for key in "abcdefgh"}


def test_a_clip_too_short_for_a_full_plan_ends_at_its_end() -> None:
    transform = ClipTransform(DenseSampling(9), image_size=48, random_end=True)
    assert transform(sample(video_bytes(num_frames=3)))["frame_index"].tolist()[-3:] == [0, 1, 2]


def test_random_crops_stay_inside_and_move() -> None:
    data = sample(video_bytes(num_frames=2, size=(160, 64)))
    transform = ClipTransform(DenseSampling(1), image_size=64, crop="random")
    whole = ClipTransform(DenseSampling(1), image_size=64)(data)["frames"]
    crops = [transform.clip(transform.request(data, draw=draw)) for draw in range(0, 2**64, 2**60 + 12345)]
    assert all(crop["frames"].shape == whole.shape for crop in crops)
    assert len({crop["frames"].numpy().tobytes() for crop in crops}) > 8


def test_a_frame_of_both_streams_is_transformed_once() -> None:
    seen = []

    def noise(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(frames.shape[0])
        return torch.randint(0, 256, frames.shape, generator=generator, dtype=torch.uint8)

    data = sample(video_bytes(num_frames=4))
    clip = ClipTransform(SAMPLING, image_size=48, transform=noise)(data)
    assert seen == [4]
    assert clip["frame_index"].tolist() == [0, 1, 2, 3] * 2
    assert torch.equal(clip["frames"][:4], clip["frames"][4:])
    again = ClipTransform(SAMPLING, image_size=48, transform=noise)(data)
    assert torch.equal(clip["frames"], again["frames"])
    other = ClipTransform(SAMPLING, image_size=48, transform=noise, seed=1)(data)
    assert not torch.equal(clip["frames"], other["frames"])


@pytest.mark.parametrize(
    "hook", [lambda f, g: f.float(), lambda f, g: f[:1], lambda f, g: None], ids=["dtype", "shape", "nothing"]
)
def test_a_hook_that_changes_the_contract_is_refused(video: bytes, hook: Any) -> None:
    with pytest.raises(ConfigError, match=r"transform returned .* it must return torch.uint8"):
        ClipTransform(SAMPLING, image_size=48, transform=hook)(sample(video))


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_fields_travel_along(video: bytes) -> None:
    transform = ClipTransform(SAMPLING, image_size=48, fields=("actions.npy", "label.json"))
    clip = transform(sample(video, actions_npy=npy(np.arange(3.0)), label_json=b'["x"]'))
    assert clip["actions.npy"].tolist() == [0.0, 1.0, 2.0]
    assert clip["label.json"] == ["x"]


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({}, "has no member 'a.npy'.*it has mp4"),
        ({"a_npy": b"nonsense"}, "member 'a.npy' cannot be parsed"),
        ({"a_npy": b""}, "member 'a.npy' cannot be parsed"),
        ({"a_npy": b"PK\x03\x04junk"}, "member 'a.npy' cannot be parsed"),
        ({"a_npy": b"\x93NUMPY\x01\x00\x0b\x00{'descr': ("}, "member 'a.npy' cannot be parsed"),
        ({"a_npy": npy(np.array([print], dtype=object), allow_pickle=True)}, "member 'a.npy' cannot be parsed"),
        ({"a_npy": npy(np.array(["text"]))}, "member 'a.npy' cannot be parsed"),
    ],
)
def test_bad_fields_reject_the_sample_and_run_nothing(video: bytes, members: dict[str, bytes], text: str) -> None:
    with pytest.raises(SampleError, match=text):
        ClipTransform(SAMPLING, image_size=48, fields=("a.npy",))(sample(video, **members))


@pytest.mark.parametrize("data", [b"", b"no video", bytes(4000)])
def test_unusable_video_names_sample_and_shard(data: bytes) -> None:
    with pytest.raises(SampleError, match=r"clip-9.*dir/x\.tar"):
        ClipTransform(SAMPLING, image_size=48)(sample_from_members("clip-9", "dir/x.tar", {"mp4": data}))


@pytest.mark.parametrize("num_frames", [60, 10**6])
def test_metadata_of_another_video_is_noticed(video: bytes, num_frames: int) -> None:
    wrong = {**probe_video(video).to_json(), "num_frames": num_frames}
    with pytest.raises(SampleError, match=rf"metadata says {num_frames}"):
        ClipTransform(SAMPLING, image_size=48)(sample(video, json=json.dumps(wrong).encode()))


@pytest.mark.parametrize(
    "change", [{"num_frames": 10**11}, {"fps": 2e-6}, {"duration": 1e9}, {"timestamps": [*range(39), 1e12]}]
)
def test_metadata_that_spans_years_is_passed_over(video: bytes, change: dict) -> None:
    """Planning by time would take memory for each moment of it."""
    wrong = json.dumps({**probe_video(video).to_json(), **change}).encode()
    clip = ClipTransform(DenseSampling(4, fps=24), image_size=48)(sample(video, json=wrong))
    assert read_indices(clip["frames"]) == [36, 37, 38, 39]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 1.5}, "image_size is 1.5"),
        ({"crop": "corner"}, "crop is 'corner'; valid values are center, random"),
        ({"decoder": "vlc"}, "decoder 'vlc' is unknown"),
        ({"transform": 3}, "transform is 3"),
        ({"fields": ("x.pyd",)}, "fields names 'x.pyd'"),
        ({"fields": "npy"}, "fields is the string 'npy'"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"sampling": {"kind": "fast_slow", "num_fast": 0}}, "num_fast must be a whole number >= 1, got 0"),
        ({"sampling": {"kind": "dense", "num_frames": 2, "strid": 2}}, "'strid' is unknown"),
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ClipTransform(**{"sampling": SAMPLING, **options})
