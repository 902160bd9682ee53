"""Tasks for worker processes, in a module that those can import."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from contextlib import suppress

from framestream.pipeline.errors import ConfigError, SampleError


def act(what: str) -> str:
    """Do what the word says, and answer it."""
    if what == "hang":
        time.sleep(600)
    elif what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "refuse":
        raise SampleError("clip x cannot be used")
    elif what == "surprise":
        raise KeyError("moov")
    elif what == "config":
        raise ConfigError("no encoder")
    elif what == "large":
        return "x" * 5_000_000
    elif what == "hang up":
        threading.Thread(target=_hang_up).start()
    elif what.startswith("sleep"):
        time.sleep(float(what[5:]))
    return what


def _hang_up() -> None:
    """Shut the pipe to the parent soon, and let the process end later."""
    time.sleep(0.2)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)
    time.sleep(2.0)
