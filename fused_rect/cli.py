"""The `fused-rect` command: one table of subcommands, each a module that is imported only when it is the one asked for.

A subcommand's module has `configure(parser)`, which adds its arguments, and `run(options)`, which returns the exit
status.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .version import __version__


@dataclass(frozen=True)
class Command:
    module: str
    help: str
    extra: str  # the optional dependencies it needs: pip install 'fused-rect[extra]'


COMMANDS = {
    "demo": Command("fused_rect.demo", "train a small network on real digits, fused and eager, and compare", "demo"),
    "profile": Command("fused_rect.perf.profiling.cli", "measure what fusing brings on this machine", "perf"),
    "inspect": Command("fused_rect.perf.inspection.cli", "compile the kernels for GPUs, print their figures", "perf"),
    "study": Command("fused_rect.study.cli", "repeat the evaluation of Xu et al. 2015", "study"),
    "env": Command("fused_rect.environment", "print which implementation runs here, and why", ""),
}


# What a terminal that is not UTF-8 gets instead; other characters become "?".
SPELLED = {"µ": "u", "▲": "+", "▼": "-", "≈": "~", "–": "-", "×": "x", "·": "-", "…": ".", "±": "+"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


def _print_on_any_terminal() -> None:
    """Neither a terminal's encoding nor a path that is no text stops a command whose work is done."""
    codecs.register_error("fused_rect.spelled", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="fused_rect.spelled")


def main(arguments: Sequence[str] | None = None) -> int:
    _print_on_any_terminal()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    parser = argparse.ArgumentParser("fused-rect", description="Fused bias + rectifier for convolutional networks.")
    parser.add_argument("--version", action="version", version=f"fused-rect {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    run = None
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if name == chosen:
            module = _import(name, command)
            module.configure(subparser)
            run = module.run
    options = parser.parse_args(arguments)
    assert run is not None  # argparse has exited for a name that is not in the table
    status: int = run(options)
    return status


def positive(text: str) -> int:
    """The type of an argument that is a number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _import(name: str, command: Command):  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("fused_rect"):
            raise
        raise SystemExit(
            f"fused-rect {name} needs the package {missing.name}: pip install 'fused-rect[{command.extra}]'"
        ) from missing


if __name__ == "__main__":
    raise SystemExit(main())
