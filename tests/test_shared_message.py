"""Messages between processes: what goes in comes out, also from a sender that is gone."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.shared_message import receive, send

DTYPES = [torch.uint8, torch.int64, torch.float32, torch.bool, torch.bfloat16, torch.float64]


def through(message: Any) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=send, args=(ours, message))
        sender.start()
        received = receive(theirs)
        sender.join()
    return received


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6),
    st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda x: st.lists(x, max_size=3), max_leaves=8),
)
def test_what_goes_in_comes_out(shapes: list[tuple[torch.dtype, list[int]]], other: Any) -> None:
    tensors = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in shapes]
    got, rest = through(({"nested": [tensors]}, other))
    assert rest == other
    assert len(got["nested"][0]) == len(tensors)
    for tensor, received in zip(tensors, got["nested"][0], strict=True):
        assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(received, tensor)


def test_views_strides_gradients_and_repeats() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(torch.ones(2))
    got = through([base[1:, ::2], base.t(), parameter, base, base])
    assert torch.equal(got[0], base[1:, ::2])
    assert torch.equal(got[1], base.t())
    assert isinstance(got[2], torch.nn.Parameter)
    assert got[3] is got[4]


def test_large_tensors_of_all_kinds_and_more_than_fit_into_a_message() -> None:
    for dtype in DTYPES:
        tensor = torch.randint(0, 2, (3, 70_000)).to(dtype)
        assert torch.equal(through([tensor])[0], tensor)
        assert torch.equal(through([tensor[:, ::2]])[0], tensor[:, ::2])
    many = [torch.full((70_000,), number, dtype=torch.uint8) for number in range(210)]
    assert [int(tensor[-1]) for tensor in through(many)] == list(range(210))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="mappings are counted in /proc")
def test_a_small_tensor_that_is_kept_keeps_nothing_else() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as file:
            return sum("framestream" in line for line in file)

    kept = []
    for _ in range(5):
        got = through({"frames": torch.zeros(1 << 20), "ids": torch.zeros(1 << 15), "valid": torch.ones(8)})
        kept += [got["valid"], got["ids"]]
        del got
    assert mapped() == 5  # of the medium ones alone
    del kept
    assert mapped() == 0


def test_received_tensors_can_be_written_to_and_outlive_everything() -> None:
    got = through({"large": torch.zeros(3, 1 << 20, dtype=torch.uint8)})["large"]
    got += 7
    part = got[1]
    del got
    assert int(part.float().sum()) == 7 << 20


def test_what_was_sent_can_be_read_after_the_sender_has_died() -> None:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        send(theirs, torch.arange(100_000))
        os._exit(0)
    theirs.close()
    os.waitpid(child, 0)
    with ours:
        assert torch.equal(receive(ours), torch.arange(100_000))
        with pytest.raises(EOFError, match="closed"):
            receive(ours)


def test_half_a_message_is_an_end() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(b"\x08" + bytes(15) + b"1234")
        theirs.close()
        with pytest.raises(EOFError, match="mid-message"):
            receive(ours)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="descriptors are counted in /proc")
def test_received_messages_keep_no_descriptor_open() -> None:
    kept = [through([torch.ones(9), torch.ones(3)])]
    before = len(os.listdir("/proc/self/fd"))
    kept += [through([torch.ones(9), torch.ones(3)]) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(float(a.sum() + b.sum()) == 12 for a, b in kept)
