"""`fused-rect demo`: a small Network-in-Network learns real digits, with fused layers and with torch's, side by side.

Both start from the same weights and see the same batches in the same order, one step of each in turn, so that losses
can be subtracted and times divided. The images are the 1,797 8x8 digits that scikit-learn ships.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from . import backends
from . import nn as fused
from .perf.profiling.memory import peak_live_bytes
from .random import new_seed
from .reference import slopes
from .rules import Rule
from .version import __version__

BATCH = 64
LEARNING_RATE = 1e-3
# The bias gradient sums in another order than torch's: the last digit differs, and 276 steps of training multiply that
# by about 10^5, in float32 to a visible difference. float64 shows that it is rounding and nothing else.
TOLERANCE = {torch.float32: 5e-2, torch.float64: 1e-6}

Layer = Callable[..., nn.Module]


class ReferenceRReLU(nn.RReLU):
    """RReLU in torch operations with the slopes that the fused layer draws, where nn.RReLU would draw others."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.leaky_relu(input, (self.lower + self.upper) / 2)
        slope = slopes(new_seed(input.device), input, Rule("rrelu", self.lower, self.upper))
        return torch.where(input <= 0, input * slope, input)


def torch_layer(rectifier: Callable[[], nn.Module]) -> Layer:
    """torch's own pair, as it comes: not in place."""
    return lambda *args, **kwargs: nn.Sequential(nn.Conv2d(*args, **kwargs), rectifier())


RECTIFIERS: dict[str, dict[str, Layer]] = {
    "ReLU": {"fused": fused.ConvReLU2d, "eager": torch_layer(nn.ReLU)},
    "Leaky ReLU": {"fused": fused.ConvLeakyReLU2d, "eager": torch_layer(nn.LeakyReLU)},
    "PReLU": {"fused": fused.ConvPReLU2d, "eager": torch_layer(nn.PReLU)},
    "RReLU": {
        "fused": fused.ConvRReLU2d,
        "eager": torch_layer(nn.RReLU),
        "reference": torch_layer(ReferenceRReLU),
    },
}


def network(layer: Layer) -> nn.Module:
    """Two Network-in-Network blocks (Lin et al. 2013, arXiv 1312.4400): a 3x3 layer, then 1x1 layers at each pixel."""
    model = nn.Sequential(
        layer(1, 32, 3, padding=1), layer(32, 32, 1), layer(32, 32, 1), nn.MaxPool2d(2),
        layer(32, 64, 3, padding=1), layer(64, 64, 1), layer(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


@dataclass
class Trainee:
    """One network in training, with the loss and the seconds of each of its steps."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """One step; ``seed`` decides RReLU's slopes."""
        torch.manual_seed(seed)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed_step(self, images: Tensor, labels: Tensor, seed: int) -> None:
        start = time.perf_counter()
        loss = self.step(images, labels, seed).item()  # which waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            right = self.model(images).argmax(1) == labels
        return float(right.double().mean())


@dataclass(frozen=True)
class Result:
    """One row of the table, in float32 but for one column.

    Losses are means over the last epoch, differences the largest of all steps, quartiles those of the time ratios.
    """

    rectifier: str
    fused_loss: float
    eager_loss: float
    fused_accuracy: float
    eager_accuracy: float
    largest_loss_difference: float
    largest_loss_difference_float64: float
    time_ratio: float
    time_ratio_quartiles: tuple[float, float]
    fused_peak_bytes: int
    eager_peak_bytes: int

    @property
    def agrees(self) -> bool:
        return (  # false for NaN
            self.largest_loss_difference <= TOLERANCE[torch.float32]
            and self.largest_loss_difference_float64 <= TOLERANCE[torch.float64]
        )


@dataclass(frozen=True)
class Digits:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype) -> Digits:
        return Digits((self.train[0].to(dtype), self.train[1]), (self.test[0].to(dtype), self.test[1]))

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.train
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(BATCH):
            yield images[rows], labels[rows]


def digits(device: torch.device, seed: int) -> Digits:
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16 - 0.5
    split = train_test_split(images, torch.from_numpy(data.target), test_size=0.2, random_state=seed)
    train_images, test_images, train_labels, test_labels = (part.to(device) for part in split)
    return Digits((train_images, train_labels), (test_images, test_labels))


def contest(name: str, data: Digits, epochs: int, seed: int, advance: Callable[[], Any]) -> Result:
    """Train the networks of one rectifier and compare them; ``advance`` is called after each of 2 * ``epochs``."""
    layers = RECTIFIERS[name]
    models = networks(layers, data, seed)
    peaks = {kind: _warmed_up_peak(model, data, seed) for kind, model in models.items()}
    trainees = train(models, data, epochs, seed, advance)
    # RReLU's numbers are compared where the slopes are the same, its time and bytes with torch's own layer.
    same_numbers = "reference" if "reference" in layers else "eager"
    exact = train(
        networks({kind: layers[kind] for kind in ("fused", same_numbers)}, data.to(torch.float64), seed),
        data.to(torch.float64), epochs, seed, advance,
    )  # fmt: skip
    ours, theirs = trainees["fused"], trainees[same_numbers]
    last = -(-len(data.train[0]) // BATCH)
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(ours.seconds, trainees["eager"].seconds)], n=4
    )
    return Result(
        rectifier=name,
        fused_loss=statistics.fmean(ours.losses[-last:]),
        eager_loss=statistics.fmean(theirs.losses[-last:]),
        fused_accuracy=ours.accuracy(*data.test),
        eager_accuracy=theirs.accuracy(*data.test),
        largest_loss_difference=largest_difference(ours, theirs),
        largest_loss_difference_float64=largest_difference(exact["fused"], exact[same_numbers]),
        time_ratio=median,
        time_ratio_quartiles=(low, high),
        fused_peak_bytes=peaks["fused"],
        eager_peak_bytes=peaks["eager"],
    )


