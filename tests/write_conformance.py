"""Measures every reader on every kind of video and writes the page that says how it went.

    .venv/bin/python tests/write_conformance.py --torchcodec FOLDER --decord2 FOLDER [--output docs/conformance.md]

A folder is one into which that package was installed alone (`pip install --target FOLDER --no-deps decord2`). Without
it, the reader is taken from the environment; `--partial` leaves out readers that are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bare_readers import BARE_READERS, ReaderFailed, verdict
from colour_reference import CASES, deviation, write
from conformance import check, check_colour, colour_deviation, expected, expected_colour
from conformance_page import PAGE, Column, page_of
from video_kinds import KINDS

_SILENCE_S = 120.0  # after which a process that measures is given up


# -- measuring, in a process of its own -----------------------------------------------------------------------


def measure(reader: str, folder: Path, skip: int) -> None:
    """Print a line of JSON: what `reader` is, and one for each clip from number `skip` on."""
    print(json.dumps(version(reader)), flush=True)
    for name in [*KINDS, *CASES][skip:]:
        data = (folder / str([*KINDS, *CASES].index(name))).read_bytes()
        guarded, bare = kind_cells(data, name, reader) if name in KINDS else colour_cells(data, name, reader)
        print(json.dumps({"name": name, "guarded": guarded, "bare": bare}), flush=True)


def kind_cells(data: bytes, kind: str, reader: str) -> tuple[str, str]:
    try:
        check(data, kind, reader)
        reason = expected(kind, reader)
        guarded = f"refused: {reason}" if reason else "exact"
    except Exception as err:  # whatever it is, the page is to say so
        guarded = f"NOT AS EXPECTED: {type(err).__name__}"
    return guarded, verdict(BARE_READERS[reader](data), KINDS[kind].shown) if reader in BARE_READERS else ""


def colour_cells(data: bytes, name: str, reader: str) -> tuple[str, str]:
    case = CASES[name]
    bare = ""
    try:
        check_colour(data, case, reader)
        reason = expected_colour(case, reader)
        guarded = f"refused: {reason}" if reason else shown(colour_deviation(data, case, reader))
    except Exception as err:
        guarded = f"NOT AS EXPECTED: {type(err).__name__}"
    if reader in BARE_READERS:
        try:
            bare = shown(deviation(BARE_READERS[reader](data)([1])[0].numpy(), case))
        except ReaderFailed as err:
            bare = str(err)
    return guarded, bare


def shown(mean_and_worst: tuple[float, float]) -> str:
    return "{:.1f} / {:.1f}".format(*mean_and_worst)


def version(reader: str) -> dict[str, str]:
    """Name and version of a reader's package and of the libavcodec that it uses."""
    if reader == "pyav":
        import av

        codec = ".".join(map(str, av.library_versions["libavcodec"]))
        return {"name": "PyAV", "version": av.__version__, "ffmpeg": f"FFmpeg {av.ffmpeg_version_info}, {codec}"}
    if reader == "torchcodec":
        import torchcodec
        from torchcodec import _core

        found: Any = _core.get_ffmpeg_library_versions()
        codec = ".".join(map(str, found["libavcodec"]))
        number = torchcodec.__version__.split("+")[0]
        return {"name": "TorchCodec", "version": number, "ffmpeg": f"FFmpeg {found['ffmpeg_version']}, {codec}"}
    import decord

    beside = Path(decord.__file__).parent.parent
    libraries = [*beside.glob("decord.libs/libavcodec-*"), *beside.glob("decord2.libs/libavcodec-*")]
    codec = libraries[0].name.split(".so.")[1] if libraries else "unknown"
    name = "decord2" if (beside / "decord2.libs").exists() else "Decord"
    return {"name": name, "version": decord.__version__, "ffmpeg": codec}


# -- running that ---------------------------------------------------------------------------------------------


def fill(column: Column, folder: Path) -> None:
    """Measure a column. A process that falls silent is ended, and the next one goes on behind what it hung on."""
    names = [*KINDS, *CASES]
    while len(column.guarded) < len(names):
        for line in _lines(column, folder, skip=len(column.guarded)):
            if "ffmpeg" in line:
                column.version = line
                continue
            column.guarded[line["name"]], column.bare[line["name"]] = line["guarded"], line["bare"]
            print(f"\r{column.title}: {len(column.guarded)} of {len(names)}", end="", file=sys.stderr)
        if not column.version:
            raise SystemExit(f"{column.reader} does not start; is it installed (--torchcodec, --decord2)?")
        if len(column.guarded) < len(names):
            name = names[len(column.guarded)]
            column.guarded[name], column.bare[name] = "NOT AS EXPECTED: hangs or crashes", "hangs or crashes"
    print(file=sys.stderr)


def _lines(column: Column, folder: Path, skip: int) -> Iterable[dict[str, Any]]:
    path = os.pathsep.join(filter(None, [column.path, os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, __file__, "--measure", column.reader, str(folder), str(skip)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    told: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told.put(line)
        told.put("")

    threading.Thread(target=listen, daemon=True).start()
    try:
        while line := told.get(timeout=_SILENCE_S):
            yield json.loads(line)
    except queue.Empty:
        pass
    finally:
        process.kill()
        process.wait()


def main(argv: list[str] | None = None) -> None:
    """Measure and write, or be the process that measures."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--measure"]:
        measure(arguments[1], Path(arguments[2]), int(arguments[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--torchcodec", default="", metavar="FOLDER", help="where TorchCodec is, if not installed")
    parser.add_argument("--decord2", default="", metavar="FOLDER", help="where decord2 is; it has Decord's name")
    parser.add_argument("--partial", action="store_true", help="leave out readers that are not there")
    chosen = parser.parse_args(arguments)
    if not chosen.partial and not (chosen.decord2 and (chosen.torchcodec or find_spec("torchcodec"))):
        parser.error("the page has columns for TorchCodec and decord2: say where they are, or --partial")
    columns = [Column("pyav"), Column("decord")]
    columns += [Column("decord", chosen.decord2)] if chosen.decord2 else []
    if chosen.torchcodec or find_spec("torchcodec"):
        columns.append(Column("torchcodec", chosen.torchcodec))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, name in enumerate([*KINDS, *CASES]):
            made = folder / f"{number}-made"
            made.mkdir()
            case = CASES.get(name)
            path = KINDS[name].make(made) if case is None else write(case, made / f"clip{case.suffix}")
            path.replace(folder / str(number))
        for column in columns:
            fill(column, folder)
    chosen.output.write_text(page_of(columns))


if __name__ == "__main__":
    main()
