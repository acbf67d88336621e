"""`fused-rect profile`: measure what fusing brings on this machine, show it, keep it, compare it."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fused_rect.environment import machine

from . import cases, records, report
from .compare import Comparison, compare
from .measure import Case
from .peers import LAYOUTS, MODES
from .scaling import AXES
from .workloads import RECTIFIERS, WORKLOADS

DTYPES = ("float32", "bfloat16", "float16", "float64")
EPILOG = """workloads:
""" + "\n".join(f"  {name:10} {workload.source}" for name, workload in WORKLOADS.items())


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    what = parser.add_argument_group("what to measure, the first four one at a time")
    what.add_argument("--workload", nargs="+", choices=WORKLOADS, metavar="NAME", help="layers of networks, see below")
    what.add_argument("--shape", type=_sizes, metavar="N,C,H,W", help="one layer's input; with --model, the model's")
    what.add_argument("--model", metavar="FACTORY", help="module:factory or file.py:factory, before and after fuse()")
    what.add_argument("--scaling", choices=AXES, help="time and bytes of bias + rectifier along one axis")
    what.add_argument("--kernel", type=_positive, help="of --shape: the kernel's size, by default 3")
    what.add_argument("--stride", type=_positive, help="of --shape, by default 1")
    what.add_argument("--out-channels", type=_positive, help="of --shape, by default C")
    what.add_argument("--batch", type=_positive, help="of --workload: by default the source's, on a CPU what takes ms")
    what.add_argument("--rectifier", nargs="+", choices=RECTIFIERS, help="by default the network's own, or all four")
    what.add_argument("--mode", nargs="+", choices=MODES, default=["training"], help="training: forward and backward")
    what.add_argument("--part", nargs="+", choices=("layer", "epilogue"),
                      help="the convolution with bias and rectifier, bias and rectifier alone, or both")  # fmt: skip
    how = parser.add_argument_group("where and how")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--dtype", choices=DTYPES, default="float32")
    how.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    how.add_argument("--threads", type=_positive, default=0, help="by default torch's own choice")
    how.add_argument("--compile", action="store_true", help="time torch.compile too, plain and with our backend")
    how.add_argument("--processes", type=_positive, default=5)
    how.add_argument("--rounds", type=_positive, default=5)
    how.add_argument(
        "--budget", type=float, default=90.0, help="seconds; where they do not suffice, there are fewer rounds"
    )
    how.add_argument("--quick", action="store_true", help="20 seconds, 3 processes, two layers a workload")
    out = parser.add_argument_group("results")
    for kind in ("json", "csv", "html"):
        out.add_argument(f"--{kind}", type=Path, metavar="FILE")
    out.add_argument("--compare", type=Path, metavar="OLD.json", help="what changed since; status 1 on a regression")
    out.add_argument("--tolerance", type=float, default=0.1, help="a regression is slower by more (0.1: 10 %%)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(_positive(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not 3 <= len(sizes) <= 5:
        raise argparse.ArgumentTypeError(f"must be N,C and 1 to 3 spatial sizes, such as 8,64,56,56, got {text!r}")
    return sizes


def run(options: argparse.Namespace) -> int:
    """Measure, print, write. 1 on a regression (or when measuring fails), 2 for options that cannot be, else 0."""
    console = Console()
    if options.quick:
        options.processes, options.budget = min(options.processes, 3), min(options.budget, 20.0)
    try:
        old = _checked(options)
        work = cases.asked(options)
    except (ValueError, RuntimeError, TypeError) as error:
        print(f"fused-rect profile: {error}", file=sys.stderr)
        return 2
    try:
        frame = _measured(work, options, console)
    except RuntimeError as error:
        print(f"fused-rect profile: {error}", file=sys.stderr)
        return 1
    report.print_report(frame, console)
    comparison = None if old is None else compare(old, frame)
    if comparison is not None:
        report.print_comparison(comparison, options.tolerance, console)
    _write(frame, comparison, options, console)
    if comparison is not None and not comparison.changes:
        print(f"fused-rect profile: {options.compare} has no case in common with this profile", file=sys.stderr)
        return 2
    return int(comparison is not None and bool(comparison.regressions(options.tolerance)))


def _checked(options: argparse.Namespace) -> Any:
    """The records of --compare. Raises ValueError or RuntimeError for what could only fail after the measuring."""
    for kind in ("json", "csv", "html"):
        path: Path | None = getattr(options, kind)
        if path is not None and not os.access(path.parent, os.W_OK):
            raise ValueError(f"--{kind} {path}: {path.parent} is no folder that can be written to")
    _check_combination(options)
    try:
        torch.empty(1, device=options.device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    if options.model:
        _check_model(options)
    if options.html:
        importlib.import_module(f"{__package__}.page")  # its packages may be missing
    return None if options.compare is None else records.load(options.compare)


# What an option is about; given without it, it would be ignored.
NEEDS = {"kernel": "shape", "stride": "shape", "out_channels": "shape", "batch": "workload"}


def _check_combination(options: argparse.Namespace) -> None:
    asked = [f"--{name}" for name in ("workload", "shape", "model", "scaling") if getattr(options, name)]
    if len(asked) > 1 and set(asked) != {"--shape", "--model"}:
        raise ValueError(f"{' and '.join(asked)} are different questions: ask one at a time")
    if options.model or options.scaling:
        needless = [name for name in ("kernel", "stride", "out_channels", "batch", "part") if getattr(options, name)]
        needless += ["rectifier"] if options.model and options.rectifier else []
    else:
        about = "shape" if options.shape else "workload"
        needless = [name for name, need in NEEDS.items() if getattr(options, name) and need != about]
    if needless:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in needless)
        raise ValueError(f"{told}: says nothing about {' '.join(asked) or 'the default workload'}; leave it out")


def _check_model(options: argparse.Namespace) -> None:
    """Say which of the model's sites fuse() takes, and why not the others, before minutes go into timing it."""
    from fused_rect import fusion

    from .peers import load_model

    shape = list(options.shape) if options.shape else None
    model, _ = load_model(options.model, shape, options.dtype, options.device)
    sites = fusion.report(model)
    print(f"{sum(site.fused for site in sites)} of {len(sites)} sites of {options.model} are fused")
    for site in sites:
        if not site.fused:
            print(f"  {site}")


def _measured(work: list[Case], options: argparse.Namespace, console: Console) -> Any:
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=len(work) * options.processes)
        return records.collect(
            work,
            processes=options.processes,
            rounds=options.rounds,
            budget=options.budget,
            progress=lambda case: bar.update(task, advance=1, description=case),
        )


def _write(frame: Any, comparison: Comparison | None, options: argparse.Namespace, console: Console) -> None:
    command = shlex.join(["fused-rect", *sys.argv[1:]])
    facts = machine(options.device, options.threads)
    if options.json:
        records.save(options.json, frame, facts, command)
    if options.csv:
        frame.to_csv(options.csv, index=False)
    if options.html:
        from .page import page

        options.html.write_text(page(frame, facts, command, comparison))
    for kind in ("json", "csv", "html"):
        if path := getattr(options, kind):
            console.print(f"written: {path}")
