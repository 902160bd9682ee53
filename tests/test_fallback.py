"""One reader first and another for what it cannot decode, with real readers that refuse, fail and are killed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from framestream.pipeline import fallback as module
from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.errors import ConfigError, DecodeError
from framestream.pipeline.fallback import FallbackDecoder
from framestream.pipeline.isolation import helper
from framestream.pipeline.probe import probe_video
from framestream.pipeline.shards import ShardWriter

from loader_setup import keys, make_loader
from synthetic import damaged, read_indices
from video_kinds import KINDS

REFUSED = {  # by Decord and by TorchCodec, and the word that says why
    "h264 open gop": "afresh",
    "h264 ts": "mpegts",
    "h264 avi": "avi",
}
FINE = ("h264 b-frames", "h264 gop 16 mkv", "vp9 webm")


@pytest.fixture(autouse=True)
def _told_nothing() -> None:
    module._told.clear()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: KINDS[kind].make(folder).read_bytes() for kind in (*REFUSED, *FINE)}


@pytest.fixture(params=["decord", "torchcodec"])
def preferred(request: pytest.FixtureRequest) -> str:
    if available_backends()[request.param]:
        pytest.skip(available_backends()[request.param])
    return request.param


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_at_opening_is_decoded_by_the_other(
    videos: dict[str, bytes], kind: str, preferred: str
) -> None:
    with pytest.raises(DecodeError, match=REFUSED[kind]):  # by name it stays an error
        open_decoder(videos[kind], backend=preferred)
    with open_decoder(videos[kind], backend=preferred, fallback="pyav", short_side=64, name="clip 3") as decoder:
        assert decoder.backend == "pyav"
        assert REFUSED[kind] in decoder.fallback
        assert "clip 3" not in decoder.fallback
        assert decoder.num_frames == 48
        assert len(decoder.timestamps) == 48
        assert decoder.key_frames[0] == 0
        assert decoder.fps == 24
        assert read_indices(decoder.frames_at([40, 3, 3])) == [40, 3, 3]


@pytest.mark.parametrize("kind", FINE)
def test_what_is_not_refused_stays_where_it_was(videos: dict[str, bytes], kind: str, preferred: str) -> None:
    with open_decoder(videos[kind], backend=preferred, fallback="pyav") as decoder:
        assert read_indices(decoder.frames_at([40, 3])) == [40, 3]
        assert (decoder.backend, decoder.fallback) == (preferred, "")


@pytest.fixture
def stuck_decord() -> Iterator[None]:
    """Decord's process does not answer: what its reader then raises comes from `frames_at`, as a GPU's would."""
    if available_backends()["decord"]:
        pytest.skip(available_backends()["decord"])
    yield
    helper().close()


def test_what_fails_later_is_decoded_by_the_other(clip: bytes, stuck_decord: None) -> None:
    options: dict[str, Any] = {"backend": "decord", "short_side": 64, "name": "clip 3", "timeout_s": 1.0}
    with open_decoder(clip, fallback="pyav", **options) as decoder:
        assert read_indices(decoder.frames_at([7])) == [7]
        assert decoder.backend == "decord"
        assert helper().pid is not None
        os.kill(helper().pid, signal.SIGSTOP)  # type: ignore[arg-type]
        assert read_indices(decoder.frames_at([40, 3])) == [40, 3]
        assert decoder.fallback == "Decord's process took longer than 1 s while decoding it."
        assert read_indices(decoder.frames_at([5])) == [5]  # and it stays so for this video
        assert decoder.backend == "pyav"
    with open_decoder(clip, fallback="pyav", **options) as decoder:
        assert read_indices(decoder.frames_at([7])) == [7]
        assert (decoder.backend, decoder.fallback) == ("decord", "")


def test_a_reader_that_dies_is_followed_by_the_other(clip: bytes, stuck_decord: None) -> None:
    with open_decoder(clip, backend="decord", fallback="pyav", short_side=64) as decoder:
        decoder.frames_at([7])
        pid = helper().pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that it is under way when it dies
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        assert read_indices(decoder.frames_at([40, 3])) == [40, 3]
        assert decoder.fallback.startswith("Decord's process was ended by SIGKILL")


def test_damage_is_an_error_of_both_and_no_fallback(
    clip: bytes, preferred: str, caplog: pytest.LogCaptureFixture
) -> None:
    for broken in (clip[:2000], damaged(clip, "random", 1), b"no video" * 99):
        with pytest.raises(DecodeError, match=r"^clip 3: "):
            open_decoder(broken, backend=preferred, fallback="pyav", name="clip 3").frames_at([47])
    assert not caplog.records


def test_frames_outside_the_video_are_an_error_all_the_same(clip: bytes, preferred: str) -> None:
    with (
        open_decoder(clip, backend=preferred, fallback="pyav", name="clip 3") as decoder,
        pytest.raises(DecodeError, match="clip 3: frame 48 was asked for, but it has 48 frames"),
    ):
        decoder.frames_at([48])


def test_each_reason_is_said_once(videos: dict[str, bytes], preferred: str, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        for kind in REFUSED:
            open_decoder(videos[kind], backend=preferred, fallback="pyav", name=f"clip {number}").frames_at([0])
    assert len(caplog.records) == len(REFUSED)
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert "pyav" in caplog.text
    assert "cpu_fallbacks" in caplog.text
    assert all(word in caplog.text for word in REFUSED.values())


def test_a_fallback_that_is_unknown_or_the_same(clip: bytes) -> None:
    with pytest.raises(ConfigError, match="'vlc' is unknown"):
        open_decoder(clip, backend="pyav", fallback="vlc")
    with open_decoder(clip, backend="pyav", fallback="pyav") as decoder:
        assert not isinstance(decoder, FallbackDecoder)


def test_frames_come_to_one_device(videos: dict[str, bytes], clip: bytes, preferred: str) -> None:
    """Whoever decodes them; here to the device that every machine has beside the CPU."""

    def opened(data: bytes) -> FallbackDecoder:
        return FallbackDecoder(
            lambda: open_decoder(data, backend=preferred),
            lambda: open_decoder(data, backend="pyav"),
            device=torch.device("meta"),
        )

    frames = opened(videos["h264 ts"]).frames_at([3, 4])
    assert (frames.device.type, frames.shape) == ("meta", (2, 3, 96, 160))
    assert opened(clip).frames_at([3]).device.type == "cpu"  # the reader's own, wherever that puts them


# -- through the loader --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(videos: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips, six of a kind that Decord and TorchCodec refuse, and one that nobody can decode."""
    folder = tmp_path_factory.mktemp("mixed")
    order = [kind for pair in zip(REFUSED, FINE, strict=True) for kind in pair] * 2
    suffixes = {"mkv": "mkv", "ts": "ts", "avi": "avi", "webm": "webm"}
    with ShardWriter(folder, prefix="clips", samples_per_shard=5) as writer:
        for number, kind in enumerate(order):
            suffix = suffixes.get(kind.split()[-1], "mp4")
            writer.write(f"clip-{number:04d}", videos[kind], suffix, probe_video(videos[kind]).to_json(), kind)
        good = videos["h264 b-frames"]
        info = probe_video(good).to_json()
        writer.write("clip-9999", good[: len(good) // 2], "mp4", info, "cut")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 1},
        {"decode_on": "trainer", "decode_threads": 3},
        {"decode_on": "trainer", "decode_threads": 2, "num_workers": 1},
    ],
    ids=str,
)
def test_what_the_reader_lacks_costs_no_sample(mixed: Path, preferred: str, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"max_reject_share": 1.0, "image_size": 64, "drop_last": False, **options}
    reference = make_loader(mixed, decoder="pyav", max_reject_share=1.0, image_size=64, drop_last=False)
    expected = list(reference)
    alone = make_loader(mixed, decoder=preferred, **settings)
    list(alone)
    assert alone.stats()["rejects"] >= 7  # a backend that was asked for by name raises
    assert alone.stats()["cpu_fallbacks"] == 0
    alone.close()

    loader = make_loader(mixed, decoder=preferred, **settings)
    loader._maker.source.transform.fallback = "pyav"  # what "auto" sets where it takes a GPU's reader
    batches = list(loader)
    assert keys(batches) == keys(expected)
    refused = 0
    for batch in batches:
        for row, frames in enumerate(batch["video_frames"]):
            assert read_indices(frames) == batch["frame_index"][row].tolist()
            refused += batch["text"][row] in REFUSED
    stats = loader.stats()
    assert stats["rejects"] == reference.stats()["rejects"] == 1
    assert stats["cpu_fallbacks"] == refused >= 6
    loader.close()


def test_on_the_cpu_nothing_falls_back(mixed: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for decoder in ("auto", "pyav"):
        assert make_loader(mixed, decoder=decoder)._maker.source.transform.fallback is None
