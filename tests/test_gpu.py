"""Decoding on the GPU. None of this runs without one; docs/gpu.md lists each test and what it shows.

Where a GPU is but its video engine is not, or no reader works on it, the tests say why and are skipped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framestream.pipeline.decode import GPU_BACKENDS, available_backends, choose_backend, open_decoder
from framestream.pipeline.errors import ConfigError, DecodeError
from framestream.pipeline.loader import GPU_DECODE_THREADS
from framestream.pipeline.probe import probe_video
from framestream.pipeline.shards import ShardWriter
from framestream.pipeline.trainer_side import READ_AHEAD
from framestream.pipeline.video_engine import video_engine

from loader_setup import make_loader, write_shards
from soak_setup import MB, own_memory
from synthetic import make_video, read_indices
from video_kinds import KINDS

pytestmark = pytest.mark.gpu

# By how much pixels may differ from those of the CPU's reader, of 255, on average over all pixels of a clip. The
# pictures inside the codec are the same bit for bit: H.264, HEVC, VP8, VP9, AV1 and MPEG-4 say exactly what comes out.
# What may differ is how 4:2:0 is brought to RGB (we interpolate chroma, GPU readers repeat it) and how it is resized.
# Readers of the CPU that repeat chroma differ from ours by 1.0 to 2.4, and by 2.9 where the picture is interlaced.
TOLERANCE = 4.0
# And a whole channel on average, where such differences cancel out, by 0.0 to 1.7: a wrong range or colour matrix,
# which `TOLERANCE` alone might let pass on a pale picture, shifts a channel by more.
CHANNEL_TOLERANCE = 2.5

# Beyond what most video engines decode. A reader may decode them all the same; then there is nothing to fall back from.
BEYOND = {"h264 4:2:2 10 bit": "yuv422p10le", "h264 4:4:4": "yuv444p", "h264 4:4:4 10 bit": "yuv444p10le"}


@pytest.fixture(params=GPU_BACKENDS)
def reader(request: pytest.FixtureRequest) -> str:
    reason = available_backends()[request.param]
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def auto() -> str:
    """The GPU reader that "auto" takes."""
    chosen, reason = choose_backend("auto")
    if chosen not in GPU_BACKENDS:
        pytest.skip(reason)
    return chosen


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        made[name] = kind.make(tmp_path_factory.mktemp(f"kind{number}")).read_bytes()
    return made


@pytest.fixture(scope="session")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("beyond")
    return {
        kind: make_video(folder / f"{number}.mp4", pix_fmt=pix_fmt).read_bytes()
        for number, (kind, pix_fmt) in enumerate(BEYOND.items())
    }


def gpu_loader(shards: Path, **options: Any) -> Any:
    return make_loader(shards, **{"device": "cuda", "decode_on": "trainer", **options})


def on_cpu(batches: Any) -> list[dict[str, Any]]:
    """Batches as they were, safe from what comes later."""
    return [
        {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        for a, b in zip(one, other, strict=True)
        for name in a
    )


def close(frames: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the tolerances above. Both uint8 [n, 3, H, W]."""
    apart = frames.cpu().float() - expected.float()
    return bool(apart.abs().mean() <= TOLERANCE and apart.mean((0, 2, 3)).abs().max() <= CHANNEL_TOLERANCE)


def frames_or_reason(data: bytes, reader: str, side: int | None, wanted: list[int]) -> torch.Tensor | str:
    try:
        with open_decoder(data, backend=reader, short_side=side) as decoder:
            return decoder.frames_at(wanted)
    except DecodeError as err:
        return str(err)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


