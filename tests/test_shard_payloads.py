"""Code in shards: nothing that a tar or an index holds is ever run; what it spoils costs a sample or a sentence."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.shards import ShardSet

from tars import Member, load, number_of, tiny_video, write_tar


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMESTREAM_CACHE", str(tmp_path / "cache"))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def saved(save: Any, value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    save(file, value, **options)
    return file.getvalue()


def npy(shape: str, descr: str = "'<f4'") -> bytes:
    """A file of the npy format whose header says this; the header is Python text."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


def payloads(marker: Path) -> dict[str, bytes]:
    """Extension -> a file that makes `marker` in the hands of whoever trusts it."""
    pickled = pickle.dumps(Payload(marker))
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    script = f"open({str(marker)!r}, 'w')"
    return {
        "pyd": pickled,
        "pickle": pickled,
        "pkl": pickled,
        "pth": package.getvalue(),
        "npz": saved(np.savez, np.array([Payload(marker)], dtype=object)),
        "objects.npy": saved(np.save, np.array([Payload(marker)], dtype=object), allow_pickle=True),
        "pickled.npy": pickled,
        "zipped.npy": package.getvalue(),
        "shape.npy": npy(script),
        "descr.npy": npy("(1,)", script),
        "py": script.encode(),
        "sh": f"touch {marker}".encode(),
    }


