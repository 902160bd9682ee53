"""What commands say while they work: on a terminal, in a log file, to a collector, and when they are stopped."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.errors import ConfigError
from framestream.tools.progress import printable, reporting
from framestream.tools.progress_pace import WINDOW_S, Pace, in_words, in_words_rate

JOB = """
import logging, sys, time
from framestream.tools import progress
logging.basicConfig(level=logging.INFO, format="logged %(message)s")
progress._Plain.first_after_s = progress._Plain.every_s = 0.2
with progress.reporting("job", sys.argv[1], counted="lost") as report:
    for done in range(5, 11):
        report.step("reading", done, 10, done // 5)
        time.sleep(0.12)
    report.step("listing", 4, None, 2)
    logging.getLogger("far.away").warning("careful")
    report.say("half\\x1b[2Jway \\udce9", shard=3)
    report.error("no room")
    report.end(["all done"], {"samples": 7})
logging.warning("after")
"""
ENDLESS = """
import time
from framestream.tools.progress import reporting
with reporting("job") as report:
    done = 0
    while True:
        report.step("reading", done, 1_000_000, 0)
        done += 1
        time.sleep(0.01)
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def on_terminal(code: str, *arguments: str, interrupt: bytes = b"", **environment: str) -> tuple[int, str, str]:
    """Run with stderr on a terminal, with Ctrl-C once it has shown `interrupt`: (exit status, stdout, terminal)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environment},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
            if interrupt and interrupt in shown:
                process.send_signal(signal.SIGINT)
                interrupt = b""
    except OSError:  # what Linux says when the other side is closed
        pass
    os.close(ours)
    out, _ = process.communicate()
    return process.returncode, out.decode(), shown.decode()


def test_lines_in_a_log_file() -> None:
    done = run(JOB, "auto")
    lines = done.stderr.splitlines()
    numbers = r", [0-9.]+/(s|min), [0-9.]+ s left, [12] lost"
    assert all(re.fullmatch(rf"reading [5-9]/10{numbers}", line) for line in lines[:-6])
    assert lines[:-6]
    assert re.fullmatch(r"reading 10/10, [0-9.]+/(s|min), took [0-9.]+ s, 2 lost", lines[-6])
    assert lines[-5:] == [
        "careful",
        "half\\x1b[2Jway \\udce9",
        "framestream job: no room",
        "listing 4, 2 lost",
        "logged after",
    ]
    assert done.stdout == "all done\n"


def test_json_for_a_collector() -> None:
    done = run(JOB, "json")
    *lines, after = done.stderr.splitlines()
    assert after == "logged after"
    events = [json.loads(line) for line in lines]
    assert all(event["command"] == "job" for event in events)
    assert all(datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0) for event in events)
    progress = [event for event in events if event["event"] == "progress"]
    assert all({"step", "done", "total", "rate", "eta_s", "elapsed_s", "bad"} <= event.keys() for event in progress)
    last = next(event for event in progress if event["done"] == 10)
    assert (last["step"], last["total"], last["eta_s"], last["bad"]) == ("reading", 10, 0.0, 2)
    assert 0 < last["rate"] < 10
    assert progress[-1]["total"] is None
    told = [(event["event"], event.get("text"), event.get("facts")) for event in events if event["event"] != "progress"]
    assert told == [
        ("message", "careful", {"level": "warning", "logger": "far.away"}),
        ("message", "half\x1b[2Jway \udce9", {"shard": 3}),
        ("error", "no room", None),
        ("end", None, {"samples": 7}),
    ]
    assert json.loads(done.stdout) == {"samples": 7}


def test_quiet_is_quiet_but_for_errors() -> None:
    done = run(JOB, "quiet")
    assert done.stderr.splitlines() == ["framestream job: no room", "logged after"]
    assert done.stdout == ""


def test_a_bar_on_a_terminal() -> None:
    status, out, shown = on_terminal(JOB, "auto")
    assert status == 0
    assert out == "all done\n"
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")  # the cursor goes, and comes back
    assert "\x1b[2J" not in shown  # what a name says is not obeyed
    text = ESCAPE.sub("", shown)
    assert re.search(r"reading +━+.* 10/10 +[0-9.]+/(s|min) .*[0-9]:[0-9]{2}:[0-9]{2} +2 lost", text)
    assert re.search(r"[5-9]/10 +[0-9.]+/(s|min) +[0-9.]+ s left", text)
    assert re.search(r"listing .* 4/4 .* 2 lost", text)
    for words in ("careful", "half\\x1b[2Jway \\udce9", "framestream job: no room", "logged after"):
        assert words in text


def test_no_bar_where_the_terminal_cannot_draw_one() -> None:
    _, _, shown = on_terminal(JOB, "auto", TERM="dumb")
    assert "\x1b" not in shown
    assert "reading 10/10" in shown


def test_an_interrupt_leaves_the_terminal_in_order() -> None:
    status, _, shown = on_terminal(ENDLESS, interrupt=b"left")
    assert status != 0
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "KeyboardInterrupt" in shown[shown.rindex("\x1b[?25h") :]  # it goes on to the caller, behind the bar


def test_an_interrupt_in_a_log_file_tells_how_far_it_was(tmp_path: Path) -> None:
    code = ENDLESS.replace("done += 1", "done += 1; done == 50 and print(1, flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert re.search(r"^reading \d+/1000000, .* left, 0 rejected$", err, re.MULTILINE)


def test_many_calls_say_little(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting("job", "plain") as report:
        for done in range(20_001):
            report("reading", done, 20_000, 0)
            report("counting", done, done, 0)  # a total that grows with what is found
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 8
    assert sum(line.startswith("reading 20000/20000") for line in lines) == 1
    assert sum(line.startswith("counting 20000/20000") for line in lines) == 1


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="'loud', it has to be one of auto"), reporting("job", "loud"):  # type: ignore[arg-type]
        pass


def test_what_was_done_before_is_no_speed() -> None:
    pace = Pace("writing", 300_000, 1000.0)
    assert pace.rate is None
    assert pace.eta_s is None
    for second in range(1, 11):
        pace.update(300_000 + 5 * second, 400_000, 0, 1000.0 + second)
    assert pace.rate == pytest.approx(5)
    assert pace.eta_s == pytest.approx((100_000 - 50) / 5)


def test_the_rate_is_that_of_the_last_minute_and_in_the_end_that_of_all() -> None:
    pace = Pace("writing", 0, 0.0)
    for second in range(1, 601):
        pace.update(100 * second, 100_000, 0, float(second))
    assert pace.rate == pytest.approx(100)
    for second in range(601, 601 + int(WINDOW_S) + 2):
        pace.update(60_000 + second - 600, 100_000, 0, float(second))
    assert pace.rate == pytest.approx(1)
    pace.update(100_000, 100_000, 0, 1000.0)
    assert pace.rate == pytest.approx(100)
    assert pace.eta_s == 0.0


def test_the_rate_of_something_slow() -> None:
    pace = Pace("writing", 0, 0.0)
    for number in range(1, 5):
        pace.update(number, 10, 0, 300.0 * number)
    assert pace.rate == pytest.approx(1 / 300)
    assert pace.eta_s == pytest.approx(1800)
    pace.update(0, 10, 0, 1300.0)  # again from the beginning
    assert pace.rate is None


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 10**9)), min_size=1), st.none() | st.integers(0, 10**9))
def test_no_numbers_break_it(steps: list[tuple[float, int]], total: int | None) -> None:
    pace = Pace("writing", steps[0][1], 0.0)
    now = 0.0
    for passed, done in steps:
        now += passed
        pace.update(done, total, 0, now)
        assert pace.rate is None or pace.rate > 0
        assert pace.eta_s is None or pace.eta_s >= 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h")]
    + [(3 * 3600 + 9 * 60 + 31, "3 h 9 min"), (90_000, "1 d 1 h")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("rate", "words"), [(35.24, "35.2/s"), (1234.5, "1234/s"), (0.5, "30/min"), (1 / 300, "12/h"), (1e-5, "0.036/h")]
)
def test_rates_in_words(rate: float, words: str) -> None:
    assert in_words_rate(rate) == words


@given(st.text(st.characters(exclude_categories=[])))
def test_anything_can_be_printed(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert all(character.isprintable() or character in "\n\t" for character in shown)


def test_a_narrow_terminal_shows_all_numbers_and_steps_that_ended_stand_still() -> None:
    code = """
import time
from framestream.tools.progress import reporting
with reporting("job", "bar") as report:
    report.step("listing", 400_000, 400_000, 17)
    for done in range(15):
        report.step("probing", 123_456 + 30 * done, 400_000, 12_345)
        time.sleep(0.1)
"""
    _, _, shown = on_terminal(code, COLUMNS="80")
    text = ESCAPE.sub("", shown)
    assert re.findall("probing .* 123[0-9]{3}/400000 .* 12345 rejected", text)
    assert re.findall("listing .*[0-9]:[0-9]{2}:[0-9]{2}", text)[-1].endswith("0:00:00")
