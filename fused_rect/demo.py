"""`fused-rect demo`: a small Network-in-Network learns real digits, with fused layers and with torch's, side by side.

The study's network, digits and training loop, at a quarter of the network's width: both nets start from the same
weights and see the same batches in the same order, so that losses can be subtracted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  which has the digits: missing, it is named before anything runs
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from . import files
from .cli import positive
from .environment import machine
from .random import new_seed, slopes
from .rules import RULES
from .study import data
from .study.cost import Cost, measure
from .study.protocol import SMALL, Protocol
from .study.training import Job, Run
from .study.variants import VARIANTS

# A learning rate at which rounding is little amplified: at 0.01, float32 runs part after some 100 steps.
PROTOCOL = replace(
    SMALL, data="digits", image=0, train_images=0, batch_size=64, width=1 / 4, law="slope", lr=0.005
)  # fmt: skip
# Of the study's variants one for each rectifier, under the name that torch has for it.
RECTIFIERS = {RULES[v.rectifier].module: v.key for v in VARIANTS.values()}
# The bias gradient sums in another order than torch's: the last digit differs, which flips the choice of a pool or the
# side of a rectifier here and there. In float32 that moved single losses by up to 0.1 in ten trainings, so what is held
# to be equal is float64's, where it moved none by more than 1e-13.
TOLERANCE = {torch.float32: 0.5, torch.float64: 1e-6}


class ReferenceRReLU(nn.RReLU):
    """RReLU in torch operations with the slopes that the fused layer draws, where nn.RReLU would draw others."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.leaky_relu(input, (self.lower + self.upper) / 2)
        slope = slopes(new_seed(input.device), input.shape, self.lower, self.upper, dtype=input.dtype)
        return torch.where(input <= 0, input * slope, input)


@dataclass(frozen=True)
class Result:
    """One row of the table. Losses are means over the last epoch, differences the largest of all steps."""

    rectifier: str
    fused_loss: float
    eager_loss: float
    fused_accuracy: float
    eager_accuracy: float
    largest_loss_difference: float
    largest_loss_difference_float64: float
    cost: Cost

    @property
    def agrees(self) -> bool:
        return (  # false for NaN
            self.largest_loss_difference <= TOLERANCE[torch.float32]
            and self.largest_loss_difference_float64 <= TOLERANCE[torch.float64]
        )


def contest(
    rectifier: str, protocol: Protocol, seed: int, images: data.Dataset, device: torch.device,
    advance: Callable[[], Any],
) -> Result:  # fmt: skip
    """Train the nets of one rectifier and compare them; ``advance`` is called after each of 2 * epochs."""
    variant = RECTIFIERS[rectifier]

    def start(epilogue: str, dtype: torch.dtype) -> Run:
        job = Job(replace(protocol, epilogue=epilogue), variant, seed, Path("unused"))
        run = Run(job, images, device, dtype)
        for module in run.model.modules():
            if type(module) is nn.RReLU:
                module.__class__ = ReferenceRReLU  # its numbers are compared; its time and bytes are torch's own
        return run

    runs = {dtype: (start("fused", dtype), start("eager", dtype)) for dtype in TOLERANCE}
    losses = {dtype: train(*pair, advance) for dtype, pair in runs.items()}
    apart = {dtype: (ours - theirs).abs().max().item() for dtype, (ours, theirs) in losses.items()}
    (fused, eager), (ours, theirs) = runs[torch.float32], losses[torch.float32][:, -runs[torch.float32][0].per_epoch :]
    accuracies = [1 - run.measure(run.report, training=False)[1] for run in (fused, eager)]
    (cost,) = measure(protocol, [variant], images, device)
    return Result(
        rectifier, ours.mean().item(), theirs.mean().item(), accuracies[0], accuracies[1],
        apart[torch.float32], apart[torch.float64], cost,
    )  # fmt: skip


def train(fused: Run, eager: Run, advance: Callable[[], Any]) -> Tensor:
    """Both to their end, one step of each in turn: the mean loss of each step, (2, steps)."""
    losses = []
    while fused.step < fused.updates:
        losses.append([run.update().item() for run in (fused, eager)])
        if fused.step % fused.per_epoch == 0:
            advance()
    return torch.tensor(losses, dtype=torch.float64).T


def table(results: list[Result]) -> Table:
    out = Table(caption_justify="left", caption=(
        "Eager: torch's layers, not in place. RReLU's loss and accuracy are compared with torch operations on\n"
        "the same random slopes, its time and bytes with torch.nn.RReLU. Loss apart: the largest difference of\n"
        "any step; the same training in float64 tells rounding, which training amplifies, from error. Time: a\n"
        "training step on one thread, median and range of the rounds' ratios. Peak: its live bytes."
    ))  # fmt: skip
    out.add_column("")
    for heading in ("loss\nfused", "\neager", "accuracy\nfused", "\neager", "loss apart\nfloat32", "\nfloat64",
                    "time\neager / fused", "peak MB\nfused", "\neager"):  # fmt: skip
        out.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        out.add_row(
            r.rectifier, f"{r.fused_loss:.4f}", f"{r.eager_loss:.4f}",
            f"{r.fused_accuracy:.1%}", f"{r.eager_accuracy:.1%}",
            f"{r.largest_loss_difference:.1e}", f"{r.largest_loss_difference_float64:.1e}",
            f"{r.cost.speedup:.2f} ({r.cost.speedup_low:.2f}-{r.cost.speedup_high:.2f})",
            f"{r.cost.fused_bytes / 1e6:.1f}", f"{r.cost.eager_bytes / 1e6:.1f}",
        )  # fmt: skip
    return out


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=positive, default=8, help="passes over the training images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and slopes (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")


def run(options: argparse.Namespace) -> int:
    """0 where fused and eager losses agree within TOLERANCE all the way, else 1."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    else:
        torch.set_num_threads(1)  # as the study's runs have it: these tensors are too small to share out
    images, protocol = data.load("digits"), replace(PROTOCOL, epochs=options.epochs)
    console, facts = Console(), machine(str(device))
    told = "fused_rect {fused_rect}, torch {torch}, {processor}. {implementation}".format(**facts)
    console.print(told, soft_wrap=True, markup=False)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed}/{task.total}")
    results = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in RECTIFIERS:
            task = progress.add_task(f"{name:<11}", total=len(TOLERANCE) * options.epochs)
            results.append(contest(name, protocol, options.seed, images, device, partial(progress.advance, task)))
    if options.json:
        tolerance = {str(dtype): value for dtype, value in TOLERANCE.items()}
        figures = {
            **facts, "protocol": asdict(protocol), "seed": options.seed, "tolerance": tolerance,
            "results": [asdict(result) for result in results],
        }  # fmt: skip
        files.replace_json(options.json, figures)
    # Wide enough for the table wherever the output goes: a terminal narrower than that may scroll.
    Console(width=max(console.width, 118)).print(table(results))
    tolerances = ", ".join(f"{value:g} in {str(dtype).removeprefix('torch.')}" for dtype, value in TOLERANCE.items())
    wrong = [r.rectifier for r in results if not r.agrees]
    if wrong:
        console.print(f"[red]Fused and eager losses differ by more than {tolerances}: {', '.join(wrong)}")
        return 1
    console.print(f"Fused and eager losses agree within {tolerances} at every step.")
    return 0
