"""Decord's process: killed, stuck, crashed, forked, orphaned. Each costs one sample at most."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from framestream.pipeline.decode import available_backends, open_decoder
from framestream.pipeline.errors import DecodeError
from framestream.pipeline.isolation import HelperDied, helper

from synthetic import damaged, read_indices

pytestmark = [
    pytest.mark.skipif(bool(available_backends()["decord"]), reason=available_backends()["decord"]),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks are POSIX"),
]


def decode(data: bytes, timeout_s: float = 30.0) -> list[int]:
    with open_decoder(data, backend="decord", short_side=64, name="clip 3", timeout_s=timeout_s) as decoder:
        return read_indices(decoder.frames_at([5, 47]))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_one_process_serves_all_samples(clip: bytes) -> None:
    assert decode(clip) == [5, 47]
    pid = helper().pid
    assert decode(clip) == [5, 47]
    assert helper().pid == pid != os.getpid()


def test_killed_between_samples_costs_nothing(clip: bytes) -> None:
    decode(clip)
    first = helper().pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert decode(clip) == [5, 47]
    assert helper().pid != first


def test_killed_while_it_works_costs_one_sample(clip: bytes) -> None:
    decode(clip)
    pid = helper().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that the sample is under way when the process dies
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(DecodeError, match=r"clip 3: Decord's process was ended by SIGKILL"):
        decode(clip)
    assert decode(clip) == [5, 47]


def test_a_hang_costs_one_sample(clip: bytes) -> None:
    decode(clip)
    pid = helper().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match=r"clip 3: Decord's process took longer than 1 s"):
        decode(clip, timeout_s=1)
    assert not alive(pid)
    assert decode(clip) == [5, 47]


def test_failed_opens_do_not_pile_up(clip: bytes) -> None:
    decode(clip)
    pid = helper().pid
    for _ in range(40):  # Decord keeps the input of every open that fails
        answer, _body = _request(b"no video")
        assert "error" in answer
    assert helper().pid != pid
    assert decode(clip) == [5, 47]


def _request(data: bytes) -> tuple[dict, bytearray]:
    return helper().request({"indices": [0], "size": None}, data, 30.0)


def test_threads_take_turns(clip: bytes) -> None:
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(decode(clip))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[5, 47]] * 4


def _forked(clip: bytes, parent: int, queue: multiprocessing.Queue) -> None:
    inherited = helper().pid
    queue.put((inherited, decode(clip), helper().pid != parent))


def test_a_fork_leaves_the_helper_of_its_parent_alone(clip: bytes) -> None:
    decode(clip)
    pid = helper().pid
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(clip, pid, queue), daemon=True)
    child.start()
    assert queue.get(timeout=60) == (None, [5, 47], True)
    child.join(30)
    assert helper().pid == pid
    assert decode(clip) == [5, 47]
    assert helper().pid == pid


def test_it_ends_with_a_parent_that_is_killed(clip_path: Path) -> None:
    code = (
        "import sys\n"
        "from framestream.pipeline.decode import open_decoder\n"
        "from framestream.pipeline.isolation import HelperDied, helper\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "open_decoder(data, backend='decord').frames_at([0])\n"
        "print(helper().pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(clip_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    assert wait_until_gone(pid)


def test_damage_that_ends_it_does_not_end_the_process_that_asks(clip: bytes) -> None:
    for seed in range(12):  # in the headers, where damage has ended Decord's process
        with contextlib.suppress(HelperDied):
            _request(damaged(clip, "header", seed))
    assert decode(clip) == [5, 47]
