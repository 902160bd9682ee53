"""Probing sources and making clips of them: what is found, what is written, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import ConfigError, DecodeError, SampleError
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_writer import TarShard
from framestream.tools import probing, source_file
from framestream.tools.clips import Clip
from framestream.tools.inputs import Source
from framestream.tools.making import ClipTask, MadeClip, encoder_version, make_clip
from framestream.tools.pool import WorkerPool
from framestream.tools.probing import Probed, ProbeTask, probe_source
from framestream.tools.shard_options import Decode, Encoding, ShardOptions
from framestream.tools.shard_run import build_shards
from framestream.tools.verify_set import verify_folder
from framestream.tools.whole_file import BLOCK_BYTES, WholeFile

from clips_setup import beeping
from remux import Track, remux, set_edits, set_matrix
from shard_setup import samples
from synthetic import make_video, read_indices, trim_by_copy
from video_kinds import KINDS


def source_of(path: Path, **more: Any) -> Source:
    return Source(str(path), path.name, "key", size=path.stat().st_size, **more)


def probed(path: Path, **more: Any) -> Probed:
    return probe_source(ProbeTask(source_of(path, **more), None, Remote()))


def task_of(
    path: Path,
    frames: tuple[int, int] | None = None,
    *,
    encode: bool = False,
    encoding: Encoding | None = None,
    **more: Any,
) -> ClipTask:
    source = source_of(path, **more)
    info = probe_source(ProbeTask(source, None, Remote())).info
    times = [*info.times(), info.duration]
    start, end = (times[frames[0]], times[frames[1]]) if frames else (0.0, info.duration)
    return ClipTask(Clip(source, "key", start, end, frames), info, encode, encoding or Encoding(gop=8), Remote())


def all_of(made: MadeClip) -> dict[str, bytes]:
    """All members, as they are written."""
    return {
        ext: member if isinstance(member, bytes) else b"".join(map(bytes, member.blocks()))
        for ext, member in made.members.items()
    }


def whole_of(made: MadeClip) -> WholeFile:
    (whole,) = (member for member in made.members.values() if isinstance(member, WholeFile))
    return whole


def said_of(made: MadeClip) -> VideoInfo:
    return VideoInfo.from_json(json.loads(made.members["json"]))  # type: ignore[arg-type]


def video_of(made: MadeClip) -> tuple[str, bytes, dict[str, Any]]:
    """Extension, bytes and metadata of the video in a sample."""
    members = all_of(made)
    (ext,) = members.keys() - {"json", "txt"}
    return ext, members[ext], json.loads(members["json"])


def indices(made: MadeClip) -> list[int]:
    _, data, meta = video_of(made)
    with open_decoder(data, backend="pyav", info=VideoInfo.from_json(meta)) as decoder:
        return read_indices(decoder.frames_at(range(decoder.num_frames)))


# --- probing ----------------------------------------------------------------------------------------------------


_SOME = (
    "h264 variable rate",
    "h264 ts",
    "h264 rotated 90",
    "h264 b-frames",
    "h264 no b-frames",
    "hevc open gop",
    "vp9 webm",
)


@pytest.mark.parametrize(
    "name", [each if each in _SOME else pytest.param(each, marks=pytest.mark.slow) for each in KINDS]
)
def test_probing_says_what_probe_video_says(tmp_path: Path, name: str) -> None:
    """Although it opens the file without decoding anything: of frames, colours and packets alike."""
    path = KINDS[name].make(tmp_path)
    task = ProbeTask(source_of(path), None, Remote(), whole=True)
    expected = probe_video(path, packets=True)
    for decode in get_args(Decode):
        found = probe_source(replace(task, decode=decode))
        assert found.info == expected
        assert found.info.packets == expected.packets
        assert found.content == probe_source(replace(task, whole=False)).content
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size == path.stat().st_size
    assert found.scenes == ()
    short = probe_source(replace(task, whole=False))
    assert (short.info.packets, short.sha256) == (None, "")


def test_what_is_decoded_is_what_is_found_broken(tmp_path: Path) -> None:
    """The first picture, or one in the middle, is damaged behind its head, where only decoding tells."""
    path = make_video(tmp_path / "a.mp4", num_frames=24, gop=8, b_frames=0, size=(320, 192))
    places = probe_video(path, packets=True).packets
    assert places is not None
    whole = path.read_bytes()
    for packet, found_by in ((0, {"first", "all"}), (8, {"all"}), (None, set())):
        data = bytearray(whole)
        if packet is not None:
            start, size = int(places.offset[packet]), int(places.size[packet])
            assert size > 2000
            data[start + size - 1000 : start + size] = bytes(range(1, 251)) * 4
        path.write_bytes(data)
        for decode in get_args(Decode):
            task = ProbeTask(source_of(path), None, Remote(), decode=decode)
            with pytest.raises(SampleError, match=r"a\.mp4") if decode in found_by else nullcontext():
                assert probe_source(task).info.num_frames == 24


def test_a_head_of_which_no_frame_comes_does_not_decide(tmp_path: Path) -> None:
    """The decoder that saw it takes heads only; another one decodes the picture."""
    path = make_video(tmp_path / "a.mp4", num_frames=8)

    def none_of(table: Any) -> Any:
        raise DecodeError("its head is of no use")

    expected = probed(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "head_frame", none_of)
        assert probe_source(ProbeTask(source_of(path), None, Remote(), decode="none")) == expected


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_content_is_that_of_the_pictures(tmp_path: Path, codec: str) -> None:
    path = make_video(tmp_path / "a.mp4", codec=codec, audio=True, num_frames=24)
    same = [
        remux(tmp_path / "b.mkv", Track(path)),
        remux(tmp_path / "c.mp4", Track(path), metadata={"title": "another"}),
        remux(tmp_path / "d.mp4", Track(path), Track(path, "audio"), container_options={"movflags": "faststart"}),
    ]
    others = [
        make_video(tmp_path / "e.mp4", codec=codec, first_index=1, num_frames=24),
        remux(tmp_path / "f.mp4", Track(path, skip=12)),
    ]
    content = probed(path).content
    assert len(content) == 64
    assert {probed(each).content for each in same} == {content}
    assert content not in {probed(each).content for each in others}


def test_content_tells_sizes_and_rates_apart(tmp_path: Path) -> None:
    """The packets alone do not: those of raw video are bytes of pixels."""
    grey = np.zeros((96, 160), np.uint8)
    contents = []
    for width, height, rate in ((160, 96, 24), (96, 160, 24), (160, 96, 48)):
        path = tmp_path / f"{width}-{rate}.avi"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("rawvideo", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "gray"
            for _ in range(4):
                frame = av.VideoFrame.from_ndarray(grey.reshape(height, width), format="gray")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        contents += [probe_source(ProbeTask(source_of(path), None, Remote(), exact=exact)).content for exact in (0, 1)]
    assert len(set(contents)) == 6


def test_an_edit_list_makes_other_content_of_the_same_packets(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "w.mp4")
    cut = [trim_by_copy(whole, tmp_path / f"{start}.mp4", start=start) for start in (14, 15)]
    assert len({probed(path).content for path in cut}) == 2


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("h264 mirrored", ".mov"), ("h264 rotated 90", ".mkv"), ("hevc open gop", ".mkv"), ("h264 variable rate", ".mkv")],
)
def test_turned_mirrored_and_uneven_videos_have_the_same_content_in_another_container(
    tmp_path: Path, name: str, suffix: str
) -> None:
    path = KINDS[name].make(tmp_path)
    copy = remux(tmp_path / f"copy{suffix}", Track(path))
    assert probed(copy).content == probed(path).content


def test_other_frames_of_the_same_packets_are_other_content(tmp_path: Path) -> None:
    """Parts cut out of one recording without encoding have all of its packets, and as many frames."""
    whole = make_video(tmp_path / "w.mp4", gop=48, b_frames=0)
    edits = [[(0, 24)], [(24, 24)], [(0, 14), (38, 10)], [(5, 9), (33, 15)]]
    parts = []
    for number, edit in enumerate(edits):
        part = tmp_path / f"{number}.mp4"
        part.write_bytes(whole.read_bytes())
        parts.append(probed(set_edits(part, edit)))
    assert {part.info.num_frames for part in parts} == {24}
    assert len({part.content for part in parts}) == len(parts)


def test_mirrored_pictures_are_other_content(tmp_path: Path) -> None:
    plain = make_video(tmp_path / "plain.mp4", num_frames=8)
    contents = []
    for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
        laid = tmp_path / f"{x}{y}.mp4"
        laid.write_bytes(plain.read_bytes())
        set_matrix(laid, (x << 16, 0, 0, 0, y << 16, 0, 0, 0, 1 << 30))
        contents.append(probed(laid).content)
    assert len(set(contents)) == 4


def test_a_pause_in_the_middle_is_other_content(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=24, b_frames=0)
    contents = []
    for name, late in (("even.mkv", 0.0), ("pause.mkv", 0.2)):
        with av.open(str(path)) as reader, av.open(str(tmp_path / name), "w") as writer:
            stream = writer.add_stream_from_template(reader.streams.video[0])
            packets = [packet for packet in reader.demux(reader.streams.video[0]) if packet.size]
            for number, packet in enumerate(packets):
                time = number / 24 if not late else number / 30 + late * (number >= 12)
                packet.pts = packet.dts = round(time / packet.time_base)
                packet.stream = stream
                writer.mux(packet)
        contents.append(probed(tmp_path / name).content)
    assert contents[0] == probed(path).content
    assert contents[0] != contents[1]


def test_text_comes_from_the_row_or_the_file_beside(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=4)
    (tmp_path / "a.txt").write_text(" a dog \n")
    assert probed(path).text is None
    assert probed(path, text_file=str(tmp_path / "a.txt")).text == "a dog"
    assert probed(path, text="a cat").text == "a cat"


def test_what_is_no_video_is_a_sample_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    for path in (tmp_path / "a.mp4",):
        with pytest.raises(SampleError, match=r"a\.mp4"):
            probed(path)
    gone = Source(str(tmp_path / "gone.mp4"), "gone.mp4", "key")
    with pytest.raises(SampleError, match=r"gone\.mp4"):
        probe_source(ProbeTask(gone, None, Remote()))


# --- copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h264 sound", "h264 ts", "h264 rotated 90", "h264 mirrored", "vp8 webm", "av1 mkv"])
def test_whole_files_are_copied_untouched_and_indexed(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    made = make_clip(task_of(path, text="a dog", user={"score": 3}))
    ext, data, meta = video_of(made)
    assert (ext, data) == (path.suffix[1:], path.read_bytes())
    assert all_of(made)["txt"] == b"a dog"
    info = probe_video(path, packets=True)
    assert {k: v for k, v in meta.items() if k in info.to_json()} == json.loads(json.dumps(info.to_json()))
    assert meta["sha256"] == hashlib.sha256(data).hexdigest()
    assert (meta["source"], meta["text"], meta["user"]) == (path.name, "a dog", {"score": 3})
    assert (meta["clip_start"], meta["clip_end"]) == (0.0, info.duration)
    assert made.seconds == info.duration
    assert VideoInfo.from_json(meta).packets == info.packets


def test_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=24)
    other = make_video(tmp_path / "b.mp4", num_frames=23)
    task = task_of(path)
    path.write_bytes(other.read_bytes())
    with pytest.raises(SampleError, match=r"a\.mp4.*changed"):
        make_clip(task)
    source = replace(task.clip.source, size=-1)  # a listing that does not say how long it is
    for frames in (None, (0, 12)):
        with pytest.raises(SampleError, match=r"a\.mp4.*changed"):
            make_clip(replace(task, clip=replace(task.clip, source=source, frames=frames)))


@pytest.mark.parametrize("name", ["h264 sound", "h264 rotated 90", "vp8 webm", "av1 mkv"])
def test_packets_that_are_known_already_make_the_same_sample(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    task = task_of(path, text="a dog")
    known = probe_source(ProbeTask(task.clip.source, None, Remote(), whole=True))
    before = all_of(make_clip(task))
    source = replace(task.clip.source, sha256=known.sha256, size=known.size)
    ready = replace(task, info=known.info, clip=replace(task.clip, source=source))
    assert (task.is_known, ready.is_known) == (False, True)
    assert all_of(make_clip(ready)) == before


def test_a_file_that_changes_between_looking_and_copying_is_refused(tmp_path: Path) -> None:
    """Even where its length and its time say that it has not."""
    path = make_video(tmp_path / "a.mp4", num_frames=24)
    task = task_of(path)
    made = make_clip(task)
    data = bytearray(path.read_bytes())
    data[task.info.num_frames + said_of(made).packets.offset[5]] ^= 1  # type: ignore[union-attr]
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"a\.mp4.*changed"):
        all_of(made)


@pytest.mark.parametrize("by", [1, -1])
def test_a_file_whose_length_changes_while_it_is_copied_is_refused(tmp_path: Path, by: int) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=24)
    path.write_bytes(path.read_bytes() + bytes(3 << 20))  # a tail that players pass over
    blocks = whole_of(make_clip(task_of(path))).blocks()
    assert len(next(blocks)) == BLOCK_BYTES
    os.truncate(path, path.stat().st_size + by)
    with pytest.raises(SampleError, match=r"a\.mp4 was written to while it was read"):
        list(blocks)


def test_a_file_that_is_gone_when_it_is_to_be_copied_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=4)
    whole = whole_of(make_clip(task_of(path)))
    path.unlink()
    with pytest.raises(SampleError, match=r"a\.mp4 cannot be read \(No such file"):
        list(whole.blocks())


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=4)
    whole = whole_of(make_clip(task_of(path)))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SampleError, match=r"a\.mp4 cannot be read \(it is no regular file"):
        list(whole.blocks())


def test_copying_takes_no_more_memory_than_a_few_blocks(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=8)
    path.write_bytes(path.read_bytes() + bytes(40 << 20))
    made = make_clip(task_of(path))
    tracemalloc.start()
    tar = TarShard(tmp_path / "a.tar")
    tar.add("a", made.members)
    tar.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.tar").stat().st_size > 40 << 20
    assert peak < 4 << 20


def test_one_lost_copy_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    """What was written of it before it turned out to have changed is taken back."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        make_video(tmp_path / "in" / f"{name}.mp4", num_frames=8, first_index=ord(name))
    out, trees = tmp_path / "out", []
    for lost in (False, True):

        def spoil(step: str, done: int, *_: Any, lost: bool = lost) -> None:
            if lost and (step, done) == ("writing", 0):
                path = tmp_path / "in" / "b.mp4"
                data = bytearray(path.read_bytes())
                facts = path.stat()
                data[-100] ^= 1
                path.write_bytes(data)
                os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))

        report = build_shards([str(tmp_path / "in")], out / str(lost), workers=1, progress=spoil)
        assert report.clips == {"planned": 3, "written": 3 - lost, "rejected": int(lost), "dropped": {}}
        assert verify_folder(out / str(lost), workers=1).problems == []
        trees.append({s.key: dict(s.members) for s in samples(out / str(lost))})
    assert report.rejects[0]["reason"].endswith("it was changed")
    assert trees[1] == {key: members for key, members in trees[0].items() if key != "b"}


