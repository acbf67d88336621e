"""`fused-rect profile`: measure what fusing brings on this machine, show it, keep it, compare it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fused_rect import files
from fused_rect.cli import positive
from fused_rect.environment import machine

from . import cases, records, report
from .cases import PARTS
from .compare import Comparison, compare
from .measure import Case
from .named import UserError, users_code
from .peers import ALL_SITES, BASES, COPY, FUSED, FUSED_COMPILED, LAYOUTS, MODES, load_model
from .scaling import AXES
from .workloads import RECTIFIERS, WORKLOADS

KINDS = ("json", "csv", "html")  # of files
DTYPES = ("float32", "bfloat16", "float16", "float64")
# No markup and no :emoji: in what is printed: paths, error messages and other people's files are among it.
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
EPILOG = """workloads:
""" + "\n".join(f"  {name:10} {workload.source}" for name, workload in WORKLOADS.items())


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    what = parser.add_argument_group("what to measure, the first four one at a time")
    what.add_argument("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", help="layers of networks, see below")
    what.add_argument("--shape", type=_sizes, metavar="N,C,H,W", help="one layer's input; with --model, the model's")
    what.add_argument("--model", metavar="NAME", help="module:name or file.py:name of a module, or of what returns one")
    what.add_argument("--scaling", choices=AXES, help="time and bytes of bias + rectifier along one axis")
    what.add_argument("--kernel", type=positive, help="of --shape: the kernel's size, by default 3")
    what.add_argument("--stride", type=positive, help="of --shape, by default 1")
    what.add_argument("--out-channels", type=positive, help="of --shape, by default C")
    what.add_argument("--batch", type=positive, help="of --workload: by default the source's, on a CPU what takes ms")
    what.add_argument("--rectifier", nargs="+", choices=RECTIFIERS, help="by default the network's own, or all four")
    what.add_argument("--mode", nargs="+", choices=MODES, default=["training"], help="training: forward and backward")
    what.add_argument("--part", nargs="+", choices=PARTS,
                      help="the convolution with bias and rectifier, bias and rectifier alone, or both")  # fmt: skip
    how = parser.add_argument_group("where and how")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    how.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["contiguous"])
    how.add_argument("--threads", type=positive, default=0, help="by default torch's own choice")
    how.add_argument("--compile", action="store_true", help="time torch.compile too, plain and with our backend")
    how.add_argument("--base", choices=BASES, default=FUSED, help="the peer whose time the others' are divided by")
    how.add_argument("--allocator", choices=("keeping", "default"), default="keeping",
                     help="glibc keeps freed memory, which is steadier; or does as it does by default")  # fmt: skip
    how.add_argument("--processes", type=positive, default=5)
    how.add_argument("--rounds", type=positive, default=5)
    how.add_argument(
        "--budget", type=float, default=90.0, help="seconds; where they do not suffice, there are fewer rounds"
    )
    how.add_argument("--quick", action="store_true", help="20 seconds, 3 processes, two layers a workload")
    out = parser.add_argument_group("results")
    for kind in KINDS:
        out.add_argument(f"--{kind}", type=Path, metavar="FILE")
    out.add_argument("--compare", type=Path, metavar="OLD.json", help="what changed since; status 1 on a regression")
    out.add_argument("--tolerance", type=float, default=0.1, help="a regression is slower by more (0.1: 10 %%)")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(positive(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not 3 <= len(sizes) <= 5:
        raise argparse.ArgumentTypeError(f"must be N,C and 1 to 3 spatial sizes, such as 8,64,56,56, got {text!r}")
    return sizes


def run(options: argparse.Namespace) -> int:
    """Measure, write, print. 2 for options that cannot be, 130 when interrupted, 1 on a regression or a failure."""
    console = Console(**PLAIN)
    try:
        if options.quick:
            options.processes, options.budget = min(options.processes, 3), min(options.budget, 20.0)
        old = checked(options)
        work = cases.asked(options)
        if old is not None and not records.keys(old) & {records.key(case.about) for case in work[1:]}:
            raise ValueError(f"{options.compare} has no case in common with this profile")
        facts = machine(options.device, options.threads)
        frame = measured(work, options, console)
    except (ValueError, TypeError) as error:
        return _failed(error, 2)
    except RuntimeError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted; nothing has been written", 130)
    comparison = None if old is None else compare(old, frame)
    status = _write(frame, facts, comparison, options, console)
    wide = Console(width=max(console.width, 130), **PLAIN)  # a narrower terminal may scroll; its tables stay whole
    report.print_report(frame, wide)
    if comparison is not None:
        report.print_comparison(comparison, options.tolerance, wide)
        status |= bool(comparison.regressions(options.tolerance))
    for case in records.cases(frame):
        if not set(case[case.absent == ""].peer) - {COPY}:
            status = _failed(f"nothing of {case.layer.iloc[0]}, {case['mode'].iloc[0]}, could be timed", 1)
    return status


def _failed(why: object, status: int) -> int:
    print("\n".join(map(records.shown, f"fused-rect profile: {why}".splitlines())), file=sys.stderr)
    return status


def checked(options: argparse.Namespace) -> Any:
    """The records of --compare. Raises ValueError or TypeError for what could only fail after the measuring, and
    RuntimeError for a user's model that fails."""
    paths = {kind: path for kind in KINDS if (path := getattr(options, kind)) is not None}
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise ValueError(f"--{' and --'.join(paths)} name the same file")
    for kind, path in paths.items():
        try:
            files.check(path)
        except OSError as error:
            raise ValueError(f"--{kind} {path} cannot be written: {error.strerror}") from error
    _check_combination(options)
    old = None if options.compare is None else records.load(options.compare)
    try:
        torch.empty(1, device=options.device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    if options.html:
        importlib.import_module(f"{__package__}.page")  # its packages may be missing
    if options.model:
        _check_model(options)
    return old


# What an option is about; given without it, it would be ignored.
NEEDS = {"kernel": "shape", "stride": "shape", "out_channels": "shape", "batch": "workload"}


def _check_combination(options: argparse.Namespace) -> None:
    asked = [f"--{name}" for name in ("workload", "shape", "model", "scaling") if getattr(options, name)]
    if len(asked) > 1 and set(asked) != {"--shape", "--model"}:
        raise ValueError(f"{' and '.join(asked)} are different questions: ask one at a time")
    if options.model or options.scaling:
        needless = [name for name in (*NEEDS, "part") if getattr(options, name)]
        needless += ["rectifier"] if options.model and options.rectifier else []
    else:
        about = "shape" if options.shape else "workload"
        needless = [name for name, need in NEEDS.items() if getattr(options, name) and need != about]
    if needless:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in needless)
        raise ValueError(f"{told}: says nothing about {' '.join(asked) or 'the default workload'}; leave it out")
    if options.base in (FUSED_COMPILED, ALL_SITES) and not options.compile:
        raise ValueError(f"--base {options.base!r} is timed with --compile alone: add it")


