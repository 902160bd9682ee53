"""Every reader against every kind of video: the frames asked for, or a reason that names the reader which has them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.probe import VideoInfo, probe_video

from colour_reference import CASES, ColourCase, write
from conformance import (
    REASONS,
    REFUSED,
    TOLERANCE,
    check,
    check_colour,
    expected,
    expected_colour,
    refusal_of,
)
from conformance_page import PAGE, cells_of
from synthetic import read_indices
from video_kinds import KINDS, SECTIONS

Videos = Callable[[str], bytes]


def usable(backend: str) -> str:
    reason = available_backends()[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return backend


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    """The bytes of a kind's clip, made when they are first wanted."""
    return functools.cache(lambda kind: KINDS[kind].make(tmp_path_factory.mktemp("kind")).read_bytes())


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_the_one_asked_for(videos: Videos, kind: str, reader: str) -> None:
    check(videos(kind), kind, usable(reader))


def test_torchcodec_returns_the_frames_asked_for(videos: Videos) -> None:
    usable("torchcodec")
    for kind in KINDS:
        check(videos(kind), kind, "torchcodec")


@pytest.mark.parametrize("kind", KINDS)
def test_however_a_frame_is_reached_its_pixels_are_the_same(videos: Videos, kind: str) -> None:
    """Played, sought, by the index of packets that shards carry, and by whatever reader "auto" takes."""
    data, shown = videos(kind), KINDS[kind].shown
    count = len(shown)
    wanted = sorted({0, count // 3, count // 2, max(0, count - 2), count - 1})
    with open_decoder(data, backend="pyav") as decoder:
        played = decoder.frames_at(range(count))[wanted]
    for frame, index in zip(played, wanted, strict=True):
        with open_decoder(data, backend="pyav") as decoder:
            assert torch.equal(decoder.frames_at([index])[0], frame)
    with open_decoder(data, backend="pyav", info=indexed(data)) as decoder:
        assert torch.equal(decoder.frames_at(wanted), played)
    with open_decoder(data, short_side=64) as decoder:
        assert read_indices(decoder.frames_at(wanted)) == [shown[index] for index in wanted]


def indexed(data: bytes) -> VideoInfo:
    """What a shard says about a video."""
    return VideoInfo.from_json(json.loads(json.dumps(probe_video(data, packets=True).to_json())))


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
def test_what_is_refused_does_not_depend_on_the_index(videos: Videos, reader: str) -> None:
    usable(reader)
    for kind in KINDS:
        reason = expected(kind, reader)
        if reason in ("", "fails"):
            continue
        with pytest.raises(DecodeError, match=REASONS[reason]):
            open_decoder(videos(kind), backend=reader, info=indexed(videos(kind)))


def test_kinds_without_an_index_are_few(videos: Videos) -> None:
    """Containers that cut frames into pieces, orders that nothing tells, and codecs that lean on their container."""
    lacking = {kind for kind in KINDS if indexed(videos(kind)).packets is None}
    for kind in lacking:
        assert any(word in kind for word in ("ts", "avi", "twice", "part", "whole gops", "holds", "two videos")) or (
            kind.split()[0] in ("mpeg4", "mpeg2", "mjpeg", "prores", "dnxhr", "ffv1")
        ), kind
    assert len(lacking) < len(KINDS) / 2


# -- colours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("name", CASES)
def test_colours_are_those_of_the_standard(tmp_path: Path, name: str, reader: str) -> None:
    case = CASES[name]
    check_colour(write(case, tmp_path / f"clip{case.suffix}").read_bytes(), case, usable(reader))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.codec != "ffv1"])
def test_an_index_keeps_the_colours(tmp_path: Path, name: str) -> None:
    data = write(CASES[name], tmp_path / f"clip{CASES[name].suffix}").read_bytes()
    info = indexed(data)
    assert info.packets is not None
    with open_decoder(data, backend="pyav") as scanned, open_decoder(data, backend="pyav", info=info) as decoder:
        assert torch.equal(decoder.frames_at([1]), scanned.frames_at([1]))


@pytest.mark.parametrize("number", [8, 10, 12, 14])  # YCgCo, BT.2020 of constant luminance, by primaries, ICtCp
def test_a_matrix_that_nobody_converts_by_is_refused(tmp_path: Path, number: int) -> None:
    case = ColourCase("bt709", False, "yuv444p10le")
    data = write(case, tmp_path / "clip.mp4", tag=number).read_bytes()
    with (
        open_decoder(data, backend="pyav", name="clip 3") as decoder,
        pytest.raises(DecodeError, match=f"matrix number {number} of H.273"),
    ):
        decoder.frames_at([0])
    for reader in ("decord", "torchcodec"):
        if not available_backends()[reader]:
            assert f"matrix is number {number} of H.273" in refusal_of(data, reader)


# -- the page --------------------------------------------------------------------------------------------


def test_the_page_says_what_these_tests_expect() -> None:
    cells = cells_of(PAGE.read_text())
    assert list(cells) == [*KINDS, *CASES]
    for kind in KINDS:
        for reader in REFUSED:
            reason = expected(kind, reader)
            assert cells[kind][reader] == (f"refused: {reason}" if reason else "exact"), (kind, reader)
    for case in CASES.values():
        for reader in REFUSED:
            check_cell(cells[case.name][reader], case, reader)


def check_cell(cell: str, case: ColourCase, reader: str) -> None:
    reason = expected_colour(case, reader)
    if reason:
        assert cell == f"refused: {reason}"
        return
    mean, worst = map(float, cell.split(" / "))
    assert mean <= TOLERANCE[reader][0]
    assert worst <= TOLERANCE[reader][1]


def test_every_refusal_is_of_a_kind_that_there_is() -> None:
    assert sum(len(section) for section in SECTIONS.values()) == len(KINDS)
    for reasons in REFUSED.values():
        refused = [kind for kinds in reasons.values() for kind in kinds]
        assert set(refused) <= set(KINDS)
        assert len(set(refused)) == len(refused)
        assert set(reasons) <= set(REASONS)
