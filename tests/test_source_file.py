"""The bytes of sources: whole and unchanged, or a sentence; once per source; never more in memory than is looked at."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.errors import ConfigError, SampleError, StorageError
from framestream.pipeline.probe import probe_video
from framestream.pipeline.remote import Remote
from framestream.tools import source_file
from framestream.tools.inputs import Source, list_inputs
from framestream.tools.source_file import fetched, opened, read_text

from remote_storage import QUICK, Storage, http_storage, s3_server, s3_storage
from synthetic import make_video, read_indices

LOCAL = Remote()


def source_of(path: Path | str, remote: Remote = LOCAL) -> Source:
    (source,) = list_inputs([str(path)], remote=remote)
    assert isinstance(source, Source)
    return source


@pytest.fixture
def video(tmp_path: Path, clip: bytes) -> Path:
    path = tmp_path / "v.mp4"
    path.write_bytes(clip)
    return path


@pytest.fixture(params=["read", "mapped"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small files are read; with no room for them they are mapped as large ones are."""
    if request.param == "mapped":
        monkeypatch.setattr(source_file, "IN_MEMORY", 0)
    return str(request.param)


# --- local files -----------------------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_file_and_can_be_used_as_bytes(video: Path, clip: bytes, held: str) -> None:
    with opened(source_of(video), LOCAL) as file:
        assert isinstance(file.data, bytes if held == "read" else memoryview)
        assert (len(file.data), file.size, bytes(file.data)) == (len(clip), len(clip), clip)
        assert hashlib.sha256(file.data).digest() == hashlib.sha256(clip).digest()
        assert bytes(file.data[10:20]) == clip[10:20]
        assert probe_video(file.data) == probe_video(clip)
        info = probe_video(file.path)
        assert info == probe_video(clip)
        with open_decoder(file.data, backend="pyav", info=info) as decoder:
            assert read_indices(decoder.frames_at([3, 40])) == [3, 40]
        indexed = probe_video(file.path, packets=True)
        assert indexed.packets is not None
        with open_decoder(file.data, backend="pyav", info=indexed) as decoder:
            assert read_indices(decoder.frames_at([3, 40])) == [3, 40]


def test_what_was_changed_since_the_listing(video: Path) -> None:
    source = source_of(video)
    os.utime(video, ns=(0, 0))
    with pytest.raises(SampleError, match=r"v\.mp4 is of another version .* it was changed"), opened(source, LOCAL):
        pass
    video.write_bytes(b"short")
    with pytest.raises(SampleError, match=r"v\.mp4 has 5 bytes, it had \d+ .* it was changed"), opened(source, LOCAL):
        pass
    with opened(replace(source, size=-1, version=""), LOCAL) as file:  # a listing that says nothing
        assert file.data == b"short"
    video.unlink()
    with pytest.raises(SampleError, match=r"v\.mp4 cannot be read \(No such file"), opened(source, LOCAL):
        pass


@pytest.mark.parametrize("change", ["append", "rewrite", "replace", "remove"])
def test_what_is_changed_while_it_is_read(video: Path, held: str, change: str) -> None:
    source = source_of(video)
    data = video.read_bytes()

    def alter() -> None:
        if change == "append":
            with open(video, "ab") as file:
                file.write(b"more")
        elif change == "rewrite":
            video.write_bytes(data)
            os.utime(video)
        elif change == "replace":
            other = video.with_suffix(".new")
            other.write_bytes(data)
            os.replace(other, video)
        else:
            video.unlink()

    words = r"v\.mp4 (was written to while|cannot be read \(No such)"
    with pytest.raises(SampleError, match=words), opened(source, LOCAL):
        alter()


def test_errors_of_the_block_are_its_own(video: Path) -> None:
    def fail() -> None:
        video.unlink()
        raise SampleError("mine")

    with pytest.raises(SampleError, match="mine"), opened(source_of(video), LOCAL):
        fail()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "v.mp4")
    for path in (tmp_path / "v.mp4", tmp_path):
        source = Source(str(path), "v.mp4", "v")
        with pytest.raises(SampleError, match="it is no regular file"), opened(source, LOCAL):
            pass


def test_an_empty_file_has_no_bytes(tmp_path: Path, held: str) -> None:
    (tmp_path / "v.mp4").touch()
    with opened(source_of(tmp_path / "v.mp4"), LOCAL) as file:
        assert (file.data, file.size) == (b"", 0)