class Counting:
    """A hook that counts clips and notes where their frames are."""

    def __init__(self) -> None:
        self.clips, self.devices, self.lock = 0, set(), threading.Lock()

    def __call__(self, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with self.lock:
            self.clips += 1
            self.devices.add((frames.device.type, torch.cuda.current_stream() == torch.cuda.default_stream()))
        return frames


# -- the engine and its readers ------------------------------------------------------------------------------


def test_the_driver_says_what_the_video_engine_decodes() -> None:
    found = video_engine(torch.cuda.current_device())
    if found.why_not:
        pytest.skip(f"the video engine is not visible: {found.why_not}")
    assert "h264 4:2:0 8 bit" in found.formats
    assert found.engines >= 0


def test_every_frame_is_the_one_asked_for_and_looks_as_on_the_cpu(videos: dict[str, bytes], reader: str) -> None:
    """Or the kind is refused, in a sentence naming the reader that gets it right. Says all that is wrong at once."""
    wrong = {kind: what for kind in KINDS if (what := fault(videos[kind], KINDS[kind].shown, reader))}
    assert not wrong


def fault(data: bytes, shown: Sequence[int], reader: str) -> str:
    """What a reader gets wrong of a video whose frames carry the indices `shown`; "" where it is right, or refuses."""
    count = len(shown)
    mixed = np.random.default_rng(0).integers(0, count, 16).tolist()
    for side in (64, None):
        with open_decoder(data, backend="pyav", short_side=side) as ours:
            expected = ours.frames_at(range(count))
        for wanted in (mixed, sorted(mixed), [count - 1, 0, 0], [0], [count - 1], list(range(count))):
            frames = frames_or_reason(data, reader, side, wanted)
            if isinstance(frames, str):
                if "use the decoder pyav" not in frames and "on the GPU" not in frames:
                    return frames
                continue
            if not frames.is_cuda or frames.dtype != torch.uint8:
                return f"{frames.dtype} on {frames.device}"
            try:
                found = read_indices(frames)
            except ValueError as err:
                return str(err)
            if found != [shown[index] for index in wanted]:
                return f"frames {found} for {wanted}"
            if not close(frames, expected[wanted]):
                apart = frames.cpu().float() - expected[wanted].float()
                return f"pixels differ by {apart.abs().mean():.1f}, channels by {apart.mean((0, 2, 3)).tolist()}"
    return ""


def test_one_decoder_goes_back_and_forth(clip: bytes, reader: str) -> None:
    with open_decoder(clip, backend=reader) as decoder:
        for index in (40, 3, 47, 0, 12, 11):
            assert read_indices(decoder.frames_at([index])) == [index]


# -- what the hardware lacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BEYOND)
def test_what_the_hardware_lacks_is_decoded_on_the_cpu_and_comes_to_the_gpu(
    beyond: dict[str, bytes], kind: str, auto: str
) -> None:
    with open_decoder(beyond[kind], backend="pyav", short_side=64) as ours:
        expected = ours.frames_at([40, 3, 3])
    with open_decoder(beyond[kind], backend="auto", short_side=64) as decoder:
        frames = decoder.frames_at([40, 3, 3])
        assert frames.is_cuda
        assert read_indices(frames) == [40, 3, 3]
        if decoder.backend == "pyav":
            assert decoder.fallback
            assert torch.equal(frames.cpu(), expected)
        else:
            assert close(frames, expected)


@pytest.fixture(scope="module")
def mixed(
    videos: dict[str, bytes], beyond: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """Clips of every kind, those beyond the hardware among them, and one that nobody can decode."""
    folder = tmp_path_factory.mktemp("mixed")
    clips = {kind: data for kind, data in {**videos, **beyond}.items() if probe_video(data).num_frames >= 8}
    with ShardWriter(folder, prefix="clips", samples_per_shard=9) as writer:
        for number, (kind, data) in enumerate(clips.items()):
            words = kind.split()
            suffix = next((word for word in ("mkv", "ts", "avi", "webm", "mov") if word in words), "mp4")
            writer.write(f"clip-{number:04d}", data, suffix, probe_video(data).to_json(), kind)
        good = videos["h264 b-frames"]
        writer.write("clip-9999", good[: len(good) // 2], "mp4", probe_video(good).to_json(), "cut")
    return folder, len(clips) + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_mixed_kinds_is_on_one_device_and_costs_no_sample(
    mixed: tuple[Path, int], auto: str, workers: int
) -> None:
    settings: dict[str, Any] = {"max_reject_share": 1.0, "drop_last": False, "batch_size": 4}
    hook = Counting()
    loader = gpu_loader(mixed[0], num_workers=workers, transform=hook, **settings)
    reference = make_loader(mixed[0], decoder="pyav", device="cpu", **settings)
    for batch, expected in zip(loader, reference, strict=True):
        assert batch["video_frames"].is_cuda
        assert batch["keys"] == expected["keys"]
        assert torch.equal(batch["frame_index"], expected["frame_index"])
        for frames, ours in zip(batch["video_frames"], expected["video_frames"], strict=True):
            assert close(frames, ours)
    stats = loader.stats()
    assert stats["rejects"] == reference.stats()["rejects"] == 1
    assert stats["cpu_fallbacks"] >= 3  # ts, avi, open GOPs
    assert stats["samples"] == mixed[1]
    # Hooks work on the GPU, off the default stream, whoever has decoded.
    assert hook.devices == {("cuda", False)}
    loader.close()


def test_a_reader_that_was_asked_for_by_name_rejects_instead(mixed: tuple[Path, int], reader: str) -> None:
    loader = gpu_loader(mixed[0], decoder=reader, max_reject_share=1.0, drop_last=False)
    list(loader)
    stats = loader.stats()
    assert stats["rejects"] > 1
    assert stats["cpu_fallbacks"] == 0


# -- beside the training step --------------------------------------------------------------------------------


def test_gpu_readers_decode_on_the_training_side_in_several_threads(shards: Path, reader: str) -> None:
    loader = gpu_loader(shards, decoder=reader, num_workers=1, decode_on="auto")
    assert (loader.decode_on, loader.decode_threads) == ("trainer", GPU_DECODE_THREADS)
    assert gpu_loader(shards, decoder=reader, decode_threads=2).decode_threads == 2
    with pytest.raises(ConfigError, match="worker processes cannot share the GPU"):
        gpu_loader(shards, decoder=reader, decode_on="workers")


def test_several_engines_give_the_same_stream_as_one(damaged: Path, reader: str) -> None:
    """Four threads against one, for two epochs: frames bit for bit, spares, rejects, state and counters."""
    settings: dict[str, Any] = {
        "decoder": reader,
        "max_reject_share": 0.5,
        "random_end": True,
        "normalize": (0.5, 0.2),
    }
    one = gpu_loader(damaged, decode_threads=1, **settings)
    four = gpu_loader(damaged, decode_threads=4, num_workers=2, **settings)
    for _ in range(2):
        assert same(on_cpu(four), on_cpu(one))
        assert four.state_dict() == one.state_dict()
    for name in ("samples", "rejects", "spares", "batches"):
        assert four.stats()[name] == one.stats()[name]
    assert one.stats()["rejects"] > 0
    four.close()


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_plan_while_the_training_process_decodes(damaged: Path, reader: str, context: str) -> None:
    """Also after the training process has used the GPU, before the workers start."""
    torch.ones(8, device="cuda").sum().item()
    settings: dict[str, Any] = {"decoder": reader, "max_reject_share": 0.5, "pin_memory": True}
    alone = gpu_loader(damaged, **settings)
    loader = gpu_loader(damaged, num_workers=2, multiprocessing_context=context, **settings)
    for _ in range(2):
        assert same(on_cpu(loader), on_cpu(alone))
    assert loader.stats()["worker_restarts"] == 0
    loader.close()


def test_decoding_goes_on_while_the_training_thread_is_busy(shards: Path, reader: str) -> None:
    hook = Counting()
    loop = iter(gpu_loader(shards, decoder=reader, transform=hook))
    next(loop)  # and from here on the training thread asks for nothing
    assert until(lambda: hook.clips >= (1 + READ_AHEAD) * 2)
    assert len(list(loop)) == 5


def test_decoding_goes_on_while_the_gpu_is_busy_with_the_step(shards: Path, auto: str) -> None:
    """The next batches are all there before a kernel of the step, that was launched earlier, has ended."""
    if auto == "decord-gpu":
        pytest.skip("Decord does not say on which stream it works, so that the whole device has to be waited for")
    hook = Counting()
    loader = gpu_loader(shards, transform=hook)
    list(loader)  # takes its memory and opens its decoders, for which the driver may wait for the whole device
    hook.clips = 0
    loop = iter(loader)
    next(loop)
    step = torch.cuda.Event()
    torch.cuda._sleep(20_000_000_000)  # some ten seconds
    step.record()
    assert until(lambda: hook.clips >= (1 + READ_AHEAD) * 2, 60)
    assert not step.query()
    step.synchronize()
    assert len(list(loop)) == 5


def test_a_batch_that_a_kernel_still_reads_is_not_written_over(shards: Path, reader: str) -> None:
    """Its memory may go to the next clips only when the step is done with it, although nobody holds it any more."""
    expected = on_cpu(gpu_loader(shards, decoder=reader))
    copies = []
    for batch in gpu_loader(shards, decoder=reader):
        torch.cuda._sleep(400_000_000)  # the copy after it is read late
        copies.append(batch["video_frames"].clone())
        del batch
    for copy, batch in zip(copies, expected, strict=True):
        assert torch.equal(copy.cpu(), batch["video_frames"])


def test_masks_are_ready_on_the_gpu_when_a_batch_comes(shards: Path, auto: str) -> None:
    batch = next(iter(gpu_loader(shards, attention_backend="flex")))
    mask = batch["frame_mask"].block_mask(torch.device("cuda", torch.cuda.current_device()))
    assert mask.kv_num_blocks.is_cuda
    assert batch["frame_mask"].block_mask(torch.device("cuda", torch.cuda.current_device())) is mask


def test_normalising_happens_on_the_gpu(shards: Path, reader: str) -> None:
    settings: dict[str, Any] = {"normalize": ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))}
    batch = next(iter(gpu_loader(shards, decoder=reader, **settings)))
    expected = next(iter(make_loader(shards, decoder="pyav", device="cpu", **settings)))
    assert batch["video_frames"].is_cuda
    assert batch["video_frames"].dtype == torch.float32
    assert (batch["video_frames"].cpu() - expected["video_frames"]).abs().mean() < TOLERANCE / 255 / 0.2


# -- errors, ends and memory ---------------------------------------------------------------------------------


def test_damage_costs_its_own_samples_only(tmp_path: Path, auto: str) -> None:
    folder = write_shards(tmp_path, 12, 4, bad={2, 9})
    loader = gpu_loader(folder, max_reject_share=1.0, drop_last=False)
    reference = make_loader(folder, decoder="pyav", device="cpu", max_reject_share=1.0, drop_last=False)
    assert [batch["keys"] for batch in loader] == [batch["keys"] for batch in reference]
    assert loader.stats()["rejects"] == reference.stats()["rejects"] > 0


def test_no_thread_is_left_behind(shards: Path, reader: str) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("framestream")]

    loader = gpu_loader(shards, decoder=reader)
    loop = iter(loader)
    next(loop)
    assert threads()
    loop.close()  # type: ignore[attr-defined]
    assert not threads()
    list(loader)
    assert not threads()


def test_memory_is_flat_on_the_gpu_and_beside_it(shards: Path, reader: str) -> None:
    """60 epochs of 12 clips: what the last half adds."""
    loader = gpu_loader(shards, decoder=reader)
    rows = []
    for _ in range(60):
        for _batch in loader:
            pass
        torch.cuda.synchronize()
        free, whole = torch.cuda.mem_get_info()
        rows.append((whole - free, own_memory()))
    device, host = (max(values[45:]) - max(values[15:30]) for values in zip(*rows, strict=True))
    assert device < 64 * MB
    assert host < 64 * MB
