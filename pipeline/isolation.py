"""One helper process per process, started when first needed, replaced when it dies or does not answer.

Made for `subprocess`, because worker processes are daemons and may not have children through `multiprocessing`.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import threading
from typing import Any

from .decode_child import receive, send
from .fresh_python import fresh_python

_FAILURES = 32  # Decord keeps the input of every open that fails; start afresh before that adds up


class HelperDied(Exception):
    """The helper process ended or was ended while it worked on a request; the message says how."""


class Helper:
    """A `framestream.pipeline.decode_child` that belongs to this process. Safe with threads, forks and spawns."""

    def __init__(self) -> None:
        self._forget()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _forget(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._failures = 0

    def _after_fork(self) -> None:
        """The process inherited is the parent's: let go of its pipes, and leave it alone."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # not ours to wait for
        self._forget()

    @property
    def pid(self) -> int | None:
        """Process number of the helper, None while there is none."""
        return None if self._process is None else self._process.pid

    def request(self, fields: dict[str, Any], body: bytes, timeout_s: float) -> tuple[dict[str, Any], bytearray]:
        """Send one request and wait for the answer.

        Raises:
            HelperDied: it crashed, was killed, or took longer than `timeout_s` and was killed for it. The next
                request starts another one.
        """
        with self._lock:
            process = self._started()
            late = threading.Event()

            def kill() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(timeout_s, kill)
            timer.start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                send(process.stdin, fields, body)  # type: ignore[arg-type]
                answer, data = receive(process.stdout)  # type: ignore[arg-type]
            except (OSError, EOFError, ValueError) as err:
                how = self._end(process)
                raise HelperDied(f"took longer than {timeout_s:g} s" if late.is_set() else how) from err
            except BaseException:  # an interrupt between question and answer: the answer must not meet the next
                self._end(process)
                raise
            finally:
                timer.cancel()
            self._failures += "error" in answer
            if self._failures >= _FAILURES:
                self._end(process)
            return answer, data

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._failures = 0
            command, environment = fresh_python("from framestream.pipeline.decode_child import main; main()")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
            )
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """Make sure that the process is gone, and say how it went."""
        self._process = None
        try:
            code = process.wait(timeout=1)  # its pipe closes a moment before it can be waited for
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        if code < 0:
            names = {int(known): known.name for known in signal.Signals}
            return f"was ended by {names.get(-code, f'signal {-code}')}"
        return f"ended with exit status {code}"

    def close(self) -> None:
        """End the helper; a later request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._end(process)


_helper: Helper | None = None
_helper_lock = threading.Lock()


def helper() -> Helper:
    """The helper of this process."""
    global _helper
    with _helper_lock:
        if _helper is None:
            _helper = Helper()
        return _helper
