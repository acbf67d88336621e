"""`fused-rect inspect`: compiles the kernels for real targets, on any machine, and prints one table of their figures.

docs/inspect.md explains each column and what the predicted fraction leaves out. No time is measured or claimed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from typing import Any
from unittest import mock

import rich
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import figures, roofline
from .compiling import DTYPES, LAYOUTS, RECTIFIERS, Step, gpu_target

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# More than 8M elements each; the second with nothing that a vector of 4 or 8 elements divides.
SHAPES = ((32, 64, 64, 64), (32, 51, 71, 73))
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WIDTH = 172  # of the table where the output is no terminal
COLUMNS = {
    "i/el": "instructions per element",
    "body": "of them after the prologue",
    "wide": "32 x 32 -> 64 bit multiplies per element",
    "regs": "registers a thread (AMD: VGPRs)",
    "spill": "bytes a thread in local memory",
    "smem": "bytes of shared memory a program",
    "bar": "barriers a program passes",
    "ld": "bits of the widest load",
    "st": "bits of the widest store",
    "B/el": "bytes per element",
    "programs": "launched",
    "rows": "a program",
    "KB/SM": "of loads in flight a multiprocessor",
    "roofline": "predicted fraction, and what bounds it",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", nargs="+", type=_target, default=TARGETS, help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--rectifier", nargs="+", choices=RECTIFIERS, default=RECTIFIERS, metavar="RECTIFIER")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help=" ".join(DTYPES))
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS, metavar="LAYOUT", help=" ".join(LAYOUTS)
    )
    shapes = " ".join(map(shape_name, SHAPES))
    parser.add_argument("--shape", nargs="+", type=_shape, default=SHAPES, metavar="NxCxHxW", help=f"default: {shapes}")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, instruction classes included")


def run(options: argparse.Namespace) -> int:
    steps = [
        Step(*variant)
        for variant in product(options.target, options.rectifier, options.dtype, options.layout, options.shape)
    ]
    found = collect(steps)
    if options.json:
        json.dump([{"step": asdict(step), "kernels": found[step]} for step in steps], sys.stdout, indent=1)
        print()
    else:
        show(steps, found)
    return 0


def collect(steps: Sequence[Step], processes: int = 2) -> dict[Step, list[dict[str, Any]]]:
    """The figures of every kernel of every step, from processes that compile, whatever this one interprets."""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    context, most = multiprocessing.get_context("spawn"), min(processes, len(steps) or 1)
    with (
        ProcessPoolExecutor(most, context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        with mock.patch.dict(os.environ, compiling, clear=True):  # the processes start at the first submission
            found = {step: pool.submit(figures.of_step, step) for step in steps}
        done = as_completed(found.values())
        for future in progress.track(done, total=len(found), description="compiling"):
            future.result()
    return {step: future.result() for step, future in found.items()}


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def show(steps: Sequence[Step], found: dict[Step, list[dict[str, Any]]]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("target", "kernel", "dtype", "layout", "shape"):
        table.add_column(name, no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "roofline" else "right", no_wrap=True)
    previous = steps[0].target
    for step in steps:
        if step.target != previous:
            table.add_section()
            previous = step.target
        for kernel in found[step]:
            table.add_row(*_row(step, kernel))
    console.print(table)
    explain(console, {step.target for step in steps})


def _row(step: Step, k: dict[str, Any]) -> list[str]:
    name = "finishing sum" if k["kernel"] == "finish" else f"{k['kernel']} {step.rectifier}"
    elementwise = k["kernel"] != "finish"
    counts = [k["instructions"], k["body"], k["by_class"].get("wide multiply", 0.0)]
    fraction = "" if k["fraction"] is None else f"{k['fraction']:.2f} {k['bound']}"
    return [
        step.target,
        name,
        SHORT[step.dtype],
        step.layout,
        shape_name(step.shape),
        *(f"{count:.2f}" if elementwise else "" for count in counts),
        str(k["registers"]),
        _flagged(k["spills"]),
        str(k["shared"]),
        f"{k['barriers']}" + (f" [red]({k['looped']} looped)[/]" if k["looped"] else ""),
        str(8 * k["load"]),
        str(8 * k["store"]),
        f"{k['bytes_per_element']:.2f}",
        str(k["programs"]),
        str(k["rows"]) if elementwise else "",
        f"{k['in_flight_sm'] / 1024:.0f}" if k["in_flight_sm"] else "",
        fraction,
    ]


def _flagged(count: int) -> str:
    return f"[red]{count}[/]" if count else "0"


def explain(console: Console, targets: set[str]) -> None:
    console.print("; ".join(f"[bold]{name}[/] {text}" for name, text in COLUMNS.items()))
    gpus = [gpu for target, gpu in roofline.GPUS.items() if target in targets]
    if not gpus:
        return
    console.print("\nThe roofline column is a model, no measurement. It assumes:")
    for assumption in roofline.ASSUMPTIONS:
        console.print(f"  - {assumption}")
    for gpu in gpus:
        console.print(
            f"  - {gpu.name}: {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:.3f} GHz, "
            f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.latency * 1e9:.0f} ns, so {gpu.needed / 1024:.0f} KB/SM in flight"
        )


def _target(text: str) -> str:
    try:
        gpu_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or not 2 <= len(parts) <= 5:
        raise argparse.ArgumentTypeError(f"shape must be like 32x64x56x56, channels second, got {text!r}")
    return tuple(map(int, parts))