def test_the_payloads_work_on_those_who_trust_them(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = payloads(marker)
    for load_it in (
        lambda: pickle.loads(files["pyd"]),
        lambda: np.load(io.BytesIO(files["objects.npy"]), allow_pickle=True),
        lambda: np.load(io.BytesIO(files["pickled.npy"]), allow_pickle=True),
    ):
        load_it()
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_members_with_code_are_never_read(num_workers: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = payloads(marker)
    members: list[Member] = [("a.mp4", tiny_video(0)), *((f"a.{ext}", data) for ext, data in files.items())]
    members += [(f"only-code.{ext}", data) for ext, data in files.items()]
    path = write_tar(tmp_path / "x.tar", members)
    for _ in range(2):  # also with the index that the first one leaves
        loader = load(path, num_workers=num_workers)
        assert [(batch["keys"], number_of(batch, 1)) for batch in loader] == [(["a"], 0)]
        loader.close()
    shards = ShardSet.open(path)
    assert set(shards.read(0, 0, want=files).members) == {ext for ext in files if ext.endswith("npy")}
    assert not marker.exists()


@pytest.mark.parametrize("ext", ["pyd", "pickle", "pth", "npz"])
def test_members_with_code_cannot_be_asked_for(ext: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.mp4", tiny_video(0)), (f"a.{ext}", b"x")])
    with pytest.raises(ConfigError, match=ext):
        load(path, fields=(ext,))


def test_an_index_that_names_code_does_not_make_it_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    data = payloads(marker)["pickle"]
    path = write_tar(tmp_path / "x.tar", [("a.mp4", tiny_video(0)), ("a.npy", data)])
    ShardSet.open(path)
    index = tmp_path / "x.idx.json"
    content = json.loads(index.read_bytes())
    content["samples"][0][1]["pickle"] = content["samples"][0][1].pop("npy")
    index.write_text(json.dumps(content))
    assert [number_of(batch, 1) for batch in load(path)] == [0]
    assert not marker.exists()


@pytest.mark.parametrize("name", ["objects.npy", "pickled.npy", "zipped.npy", "shape.npy", "descr.npy"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_arrays_with_code_are_rejects(name: str, num_workers: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    good = saved(np.save, np.arange(3, dtype=np.float32))
    members: list[Member] = [("a.mp4", tiny_video(0)), ("a.x.npy", payloads(marker)[name])]
    members += [("b.mp4", tiny_video(1)), ("b.x.npy", good)]
    loader = load(write_tar(tmp_path / "x.tar", members), fields=("x.npy",), num_workers=num_workers)
    batches = list(loader)
    loader.close()
    assert [batch["keys"] for batch in batches] == [["b"], ["b"]]
    assert torch.equal(batches[0]["x.npy"][0], torch.arange(3, dtype=torch.float32))
    (reject,) = batches[0]["meta"][0]["rejects"]
    assert reject["key"] == "a"
    assert "'x.npy' cannot be parsed" in reject["reason"]
    assert not marker.exists()


@pytest.mark.parametrize(
    "shape", ["(1000000000000,)", "(-1,)", "(4294967296, 4294967296)", "(1.5,)", "(" * 200 + ")" * 200]
)
def test_arrays_that_claim_the_impossible_are_rejects(shape: str, tmp_path: Path) -> None:
    members: list[Member] = [("a.mp4", tiny_video(0)), ("a.npy", npy(shape)), ("b.mp4", tiny_video(1))]
    members += [("b.npy", saved(np.save, np.zeros(2)))]
    batches = list(load(write_tar(tmp_path / "x.tar", members), fields=("npy",)))
    assert [batch["keys"] for batch in batches] == [["b"], ["b"]]
    assert "'npy' cannot be parsed" in batches[0]["meta"][0]["rejects"][0]["reason"]


JSON = {
    "nested": b"[" * 200_000,
    "nested object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "digits": b'{"num_frames": ' + b"9" * 1_000_000 + b"}",
    "not finite": b'{"num_frames": NaN, "fps": Infinity, "duration": -Infinity}',
    "repeated": b'{"num_frames": 9, "num_frames": [1], "fps": 1e999}',
    "class": b'{"class_path": "os.system", "init_args": {"command": "touch marker"}, "__reduce__": ["os.system"]}',
    "surrogates": b'{"text": "\\ud800", "source": "\\u0000"}',
}


@pytest.mark.parametrize("name", JSON)
def test_hostile_json_is_metadata_or_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tar(tmp_path / "x.tar", [("a.mp4", tiny_video(0)), ("a.json", JSON[name])])
    loader = load(path, num_workers=1, rejects_path=tmp_path / "rejects.jsonl")
    (batch,) = list(loader)
    loader.close()
    assert number_of(batch, 1) == 0
    assert not (tmp_path / "marker").exists()
    assert loader.stats()["without_meta"] == (1 if name in ("nested", "nested object", "digits") else 0)


def test_hostile_json_as_a_field(tmp_path: Path) -> None:
    members: list[Member] = [("z.mp4", tiny_video(1)), ("z.j.json", b"{}")]
    for number, (name, data) in enumerate(JSON.items()):
        members += [(f"{number}.mp4", tiny_video(0)), (f"{number}.j.json", data)]
        assert name
    refused = set()
    for batch in load(write_tar(tmp_path / "x.tar", members), fields=("j.json",)):
        refused |= {reject["key"] for reject in batch["meta"][0].get("rejects", ())}
    assert refused == {"0", "1", "2"}


INDEXES = {
    "nested": b"[" * 200_000,
    "endless": b'{"version": 1, "shards": [{"name": "x.tar", "samples": 1e999, "bytes": 1}]}',
    "negative": b'{"version": 1, "shards": [{"name": "x.tar", "samples": -1, "bytes": SIZE, "sha256": null}]}',
    "pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("data", INDEXES.values(), ids=INDEXES)
def test_hostile_indexes_are_worked_round(data: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.mp4", tiny_video(0))])
    for name in ("index.json", "x.idx.json"):
        (tmp_path / name).write_bytes(data.replace(b"SIZE", str(path.stat().st_size).encode()))
    shards = ShardSet.open(tmp_path)
    assert "index.json" in " ".join(shards.problems)
    assert [number_of(batch, 1) for batch in load(shards)] == [0]


def test_an_index_cannot_point_out_of_its_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.mp4", tiny_video(0)), ("b.mp4", tiny_video(1))])
    index = tmp_path / "x.idx.json"
    ShardSet.open(path)
    whole = json.loads(index.read_bytes())
    size = path.stat().st_size
    for place in ([0, 10], [-512, 10], [512, -1], [size, 1], [512, size], [1 << 70, 1], [512.5, 10], ["512", None]):
        index.write_text(json.dumps({**whole, "samples": [["a", {"mp4": place}], whole["samples"][1]]}))
        batches = list(load(path))
        assert {number_of(batch, 2) for batch in batches} <= {0, 1}
        assert all(number_of(batch, 2) == {"a": 0, "b": 1}[batch["keys"][0]] for batch in batches)
    # A place inside of the tar where another member stands is seen by the header in front of it.
    index.write_text(json.dumps({**whole, "samples": [["a", whole["samples"][1][1]], whole["samples"][1]]}))
    batches = list(load(path))
    assert [batch["keys"] for batch in batches] == [["b"], ["b"]]
    assert "another version" in batches[0]["meta"][0]["rejects"][0]["reason"]
