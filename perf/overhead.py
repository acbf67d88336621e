"""What a call costs the host: CPU seconds, of all threads, of calls on tensors too small for their work to count.

    python -m fused_rect.perf.overhead [--rounds 15] [--json FILE]

Without a GPU, CPU tensors. On a GPU, CUDA tensors too, the driver's own share of a launch included. On softcuda, which
stands in for a GPU, launches do nothing, so that what is left is the host's:

    PYTHONPATH=../shared python -c \\
        "import softcuda; softcuda.install(90); from fused_rect.perf import overhead; overhead.main()"

The last rows are larger: a BatchNorm in evaluation between a map and its rectifier, below the size from which `fuse`
has it run in the rectifier's pass, and there; and compiled training steps, 2,048 elements, over plain `torch.compile`'s
on the same device.

Everything else is divided by the same call of torch's on CPU tensors, `act(z + bias)`, round by round: a GPU's calls
too, so that they can be compared without one. "Python" is the way of calls where direct.cpp cannot be built.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_rect as fr

from .. import backends, files, internals
from ..environment import machine

SHAPE = (1, 8, 8, 8)
CALLS = 200  # a sample
Step = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """Median microseconds a call, and the median of its ratios to torch's in the same round."""

    what: str
    device: str
    path: str  # "C++", "Python" or "torch"
    mode: str  # "no gradient" or "training"
    microseconds: float
    ratio: float


@dataclass(frozen=True)
class Case:
    what: str
    device: str
    path: str
    mode: str
    step: Step
    base: Step


def _steps(function: Callable[..., Tensor], device: str, expanded: bool = False) -> dict[str, Step]:
    """``function(z, bias, weight)`` without gradients, and forward and backward to all three."""
    z, bias, weight = (torch.randn(shape, device=device).requires_grad_() for shape in (SHAPE, SHAPE[1], SHAPE[1]))
    return _of(lambda: function(z, bias, weight), (z, bias, weight), device, expanded)


def _of(function: Callable[[], Tensor], leaves: Any, device: str, expanded: bool = False) -> dict[str, Step]:
    leaves = tuple(leaves)
    with torch.no_grad():
        like = function()
    grad = torch.ones(1, device=device).expand(like.shape) if expanded else torch.randn_like(like)

    def without() -> None:
        with torch.no_grad():
            function()

    def training() -> None:
        torch.autograd.backward(function(), grad)
        for leaf in leaves:
            leaf.grad = None

    return {"no gradient": without, "training": training}


def _channels(t: Tensor) -> Tensor:
    return t.view(-1, *[1] * (len(SHAPE) - 2))


# Ours, and torch's pair.
EPILOGUES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ReLU": (lambda z, b, w: fr.functional.bias_relu(z, b), lambda z, b, w: F.relu(z + _channels(b))),
    "LeakyReLU": (
        lambda z, b, w: fr.functional.bias_leaky_relu(z, b, 0.1),
        lambda z, b, w: F.leaky_relu(z + _channels(b), 0.1),
    ),
    "PReLU": (lambda z, b, w: fr.functional.bias_prelu(z, b, w), lambda z, b, w: F.prelu(z + _channels(b), w)),
    "RReLU": (
        lambda z, b, w: fr.functional.bias_rrelu(z, b, training=True),
        lambda z, b, w: F.rrelu(z + _channels(b), training=True),
    ),
}


def _in_python(step: Step, device: str) -> Step:
    # Another object of the name: C++, which knows names as objects, takes it for an implementation that is not its own.
    name = backends.name(device).encode().decode()

    def run() -> None:
        direct, backends.direct = backends.direct, lambda like: None
        try:
            with fr.backend(name):
                internals.stash_in_thread(backends.OWN, name)
                step()
        finally:
            backends.direct = direct

    return run


def _layers() -> list[tuple[str, nn.Module, nn.Module, Tensor]]:
    """What, ours, torch's, input: on CPU tensors."""
    image, rows = torch.randn(SHAPE), torch.randn(8, 8)
    return [
        ("ConvLeakyReLU2d", fr.nn.ConvLeakyReLU2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.LeakyReLU()), image),
        ("ConvReLU2d", fr.nn.ConvReLU2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), image),
        ("LinearReLU", fr.nn.LinearReLU(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), rows),
        (
            "fuse(Linear, ReLU)",
            fr.fuse(nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            rows,
        ),
    ]