def test_what_has_no_index_is_compared_as_a_whole(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", num_frames=24, codec="mpeg4", b_frames=0)
    made = make_clip(task_of(path))
    assert said_of(made).packets is None
    assert all_of(made)["avi"] == path.read_bytes()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"a\.avi.*changed"):
        all_of(made)


@pytest.mark.parametrize("name", ["h264 sound", "h264 picture begins later", "h264 sound first", "h264 ts"])
def test_a_whole_file_loses_its_sound_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = KINDS[name].make(tmp_path)
    task = task_of(path, encoding=Encoding(audio="drop"))
    assert task.info.has_audio
    made = make_clip(task)
    ext, data, meta = video_of(made)
    assert (ext, meta["has_audio"]) == ("mp4", False)
    info = probe_video(data)
    assert (info.num_frames, info.width, info.rotation) == (task.info.num_frames, task.info.width, task.info.rotation)
    assert info.times() == pytest.approx(task.info.times(), abs=1e-4)
    assert indices(made) == list(KINDS[name].shown)


def test_a_silent_file_is_copied_untouched_where_sound_is_dropped(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=12)
    assert video_of(make_clip(task_of(path, encoding=Encoding(audio="drop"))))[1] == path.read_bytes()


def test_a_part_is_copied_from_key_frame_to_key_frame(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=60, gop=12, audio=True)
    made = make_clip(task_of(path, (12, 36)))
    ext, _, meta = video_of(made)
    assert (ext, meta["num_frames"], meta["has_audio"], meta["codec"]) == ("mp4", 24, False, "h264")
    assert "packets" in meta
    assert indices(made) == list(range(12, 36))
    with_sound = make_clip(task_of(path, (12, 36), encoding=Encoding(audio="keep")))
    assert video_of(with_sound)[2]["has_audio"] is True
    assert indices(with_sound) == list(range(12, 36))


