"""`fused-rect study`: the evaluation of Xu et al. 2015 on the data, network and scale that the options name.

Without options, a study of minutes on two cores: Fashion-MNIST where it is installed, else the digits. On many GPUs:

    torchrun --nproc-per-node 8 -m fused_rect.cli study --scale full --data cifar-10 --root DIR --channels-last
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..environment import cores
from . import batches, cost, data, distributed, folder, report, runner
from .formats import DataError
from .protocol import SMALL, Protocol, public
from .training import Job
from .variants import VARIANTS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--scale",
        choices=("small", "full"),
        default="small",
        help="start from settings for a CPU, or from the public ones",
    )
    add("--root", type=Path, metavar="DIR", help="folder that holds the data set")
    add("--variants", default=",".join(VARIANTS), metavar="A,B", help=f"of {', '.join(VARIANTS)}; by default all")
    add("--seeds", type=int, default=5, metavar="N", help="paired seeds (default 5)")
    add("--first-seed", type=int, default=0, metavar="N", help="the first of them (default 0)")
    add("--out", type=Path, default=Path("study"), metavar="DIR", help="folder of report and runs (default study)")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--jobs", type=int, default=0, metavar="N", help="runs at a time, one thread each (default: all cores)")
    add("--evaluate-every", type=int, default=10, metavar="N", help="epochs between points of the curves (default 10)")
    add("--checkpoint-every", type=int, default=100, metavar="N", help="updates between checkpoints (default 100)")
    add("--tensorboard", action="store_true", help="write TensorBoard events too (pip install tensorboard)")
    add("--no-cost", action="store_true", help="leave out the timing of fused against eager")
    group = parser.add_argument_group("protocol", "settings recorded with the results; defaults are those of the scale")
    for f in fields(Protocol):
        flag = f"--{f.name.replace('_', '-')}"
        if isinstance(f.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=f.metadata["help"])
        else:
            kind, choices = type(f.default), f.metadata["choices"]
            metavar = None if choices else "X"
            group.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=f.metadata["help"])


def run(options: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # the tables' width, in a log
    try:
        return _run(options, console)
    except (DataError, ValueError, OSError) as error:
        console.print(f"fused-rect study: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("fused-rect study: stopped; the same command goes on from here", markup=False, highlight=False)
        return 130  # what a shell says of a process that an interrupt ended
    finally:
        distributed.stop()


def _run(options: argparse.Namespace, console: Console) -> int:
    _check(options)
    names = _variants(options.variants)
    base = SMALL if options.scale == "small" else public(options.network or "nin", options.data or "")
    dataset = data.load(options.data or base.data, options.root)
    protocol = _protocol(options, dataset)
    batches.check(dataset, protocol)
    device = distributed.start(options.device)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs_folder = options.out / "runs"
    work = [
        Job(
            protocol, name, seed, runs_folder / f"{name}-seed{seed}",
            options.evaluate_every, options.checkpoint_every, options.tensorboard,
        )
        for seed in seeds
        for name in names
    ]  # fmt: skip
    first, processes = distributed.rank() == 0, distributed.world_size()
    claim = folder.claimed(options.out, protocol, dataset.fingerprint(), processes)
    with claim if first else contextlib.nullcontext():
        progress = _progress(console if first else None, len(work))
        found = runner.run_all(work, options.root, device, _jobs(options, device), progress)
        costs = [] if options.no_cost or processes > 1 else cost.measure(protocol, names, dataset, device)
        if first:
            command = "fused-rect " + shlex.join(sys.argv[1:] or ["study"])
            value = report.results(protocol, dataset, found, costs, command, device, processes)
            report.write(options.out, value)
            report.show(console, value)
            console.print(f"{options.out / 'report.html'}, {options.out / 'results.json'}", highlight=False)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("seeds", "evaluate_every"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("first_seed", "jobs", "checkpoint_every"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(options, name)}")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")


def _variants(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"--variants must name some of {', '.join(VARIANTS)}, got {name!r}")
    return [name for name in VARIANTS if name in names]


def _protocol(options: argparse.Namespace, dataset: data.Dataset) -> Protocol:
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(Protocol)}
    given = {name: value for name, value in given.items() if value is not None and name != "data"}
    if options.scale == "small":
        base = replace(SMALL, image=0) if dataset.name == "digits" else SMALL
    else:
        base = public(options.network or "nin", dataset.name)
    if "epochs" in given:
        given.setdefault("iterations", 0)
    elif "iterations" in given:
        given["epochs"] = 0
    return replace(base, data=dataset.name, **given)


def _jobs(options: argparse.Namespace, device: torch.device) -> int:
    if distributed.world_size() > 1 or device.type != "cpu":
        return 1
    return options.jobs or cores()


def _progress(console: Console | None, total: int) -> runner.Report:
    done = 0

    def report_one(job: Job, result: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if console is not None:
            final = result["final"]
            said = (
                f"diverged, {result['diverged']}"
                if result["diverged"]
                else f"error {100 * final['test_error']:.2f} %, log-loss {final['test_loss']:.3f}"
            )
            name = f"{VARIANTS[job.variant].label}, seed {job.seed}"
            console.print(f"[{done}/{total}] {name}: {said}", markup=False, highlight=False)

    return report_one
