"""Which packets given frames need: none too few, none too many, and no fresh start that spares nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.packet_order import PacketOrder

KEY, LEAD = "K", "l"


def order_of(gops: str, hidden: frozenset[int] = frozenset()) -> PacketOrder:
    """From packets as letters: K a key packet, l one that is shown before it, p and b in the order "p b" of B-frames
    (p is shown after the b that follows it), anything else in its place."""
    shown_at = [4.0 * i for i in range(len(gops))]
    for i, letter in enumerate(gops):
        if letter == LEAD:
            shown_at[i] = shown_at[gops.rindex(KEY, 0, i)] - 1 / (i + 1)
        if letter == "b":
            shown_at[i] = shown_at[i - 1] - 1
    rising = np.argsort(np.argsort(shown_at))
    shown = np.array([i not in hidden for i in range(len(gops))])
    keys = np.array([i for i, letter in enumerate(gops) if letter == KEY])
    return PacketOrder.of(rising, shown, keys)


def packets(order: PacketOrder, frames: list[int]) -> list[list[int]]:
    return [run.packets for run in order.runs(frames)]


def test_frames_of_one_group_are_decoded_in_one_go() -> None:
    order = order_of("Kxxx" * 4)
    assert packets(order, [0]) == [[0]]
    assert packets(order, [1, 3]) == [[0, 1, 2, 3]]
    assert packets(order, [15]) == [[12, 13, 14, 15]]
    assert packets(order, [1, 12, 14]) == [[0, 1], [12, 13, 14]]
    assert order.key_frames.tolist() == [0, 4, 8, 12]


def test_the_decoder_goes_on_where_starting_afresh_spares_nothing() -> None:
    order = order_of("Kxxx" * 4)
    assert packets(order, [3, 4]) == [[0, 1, 2, 3, 4]]
    assert packets(order, [2, 4]) == [[0, 1, 2], [4]]
    assert packets(order, list(range(16))) == [list(range(16))]


def test_b_frames_stop_at_the_packet_that_shows_them() -> None:
    order = order_of("Kpbpb" * 2)
    assert order.rank.tolist() == [0, 2, 1, 4, 3, 5, 7, 6, 9, 8]
    assert packets(order, [1]) == [[0, 1, 2]]
    assert packets(order, [2]) == [[0, 1]]


def test_frames_shown_before_their_key_frame_need_the_group_before() -> None:
    order = order_of("KxxKllx")
    assert order.rank.tolist() == [0, 1, 2, 5, 3, 4, 6]
    assert packets(order, [3]) == [[0, 1, 2, 3, 4]]
    assert packets(order, [6]) == [[3, 6]]  # the leading ones are nothing to it
    assert packets(order, [3, 6]) == [[0, 1, 2, 3, 4, 5, 6]]


def test_without_an_order_everything_is_decoded() -> None:
    times, keys = np.arange(6), np.array([0, 3])
    order = PacketOrder.of(times, np.ones(6, dtype=bool), keys, ordered=False)
    assert packets(order, [4]) == [[0, 1, 2, 3, 4, 5]]
    assert order.key_frames.tolist() == [0]


groups = st.lists(st.sampled_from(["K", "Kx", "Kxxx", "Kpb", "Kpbpbx", "Klx", "Kllpb"]), min_size=1, max_size=8)


@given(groups=groups, data=st.data())
def test_runs_hold_what_is_needed_and_nothing_else(groups: list[str], data: st.DataObject) -> None:
    letters = "".join(["K" + groups[0].strip("Kl"), *groups[1:]])
    hidden = data.draw(st.frozensets(st.integers(1, len(letters)), max_size=3)) - {0}
    order = order_of(letters, hidden)
    count = len(order.position)
    wanted = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12, unique=True))
    runs = order.runs(wanted)
    assert sorted(frame for run in runs for frame in run.frames) == sorted(wanted)
    fed = [packet for run in runs for packet in run.packets]
    assert fed == sorted(set(fed))  # each once, in order
    needed: set[int] = set()
    for run in runs:
        assert run.packets[0] in order.keys
        for frame in run.frames:
            position = int(order.position[frame])
            assert position in run.packets
            needed.update(p for p in range(int(order.start[frame]), position + 1))
    # Only packets that decode a wanted frame; leading ones of the key packet that a run begins with may be left out.
    assert set(fed) <= needed
    assert all(order.leading[packet] for packet in needed - set(fed))
    for one, next_one in pairwise(runs):
        assert next_one.packets[0] > one.packets[-1] + 1  # the fresh start spares packets


@pytest.mark.parametrize("count", [1, 2, 7])
def test_key_frames_alone_cost_one_packet_each(count: int) -> None:
    order = order_of("Kxxxxxxx" * count)
    fed = packets(order, order.key_frames.tolist())
    assert fed == [[8 * i] for i in range(count)]