def _check_model(options: argparse.Namespace) -> None:
    """Say which of the model's sites fuse() takes, and why not the others, before minutes go into timing it."""
    from fused_rect import fusion

    shape = list(options.shape) if options.shape else None
    model, inputs = load_model(options.model, shape, options.dtype[0], options.device)
    try:
        with users_code(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            fusion.fuse(model)(*inputs)
    except UserError:
        return  # the runs to be timed say it
    sites = fusion.report(model)
    print(f"{sum(site.fused for site in sites)} of {len(sites)} sites of {records.shown(options.model)} are fused")
    for site in sites:
        if not site.fused:
            print(f"  {site}")


def measured(work: list[Case], options: argparse.Namespace, console: Console) -> Any:
    """The records of ``work``; ``console`` shows how far it is."""
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=len(work) * options.processes)
        return records.collect(
            work,
            processes=options.processes,
            rounds=options.rounds,
            budget=options.budget,
            allocator=options.allocator,
            progress=lambda case: bar.update(task, advance=1, description=case),
        )


def _write(
    frame: Any, facts: dict[str, Any], comparison: Comparison | None, options: argparse.Namespace, console: Console
) -> int:
    """The files asked for, all that can be written; 1 where one could not."""
    command, status = shlex.join(["fused-rect", *sys.argv[1:]]), 0
    for kind in KINDS:
        path: Path | None = getattr(options, kind)
        if path is None:
            continue
        try:
            if kind == "json":
                records.save(path, frame, facts, command)
            elif kind == "csv":
                files.replace_text(path, frame.to_csv(index=False))
            else:
                from .page import page

                files.replace_text(path, page(frame, facts, command, comparison))
            console.print(f"written: {records.shown(str(path))}")
        except OSError as error:
            status = _failed(error, 1)
    return status