def test_no_descriptor_stays_open(video: Path, held: str) -> None:
    source = source_of(video)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with opened(source, LOCAL):
            pass
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_text_of_a_source(video: Path) -> None:
    source = source_of(video)
    assert read_text(source, LOCAL) is None
    video.with_suffix(".txt").write_bytes(" a caption, caf\xe9\n".encode("utf-8-sig"))
    assert source_of(video).text == "a caption, caf\xe9"  # of a local file it is known at listing
    source = replace(source, text_file=str(video.with_suffix(".txt")))
    assert read_text(source, LOCAL) == "a caption, caf\xe9"
    assert read_text(replace(source, text="said"), LOCAL) == "said"
    video.with_suffix(".txt").write_bytes(" a caption, caf\xe9\n".encode("latin-1"))  # not to be changed in silence
    assert source_of(video).text is None
    with pytest.raises(
        SampleError, match=r"v\.mp4: its text v\.txt cannot be read \(.*utf-8.*byte 0xe9 in position 15"
    ):
        read_text(source, LOCAL)
    video.with_suffix(".txt").unlink()
    with pytest.raises(SampleError, match=r"v\.mp4: its text v\.txt cannot be read \(No such file"):
        read_text(source, LOCAL)


# --- remote storage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, clip: bytes) -> Iterator[Storage]:
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "v.mp4").write_bytes(clip)
    (folder / "v.txt").write_text("a caption\n")
    make_video(folder / "w.mp4", num_frames=8)
    if request.param == "http":
        with http_storage(folder) as web:
            yield web
    else:
        with s3_storage(folder, request.getfixturevalue("server"), tmp_path.name) as s3:
            yield s3


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def remote_of(storage: Storage) -> Remote:
    return Remote(storage.options, **{**QUICK, "stall_s": 1.0})


def test_a_remote_source_is_fetched_once_and_leaves_nothing(
    storage: Storage, temporary: Path, clip: bytes, held: str
) -> None:
    remote = remote_of(storage)
    first, second = source_of(f"{storage.url}/v.mp4", remote), source_of(f"{storage.url}/w.mp4", remote)
    assert read_text(first, remote) == "a caption"
    storage.proxy.requests.clear()
    for _ in range(3):
        with opened(first, remote) as file:
            assert bytes(file.data) == clip
            assert probe_video(file.path) == probe_video(clip)
            assert list(temporary.iterdir()) == []
    assert storage.proxy.count("v.mp4") == 1
    with opened(second, remote) as other:
        assert bytes(other.data) == (storage.folder / "w.mp4").read_bytes()
        assert Path(file.path).read_bytes() == clip  # whoever still holds the first may go on
    with opened(first, remote) as file:
        assert bytes(file.data) == clip
    assert storage.proxy.count("v.mp4") == 2


def test_descriptors_do_not_add_up(storage: Storage, held: str) -> None:
    remote = remote_of(storage)
    sources = [source_of(f"{storage.url}/{name}.mp4", remote) for name in "vw"]
    for source in sources:
        with opened(source, remote):
            pass
    before = len(os.listdir("/proc/self/fd"))
    for source in sources * 5:
        with opened(source, remote):
            pass
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("fault", ["503", "refuse", "reset", "cut", "short", "stall", "whole"])
def test_faults_on_the_way_do_not_show(storage: Storage, clip: bytes, fault: str) -> None:
    remote = remote_of(storage)
    source = source_of(f"{storage.url}/v.mp4", remote)
    storage.proxy.inject("v.mp4", fault, 2)
    with opened(source, remote) as file:
        assert bytes(file.data) == clip


def test_a_server_that_is_gone_is_no_fault_of_the_sample(storage: Storage) -> None:
    remote = remote_of(storage)
    source = source_of(f"{storage.url}/v.mp4", remote)
    storage.proxy.inject("v.mp4", "503", 99)
    with pytest.raises(StorageError, match=r"v\.mp4 could not be fetched in 4 attempts"), opened(source, remote):
        pass


def test_a_remote_source_that_was_changed_or_removed(storage: Storage, clip: bytes) -> None:
    remote = remote_of(storage)
    url = f"{storage.url}/v.mp4"
    source = source_of(url, remote)
    with pytest.raises(SampleError, match="bytes, it had 7 at the start"), opened(replace(source, size=7), remote):
        pass
    kind = source.version.partition(" ")[0]
    for version, changed in ((f"{kind} other", True), ("otherkind x", False), ("", False)):
        if changed:
            with pytest.raises(SampleError, match="another version"), opened(replace(source, version=version), remote):
                pass
        else:
            with opened(replace(source, version=version), remote) as file:
                assert file.size == len(clip)
    gone = Source(f"{storage.url}/gone.mp4", "gone.mp4", "gone")
    with pytest.raises(SampleError, match=r"gone\.mp4 does not exist"), opened(gone, remote):
        pass
    with pytest.raises(SampleError, match=r"its text gone\.txt cannot be read"):
        read_text(Source(url, "v.mp4", "v", text_file=f"{storage.url}/gone.txt"), remote)