def test_a_part_that_cannot_be_cut_names_the_clip(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=60, gop=12, open_gop=True, b_frames=3)
    with pytest.raises(SampleError, match=r"a\.mp4 \(0\.5 to 1\.5 s\).*cannot be cut there"):
        make_clip(task_of(path, (12, 36)))


# --- encoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [None, (11, 47)])
def test_encoded_clips_have_their_frames_and_say_so(tmp_path: Path, frames: tuple[int, int] | None) -> None:
    path = make_video(tmp_path / "a.mov", num_frames=60, gop=250, audio=True)
    made = make_clip(task_of(path, frames, encode=True, encoding=Encoding(short_side=64, gop=8)))
    ext, data, meta = video_of(made)
    first, stop = frames or (0, 60)
    assert (ext, meta["num_frames"], meta["height"], meta["has_audio"]) == ("mp4", stop - first, 64, False)
    assert (meta["clip_start"], meta["clip_end"]) == (first / 24, stop / 24)
    assert meta["sha256"] == hashlib.sha256(data).hexdigest()
    assert meta["key_frames"] == list(range(0, stop - first, 8))
    assert indices(made) == list(range(first, stop))


def test_the_bytes_do_not_depend_on_what_the_process_did_before(tmp_path: Path) -> None:
    paths = [make_video(tmp_path / f"{k}.mp4", num_frames=48, first_index=100 * k, audio=True) for k in range(2)]
    tasks = [
        task_of(path, frames, encode=encode, encoding=Encoding(gop=8, audio="keep"))
        for frames in ((0, 12), (12, 36))
        for path in paths
        for encode in (True, False)
    ]
    here = [make_clip(task).members for task in tasks]
    with WorkerPool(make_clip, workers=2, timeout_s=60) as pool:
        there = [made.members for _, made in pool.map(reversed(tasks))]
    assert there == here[::-1]


