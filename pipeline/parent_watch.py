"""Helper processes that do not outlive the process they work for, however that ends."""

from __future__ import annotations

import os
import threading
import time

_CHECK_S = 1.0


def leave_with_parent(parent: int | None = None) -> None:
    """End this process soon after its parent is gone: also in the middle of a call that never returns.

    Args:
        parent: process number of the parent, so that one which is gone already is noticed; None takes what is there.
    """
    parent = os.getppid() if parent is None else parent
    threading.Thread(target=_watch, args=(parent,), name="framestream-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_S)
    os._exit(1)
