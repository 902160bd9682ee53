"""Starting a Python that imports nothing from the current folder."""

from __future__ import annotations

import os
import sys

_LEAVE_CURRENT_FOLDER = "import sys\nif sys.path[0] == '':\n    sys.path.pop(0)\n"


def fresh_python(code: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a Python that runs `code` and can import what this process can.

    `-c` and `-m` put the current folder first on the path, where a `numpy.py` among somebody's videos would be
    found and run. The option against that, `-P`, needs Python 3.11.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return [sys.executable, "-c", _LEAVE_CURRENT_FOLDER + code], {**os.environ, "PYTHONPATH": path}
