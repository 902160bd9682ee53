"""The helper names used by lmms-engine style code: each documented use, with only the import root changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from framestream.pipeline.errors import ConfigError

DEVICE = torch.device("cpu")


def test_mask_generator_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framestream.model.video_frame_utils import FrameLevelMaskGenerator

    monkeypatch.chdir(tmp_path)
    mask_gen = FrameLevelMaskGenerator()
    causal_mask = mask_gen.create_causal_frame_mask(num_frames=8, num_patches_per_frame=256, device=DEVICE)
    assert causal_mask.shape == (2048, 2048)
    assert causal_mask.dtype == torch.bool
    window_mask = mask_gen.create_sliding_window_frame_mask(
        num_frames=8, num_patches_per_frame=256, window_size=3, device=DEVICE
    )
    fast_slow_mask = mask_gen.create_fast_slow_frame_mask(
        num_fast_frames=8, num_slow_frames=8, num_patches_per_frame=256, device=DEVICE
    )
    assert window_mask.shape == (2048, 2048)
    assert fast_slow_mask.shape == (4096, 4096)
    mask_gen.visualize_mask(causal_mask, title="Causal Frame Mask")
    assert (tmp_path / "causal_frame_mask.png").stat().st_size > 1000


def test_causal_mask_by_hand() -> None:
    from framestream.model.video_frame_utils import FrameLevelMaskGenerator, create_causal_frame_mask

    want = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).repeat_interleave(3, 0).repeat_interleave(3, 1).bool()
    assert torch.equal(create_causal_frame_mask(num_frames=3, num_patches_per_frame=3), want)
    assert torch.equal(FrameLevelMaskGenerator.create_causal_frame_mask(3, 3), want)  # on the class too
    mine = create_causal_frame_mask(3, 3)
    mine[:] = False  # what somebody does to a mask stays theirs
    assert torch.equal(create_causal_frame_mask(3, 3), want)


def test_window_and_fast_slow_masks_by_hand() -> None:
    from framestream.model.video_frame_utils import FrameLevelMaskGenerator

    window = FrameLevelMaskGenerator().create_sliding_window_frame_mask(num_frames=5, num_patches_per_frame=2)
    for query in range(5):
        seen = [key for key in range(5) if window[2 * query, 2 * key]]
        assert seen == [k for k in (query - 2, query - 1, query) if k >= 0]
    mask = FrameLevelMaskGenerator.create_fast_slow_frame_mask(2, 3, 1).int().tolist()
    assert mask == [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    mask = FrameLevelMaskGenerator.create_fast_slow_frame_mask(1, 1, 2).int().tolist()
    assert mask == [[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2


def test_sampler_snippet() -> None:
    from framestream.model.video_frame_utils import VideoFrameSampler

    sampler = VideoFrameSampler()
    video = torch.randn(2, 16, 3, 224, 224)
    fast_frames, slow_frames = sampler.sample_fast_slow_frames(
        video_frames=video, fast_stride=1, slow_stride=4, num_fast=8, num_slow=8
    )
    assert torch.equal(fast_frames, video[:, 8:])
    assert torch.equal(slow_frames, video[:, ::2])
    merged = sampler.merge_fast_slow_frames(fast_frames, slow_frames, merge_strategy="concat")
    assert merged.shape == (2, 16, 3, 224, 224)
    assert torch.equal(merged, torch.cat([slow_frames, fast_frames], dim=1))
    merged = sampler.merge_fast_slow_frames(fast_frames, slow_frames, merge_strategy="interleave")
    assert merged.shape == (2, 16, 3, 224, 224)
    assert torch.equal(merged[:, ::2], slow_frames)
    assert torch.equal(merged[:, 1::2], fast_frames)


def test_module_snippet() -> None:
    from framestream.model.autoregressive_reconstruction import create_autoregressive_reconstruction_module

    model = SimpleNamespace(vision_tower=nn.Conv2d(3, 1152, 56, 56), config=SimpleNamespace(hidden_size=64))
    config = {
        "embedding_dim": 1152,
        "loss_weight": 0.1,
        "use_frame_causal_mask": True,
        "use_fast_slow_frames": True,
        "fast_stride": 1,
        "slow_stride": 4,
        "num_fast": 8,
        "num_slow": 8,
    }
    module = create_autoregressive_reconstruction_module(
        vision_tower=model.vision_tower, hidden_size=model.config.hidden_size, config=config
    )
    llm_hidden_states = torch.randn(2, 5, 64, requires_grad=True)
    loss = module.compute_autoregressive_loss(
        hidden_states=llm_hidden_states, video_frames=torch.randn(2, 16, 3, 224, 224)
    )
    assert loss.shape == ()
    loss.backward()
    assert llm_hidden_states.grad is not None
    assert all(p.grad is not None for p in module.parameters())
    assert model.vision_tower.weight.grad is None


def test_decoder_with_both_masks_does_not_leak() -> None:
    from framestream.model.video_frame_utils import create_causal_frame_mask

    torch.manual_seed(0)
    mask = create_causal_frame_mask(num_frames=4, num_patches_per_frame=2)
    predictor = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(1, 8, 16)
    changed = x.clone()
    changed[:, 6:] += 1
    outs = [predictor(tgt=v, memory=v, tgt_mask=~mask, memory_mask=~mask) for v in (x, changed)]
    torch.testing.assert_close(outs[0][:, :6], outs[1][:, :6])
    assert not torch.allclose(outs[0][:, 6:], outs[1][:, 6:])


def test_position_ids() -> None:
    from framestream.model.video_frame_utils import create_frame_position_ids

    ids = create_frame_position_ids(num_frames=3, num_patches_per_frame=2)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert ids.dtype == torch.int64
    assert create_frame_position_ids(2, 2, device=DEVICE).tolist() == [0, 0, 1, 1]
    assert create_frame_position_ids(2, 1, "cpu").tolist() == [0, 1]


def test_debugging_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framestream.model.video_frame_utils import FrameLevelMaskGenerator, VideoFrameSampler

    monkeypatch.chdir(tmp_path)
    mask_gen, sampler = FrameLevelMaskGenerator(), VideoFrameSampler()
    mask = mask_gen.create_causal_frame_mask(4, 3)
    path = mask_gen.visualize_mask(mask, title="My Frame Mask")
    assert path == Path("my_frame_mask.png")
    assert (tmp_path / "my_frame_mask.png").read_bytes().startswith(b"\x89PNG")
    video = torch.arange(16).unsqueeze(0).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1).expand(1, 16, 3, 224, 224).float()
    fast, slow = sampler.sample_fast_slow_frames(video, num_fast=4, num_slow=4)
    assert fast[0, :, 0, 0, 0].tolist() == [12, 13, 14, 15]
    assert slow[0, :, 0, 0, 0].tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("title", "name"),
    [("A  Mask: T=16/P=4!", "a_mask_t_16_p_4.png"), ("../../etc/x", "etc_x.png"), ("", "frame_mask.png")],
)
def test_a_title_never_leaves_the_folder(
    title: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from framestream.model.video_frame_utils import FrameLevelMaskGenerator

    monkeypatch.chdir(tmp_path)
    assert FrameLevelMaskGenerator.visualize_mask(torch.eye(3, dtype=torch.bool), title) == Path(name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_drawing_leaves_no_pyplot_behind(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch; from framestream.model.video_frame_utils import FrameLevelMaskGenerator as G;"
        "G.visualize_mask(torch.eye(2).bool(), 'x'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_slow_stride_acts_where_the_clip_is_long_enough() -> None:
    from framestream.model.video_frame_utils import VideoFrameSampler

    video = torch.arange(64.0).view(1, 64, 1, 1, 1)
    for stride in (2, 4, 8):
        _, slow = VideoFrameSampler.sample_fast_slow_frames(video, slow_stride=stride)
        assert slow.flatten().tolist() == [64 - stride * (8 - k) for k in range(8)]


def test_errors_name_what_was_given() -> None:
    from framestream.model.video_frame_utils import (
        FrameLevelMaskGenerator,
        VideoFrameSampler,
        create_frame_position_ids,
    )

    video = torch.zeros(1, 4, 3, 2, 2)
    with pytest.raises(ConfigError, match=r"num_frames must be .*0"):
        create_frame_position_ids(0, 2)
    with pytest.raises(ConfigError, match=r"num_slow_frames must be"):
        FrameLevelMaskGenerator.create_fast_slow_frame_mask(2, -1, 2)
    with pytest.raises(ConfigError, match=r"window_size"):
        FrameLevelMaskGenerator.create_sliding_window_frame_mask(2, 2, window_size=0)
    with pytest.raises(ConfigError, match=r"num_fast must be"):
        VideoFrameSampler.sample_fast_slow_frames(video, num_fast=0)
    with pytest.raises(ConfigError, match=r"\[B, T, C, H, W\], got \[4, 3, 2, 2\]"):
        VideoFrameSampler.sample_fast_slow_frames(video[0])
    with pytest.raises(ConfigError, match=r"'concat' or 'interleave', got 'zip'"):
        VideoFrameSampler.merge_fast_slow_frames(video, video, "zip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"agree in all but their number"):
        VideoFrameSampler.merge_fast_slow_frames(video, video[..., :1])
    with pytest.raises(ConfigError, match=r"mask \[N, N\], got \[2, 3\]"):
        FrameLevelMaskGenerator.visualize_mask(torch.zeros(2, 3))