@pytest.mark.parametrize("codec", ["pcm_s16le", "mp2"])
def test_every_clip_of_a_source_keeps_its_sound_where_that_is_encoded(tmp_path: Path, codec: str) -> None:
    path = beeping(tmp_path / "a.mkv", codec)
    tasks = [task_of(path, (first, first + 24), encoding=Encoding(audio="keep")) for first in range(0, 144, 24)]
    with WorkerPool(make_clip, workers=1, timeout_s=60) as pool:
        made = [result for _, result in pool.map(tasks)]
    assert all(isinstance(result, MadeClip) and video_of(result)[2]["has_audio"] for result in made)


def test_an_error_does_not_spoil_the_next_clip(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=72, gop=12, size=(320, 192))
    info = probe_video(path, packets=True)
    assert info.packets is not None
    data = bytearray(path.read_bytes())
    at, size = int(info.packets.offset[30]), int(info.packets.size[30])
    data[at + 4 : at + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"a\.mp4 \(.*\)|a\.mp4"):
        make_clip(task_of(path, (24, 36), encode=True))
    assert indices(make_clip(task_of(path, (48, 60), encode=True))) == list(range(48, 60))


def test_metadata_that_cannot_be_written_is_a_reject_of_its_clip(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=4)
    with pytest.raises(SampleError, match=r"a\.mp4: metadata cannot become JSON"):
        all_of(make_clip(task_of(path, user={"x": b"bytes"})))


@pytest.mark.parametrize(("codec", "encoder"), [("h264", "libx264"), ("av1", "libsvtav1")])
def test_the_version_names_what_encodes(codec: Any, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    options = ShardOptions(encoding=Encoding(codec=codec))
    assert encoder in encoder_version(options)
    assert f"PyAV {av.__version__}" in encoder_version(options)
    monkeypatch.setattr(av, "codecs_available", {"h264"})  # a PyAV that somebody built without encoders
    with pytest.raises(ConfigError, match=f"without {encoder}"):
        encoder_version(options)


def test_a_mapped_file_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=48, gop=12, audio=True)
    keep = Encoding(gop=8, audio="keep")
    tasks = [task_of(path, (12, 24), encode=True, encoding=keep), task_of(path, (12, 24), encoding=keep), task_of(path)]
    read = [make_clip(task).members for task in tasks]
    make_clip(task_of(make_video(tmp_path / "b.mp4", num_frames=12), (0, 12)))  # so that the other is opened anew
    monkeypatch.setattr(source_file, "IN_MEMORY", 1)  # bytes from which files are mapped
    assert [make_clip(task).members for task in tasks] == read
