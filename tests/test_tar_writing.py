"""A shard is written block by block: the bytes are those of Python's `tarfile`, whatever happens on the way."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.errors import SampleError
from framestream.pipeline.shard_writer import MAX_MEMBER_BYTES, ShardWriter, TarShard

MIB = 1 << 20


@dataclass
class Streamed:
    """`data` in blocks of `step` bytes, then an error where there is one."""

    data: bytes
    step: int
    error: SampleError | None = None
    claimed: int | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.data) if self.claimed is None else self.claimed

    def blocks(self) -> Iterator[memoryview]:
        room = bytearray(self.step)
        for start in range(0, len(self.data), self.step):
            part = self.data[start : start + self.step]
            room[: len(part)] = part
            yield memoryview(room)[: len(part)]
        if self.error is not None:
            raise self.error


def by_tarfile(samples: dict[str, dict[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for ext in sorted(members):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size, info.mode = len(members[ext]), 0o644
                tar.addfile(info, io.BytesIO(members[ext]))
    return file.getvalue()


keys = st.text("abcxyz019_- äЖ漢🎬\udcff", min_size=1, max_size=20).filter(lambda key: not key.startswith(" "))
sizes = st.one_of(st.integers(0, 2000), st.sampled_from([511, 512, 513, MIB - 1, MIB, MIB + 1, 2 * MIB + 7]))
members = st.dictionaries(
    st.sampled_from(["mp4", "json", "txt"]), sizes.map(lambda n: bytes(i & 255 for i in range(n)))
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(keys, members, max_size=4), st.sampled_from([300, MIB]))
def test_the_bytes_are_those_of_tarfile(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]], step: int
) -> None:
    """Streamed or not; and the index says where they are, and their SHA-256."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    tar = TarShard(path)
    for key, content in samples.items():
        streamed = {ext: Streamed(data, step) if ext == "mp4" else data for ext, data in content.items()}
        with pytest.raises(SampleError, match="is gone"):
            tar.add(key, {**streamed, "npy": Streamed(b"half of it", 4, SampleError("it is gone"))})
        tar.add(key, streamed)
    index = tar.close()
    written = path.read_bytes()
    assert written == by_tarfile(samples)
    assert index.sha256 == hashlib.sha256(written).hexdigest()
    for sample in index.samples:
        for ext, (offset, size) in sample.members.items():
            assert written[offset : offset + size] == samples[sample.key][ext]


def test_what_a_tar_cannot_hold_or_did_not_get_is_taken_back(tmp_path: Path) -> None:
    tar = TarShard(tmp_path / "a.tar")
    tar.add("a", {"mp4": b"video"})
    with pytest.raises(SampleError, match=r"b\.mp4 has 8589934592 bytes, and a tar holds files below 8 GiB: cut it"):
        tar.add("b", {"json": b"{}", "mp4": Streamed(b"", 1, claimed=MAX_MEMBER_BYTES + 1)})
    with pytest.raises(SampleError, match=r"c\.mp4: 5 bytes came of it, expected 7"):
        tar.add("c", {"json": b"{}", "mp4": Streamed(b"video", 2, claimed=7)})
    assert tar.num_samples == 1
    tar.close()
    assert (tmp_path / "a.tar").read_bytes() == by_tarfile({"a": {"mp4": b"video"}})


def test_bytearrays_are_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", bytearray(b"video"), "mp4")  # type: ignore[arg-type]
    assert b"video" in (tmp_path / "clips-000000.tar").read_bytes()


@pytest.mark.parametrize("first", [100, 2_999_000])
def test_a_full_disk_leaves_nothing_either(tmp_path: Path, first: int) -> None:
    """What is buffered is written when the file is closed, and refused once more."""
    code = f"""
import os, resource, signal, sys
from framestream.pipeline.shard_writer import TarShard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
tar = TarShard("a.tar")
try:
    tar.add("a", {{"mp4": bytes({first}), "json": b"{{}}"}})
    tar.add("b", {{"mp4": bytes(4_000_000), "json": b"{{}}"}})
except OSError as err:
    print(err.strerror)
tar.discard()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    tar = TarShard(tmp_path / "a.tar")
    tar.add("a", {"mp4": bytes(3 * MIB)})
    tar.discard()
    assert list(tmp_path.iterdir()) == []