@pytest.mark.parametrize("url", ["nonsense://x/v.mp4", "filecache::http://x/v.mp4", "github://x/v.mp4"])
def test_an_address_that_cannot_be_used_costs_the_sample(url: str) -> None:
    with pytest.raises(SampleError, match=r"v\.mp4"), opened(Source(url, "v.mp4", "v"), LOCAL):
        pass


def test_a_package_that_lacks_ends_the_run_rather_than_all_samples() -> None:
    protocol = next((name for name in ("gs", "abfs", "oss", "dropbox") if not importable(name)), None)
    if protocol is None:
        pytest.skip("all kinds of storage are installed")
    source = Source(f"{protocol}://b/v.mp4", "v.mp4", "v")
    with (
        pytest.raises(ConfigError, match=rf"{protocol}://b/v\.mp4 cannot be opened by fsspec"),
        opened(source, Remote()),
    ):
        pass


def importable(protocol: str) -> bool:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        return False
    return True


def test_a_remote_text_may_be_as_long_as_a_local_one(storage: Storage) -> None:
    remote = remote_of(storage)
    source = Source(f"{storage.url}/v.mp4", "v.mp4", "v", text_file=f"{storage.url}/v.mp4")
    with pytest.raises(SampleError, match=r"v\.mp4: its text v\.mp4 cannot be read \(.*utf-8"):
        read_text(source, remote)
    limit, source_file.MAX_TEXT_BYTES = source_file.MAX_TEXT_BYTES, 10
    try:
        with pytest.raises(SampleError, match=r"v\.mp4: its text v\.mp4 cannot be read \(it has more than 10 bytes"):
            read_text(source, remote)
    finally:
        source_file.MAX_TEXT_BYTES = limit


def test_threads_do_not_get_each_others_files(storage: Storage) -> None:
    remote = remote_of(storage)
    wanted = {name: (storage.folder / name).read_bytes() for name in ("v.mp4", "w.mp4")}
    wrong: list[str] = []

    def read(name: str) -> None:
        source = Source(f"{storage.url}/{name}", name, name)
        for _ in range(10):
            with opened(source, remote) as file:
                if Path(file.path).read_bytes() != wanted[name] or bytes(file.data) != wanted[name]:
                    wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FULL = """
import resource, signal, sys
from framestream.pipeline.remote import Remote
from framestream.tools.inputs import Source
from framestream.tools.source_file import opened
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with opened(Source(sys.argv[1], "v.mp4", "v"), Remote()):
    pass
"""


def test_a_full_disk_ends_the_run_rather_than_all_samples(storage: Storage) -> None:
    if storage.options:
        pytest.skip("one kind of storage is enough")
    done = subprocess.run([sys.executable, "-c", FULL, f"{storage.url}/v.mp4"], capture_output=True, text=True)
    assert "ConfigError" in done.stderr
    assert "has no room for" in done.stderr
    assert "TMPDIR" in done.stderr


def test_without_a_folder_for_temporary_files(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    source = Source(f"{storage.url}/w.mp4", "w.mp4", "w", version="none")
    with pytest.raises(ConfigError, match="TMPDIR"), opened(source, remote_of(storage)):
        pass
    with pytest.raises(ConfigError, match="TMPDIR"), fetched(source.path, remote_of(storage)):
        pass


LARGE = """
import resource, sys
from framestream.pipeline.remote import Remote
from framestream.tools.inputs import Source
from framestream.tools.source_file import opened
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    with opened(Source(path, "small", "small"), Remote()): pass
    before = peak()
    with opened(Source(path.replace("w.mp4", "large.mp4"), "large", "large"), Remote()) as file:
        print(file.size, bytes(file.data[-4:]) == b"last", peak() - before)
"""


def test_large_files_are_not_held_in_memory(storage: Storage) -> None:
    if storage.options:
        pytest.skip("one kind of storage is enough")
    size = 160 << 20
    with open(storage.folder / "large.mp4", "wb") as file:
        file.truncate(size - 4)
        file.seek(size - 4)
        file.write(b"last")
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(storage.folder / "w.mp4"), f"{storage.url}/w.mp4"],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        told, last, grown_mib = line.split()
        assert (int(told), last) == (size, "True")
        assert int(grown_mib) < 100  # the download has a range of 16 MiB at hand, and the one before it
    assert len(done.stdout.splitlines()) == 2