def _norms() -> list[Case]:
    found = []
    for sides in (128, 256):
        x, channels = torch.randn(1, 16, sides, sides), 16
        map_ = nn.Conv2d(channels, channels, 1, groups=channels)  # next to nothing beside the passes behind it
        eager = nn.Sequential(map_, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)).eval()
        fused = fr.fuse(copy.deepcopy(eager), fold_batchnorm=True)
        step, base = (_of(functools.partial(model, x), (), "cpu")["no gradient"] for model in (fused, eager))
        found.append(Case(f"fuse(Conv2d, BatchNorm2d, ReLU), {x.numel():,}", "cpu", "C++", "no gradient", step, base))
    return found


def _compiled(device: str) -> list[Case]:
    """A convolution and its rectifier by `backend="fused_rect"`, over plain `torch.compile` on the same device."""
    found = []
    for what, rectifier in (("LeakyReLU", nn.LeakyReLU(0.1)), ("RReLU", nn.RReLU())):
        x, model = torch.randn(1, 8, 16, 16, device=device), nn.Sequential(nn.Conv2d(8, 8, 1), rectifier).to(device)
        steps = []
        for name in ("fused_rect", "inductor"):
            run: Any = torch.compile(copy.deepcopy(model), backend=name)
            with torch._dynamo.config.patch(recompile_limit=64):  # one code for all; beyond the limit it runs eagerly
                steps.append(_of(functools.partial(run, x), run.parameters(), device)["training"])
                steps[-1]()
        for path, step in (("C++", steps[0]), ("Python", _in_python(steps[0], device))):
            found.append(Case(f"compiled Conv2d, {what}", device, path, "training", step, steps[1]))
    return found


def cases() -> list[Case]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = []
    for what, (ours, torchs) in EPILOGUES.items():
        base = _steps(torchs, "cpu")
        for device in devices:
            for mode, step in _steps(ours, device).items():
                found.append(Case(what, device, "C++", mode, step, base[mode]))
                found.append(Case(what, device, "Python", mode, _in_python(step, device), base[mode]))
            if device != "cpu":
                found += [Case(what, device, "torch", m, s, base[m]) for m, s in _steps(torchs, device).items()]
    ours, torchs = EPILOGUES["LeakyReLU"]
    step, base_step = (_steps(f, "cpu", expanded=True)["training"] for f in (ours, torchs))
    found.append(Case("LeakyReLU, expanded gradient", "cpu", "C++", "training", step, base_step))
    for what, fused, eager, x in _layers():
        base = _of(functools.partial(eager, x), eager.parameters(), "cpu")
        for mode, step in _of(functools.partial(fused, x), fused.parameters(), "cpu").items():
            found.append(Case(what, "cpu", "C++", mode, step, base[mode]))
    return [*found, *_norms(), *(case for device in devices for case in _compiled(device))]


def _clock(step: Step, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls * 1e6


def measure(chosen: list[Case], rounds: int, calls: int = CALLS) -> list[Cost]:
    """Each case beside its base, round after round, so that what else the machine does meets both."""
    for case in chosen:
        for step in (case.step, case.base) * 3:
            step()
    samples: list[list[tuple[float, float]]] = [[] for _ in chosen]
    for _ in range(rounds):
        for case, taken in zip(chosen, samples):
            taken.append((_clock(case.step, calls), _clock(case.base, calls)))
    return [
        Cost(
            c.what, c.device, c.path, c.mode, statistics.median(a for a, _ in taken),
            statistics.median(a / b for a, b in taken),
        )
        for c, taken in zip(chosen, samples)
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="keep the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if "softcuda" in sys.modules:
        sys.modules["softcuda.launches"].silence()
    found = measure(cases(), options.rounds)
    print(f"{'':42}{'device':7}{'path':8}{'mode':13}{'us':>8}{'ratio':>7}")
    for cost in found:
        print(f"{cost.what:42}{cost.device:7}{cost.path:8}{cost.mode:13}{cost.microseconds:8.1f}{cost.ratio:7.2f}")
    if options.json:
        kept = {"machine": machine(), "shape": SHAPE, "costs": [asdict(cost) for cost in found]}
        files.replace_json(options.json, kept)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