def networks(layers: dict[str, Layer], data: Digits, seed: int) -> dict[str, nn.Module]:
    """One network for each kind of layer, on the device and in the dtype of the images, all with the same weights."""
    torch.manual_seed(seed)
    models = {kind: network(layer).to(data.train[0]) for kind, layer in layers.items()}
    for model in models.values():
        model.load_state_dict(models["fused"].state_dict())  # one state_dict fits them all
    return models


def _warmed_up_peak(model: nn.Module, data: Digits, seed: int) -> int:
    """Peak live bytes of a training step, after one that builds kernels and fills caches; ``model`` stays as it was."""
    batch = next(data.epoch(torch.Generator().manual_seed(seed)))
    trainee = Trainee(copy.deepcopy(model))
    trainee.step(*batch, seed)
    trainee.optimizer.zero_grad()
    return peak_live_bytes(lambda: trainee.step(*batch, seed), batch[0].device)


def train(
    models: dict[str, nn.Module], data: Digits, epochs: int, seed: int, advance: Callable[[], Any]
) -> dict[str, Trainee]:
    """All ``models`` on the same batches, one step of each in turn, none always first."""
    trainees = {kind: Trainee(model) for kind, model in models.items()}
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for images, labels in data.epoch(generator):
            step += 1
            for kind in list(trainees) if step % 2 else reversed(trainees):
                trainees[kind].timed_step(images, labels, seed + step)
        advance()
    return trainees


def largest_difference(ours: Trainee, theirs: Trainee) -> float:
    """Of the losses of the same steps; NaN where one of them is."""
    pairs = torch.tensor([ours.losses, theirs.losses], dtype=torch.float64)
    return (pairs[0] - pairs[1]).abs().max().item()


def table(results: list[Result]) -> Table:
    out = Table(caption_justify="left", caption=(
        "Eager: torch's layers, not in place. RReLU's loss and accuracy are compared with torch operations on\n"
        "the same random slopes, its time and bytes with torch.nn.RReLU. Loss apart: the largest difference of\n"
        "any step; the same training in float64 tells rounding, which training amplifies, from error. Time:\n"
        "median and quartiles of the steps' ratios. Peak: live bytes of one training step."
    ))  # fmt: skip
    out.add_column("")
    for heading in ("loss\nfused", "\neager", "accuracy\nfused", "\neager", "loss apart\nfloat32", "\nfloat64",
                    "time\nfused / eager", "peak MB\nfused", "\neager"):  # fmt: skip
        out.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        low, high = r.time_ratio_quartiles
        out.add_row(
            r.rectifier, f"{r.fused_loss:.4f}", f"{r.eager_loss:.4f}",
            f"{r.fused_accuracy:.1%}", f"{r.eager_accuracy:.1%}",
            f"{r.largest_loss_difference:.1e}", f"{r.largest_loss_difference_float64:.1e}",
            f"{r.time_ratio:.2f} ({low:.2f}-{high:.2f})",
            f"{r.fused_peak_bytes / 1e6:.1f}", f"{r.eager_peak_bytes / 1e6:.1f}",
        )  # fmt: skip
    return out


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_positive, default=12, help="passes over the training images (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split, batches and slopes (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(options: argparse.Namespace) -> int:
    """0 where fused and eager losses agree within TOLERANCE all the way, else 1."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    data = digits(device, options.seed)
    console = Console()
    versions = f"fused_rect {__version__}, torch {torch.__version__}"
    console.print(f"{versions}, {device}. {backends.why(device)}", soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed}/{task.total}")
    results = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in RECTIFIERS:
            task = progress.add_task(f"{name:<11}", total=2 * options.epochs)
            results.append(
                contest(name, data, options.epochs, options.seed, partial(progress.advance, task))
            )
    # Wide enough for the table wherever the output goes: a terminal narrower than that may scroll.
    Console(width=max(console.width, 118)).print(table(results))
    if options.json:
        options.json.write_text(json.dumps(_figures(results, options, device), indent=2) + "\n")
    tolerances = ", ".join(f"{value:g} in {str(dtype).removeprefix('torch.')}" for dtype, value in TOLERANCE.items())
    wrong = [r.rectifier for r in results if not r.agrees]
    if wrong:
        console.print(f"[red]Fused and eager losses differ by more than {tolerances}: {', '.join(wrong)}")
        return 1
    console.print(f"Fused and eager losses agree within {tolerances} at every step.")
    return 0


def _figures(results: list[Result], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "implementation": backends.why(device),
        "threads": torch.get_num_threads(),
        "epochs": options.epochs,
        "batch": BATCH,
        "seed": options.seed,
        "tolerance": {str(dtype): value for dtype, value in TOLERANCE.items()},
        "results": [asdict(result) for result in results],
    }
