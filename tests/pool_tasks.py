"""Tasks for worker processes, in a module that those can import."""

from __future__ import annotations

import os
import signal
import time

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
    elif what.startswith("sleep"):
        time.sleep(float(what[5:]))
    return what
