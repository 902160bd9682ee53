"""The `framestream` command: finds the subcommand, builds its parser from its function, turns errors into sentences.

Each subcommand is one typed function whose docstring is its help page. Only the chosen one is imported, so that
`framestream --help` answers at once.

Exit codes: 0 done, 1 the job found something wrong, 2 the request itself is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from framestream.pipeline.errors import ConfigError, FramestreamError


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives, and which of its parameters stand on the command line without a name."""

    module: str
    function: str
    summary: str
    positional: tuple[str, str] | None = None  # (parameter, nargs or "" for exactly one)
    parses_itself: bool = False  # the function takes the raw arguments


COMMANDS = {
    "shard": Command("shard", "shard", "turn videos into shards", ("inputs", "+")),
    "verify": Command("verify", "verify", "read a shard set back and check everything", ("folder", "")),
    "inspect": Command("inspect_command", "inspect", "look at shards: all of them, or one sample", ("target", "+")),
    "train": Command("train", "main", "train a model from a config", parses_itself=True),
    "ablate": Command("ablate", "ablate", "compare frame masks and fast-slow frames, over seeds", ("config", "?")),
    "audit": Command("audit", "audit", "prove that a model is causal, or show where it leaks", ("target", "")),
    "demo": Command("demo", "demo", "videos to a trained model and a report, in one go"),
    "bench": Command("bench", "bench", "measure this machine, ours and others side by side", ("name", "")),
    "doctor": Command("doctor", "main", "say what this machine can do, or what limits a loader", parses_itself=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"framestream {metadata.version('framestream')}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"framestream: unknown command {argv[0]!r}; commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(argv[0], argv[1:])
    except ConfigError as error:
        print(f"framestream {argv[0]}: {error}", file=sys.stderr)
        return 2
    except FramestreamError as error:
        print(f"framestream {argv[0]}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        place = error.filename2 or error.filename  # of two, the one that was to be written
        where = f"{place}: " if place else ""
        print(f"framestream {argv[0]}: {where}{error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nframestream {argv[0]}: stopped. The same command goes on where it can.", file=sys.stderr)
        return 130


def run(name: str, argv: Sequence[str]) -> int:
    """Parse `argv` for one subcommand and run it. Unknown options exit with code 2 and the usage line."""
    command = COMMANDS[name]
    function: Callable[..., int] = getattr(import_module(f"framestream.tools.{command.module}"), command.function)
    if command.parses_itself:
        return function(argv)
    parser = build_parser(name, function, command.positional)
    return function(**vars(parser.parse_args(list(argv))))


def build_parser(name: str, function: Callable[..., int], positional: tuple[str, str] | None) -> ArgumentParser:
    """A parser with one option per parameter: types from its annotations, help from its docstring.

    `some_name` becomes `--some-name`; a bool becomes a pair of flags, `--name` and `--no-name`; a list takes one
    or more words.
    """
    page = docstring_parser.parse(function.__doc__ or "")
    parser = ArgumentParser(
        prog=f"framestream {name}",
        description=page.description or "",
        epilog=page.returns.description if page.returns else None,
        formatter_class=type("HelpFormatter", (DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
    )
    described = {p.arg_name: p.description or "" for p in page.params}
    hints = get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        about = {"help": described.get(parameter.name, "")}
        option = "--" + parameter.name.replace("_", "-")
        if positional is not None and parameter.name == positional[0]:
            shape = {"nargs": positional[1]} if positional[1] else {"type": hints[parameter.name]}
            parser.add_argument(parameter.name, **about, **shape)
        elif hints[parameter.name] is bool:
            flag = ActionYesNo(yes_prefix="", no_prefix="no-")
            parser.add_argument(option, action=flag, default=parameter.default, **about)
        elif parameter.default is inspect.Parameter.empty:
            parser.add_argument(option, **_type(hints[parameter.name]), required=True, **about)
        else:
            parser.add_argument(option, **_type(hints[parameter.name]), default=parameter.default, **about)
    return parser


def _type(hint: Any) -> dict[str, Any]:
    return {"type": get_args(hint)[0], "nargs": "+"} if get_origin(hint) is list else {"type": hint}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: framestream COMMAND ...\n\n"
        "Video to frame-causal, fast-slow training batches, and a model trained on them.\n\n"
        f"{lines}\n\n"
        "`framestream COMMAND --help` says what a command takes. `framestream demo` shows them all at work."
    )


if __name__ == "__main__":
    sys.exit(main())
