"""Compiled layers on the CPU, paired and interleaved: `python -m fused_rect.perf.compiled [rectifier ...]`.

For each rectifier, in training and in inference, three convolutions 3 x 3, 32 -> 32, with it on `--batch` x 32 x 48 x
48: the time of eager torch and of plain `torch.compile` over that of `torch.compile(backend="fused_rect")`, the sites
as chosen ("auto") and all fused ("all"). Above 1 ours is faster. :mod:`.profiling.measure` says what the intervals
mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .profiling.measure import Case, Runs, measure

RECTIFIERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
}
MODES = ("training", "inference")


def model(name: str) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, padding=1), RECTIFIERS[name]()]
    return nn.Sequential(*layers)


def build(rectifier: str, mode: str, batch: int) -> Runs:
    """The four ways to run one model, compiled; the reason in words for one that torch.compile cannot."""
    from fused_rect import compile as fused_compile

    torch._dynamo.reset()  # else the models of earlier cases count towards the limit of recompilations
    x = torch.randn(batch, 32, 48, 48)
    ours = {"backend": fused_compile.backend}
    ways: dict[str, dict[str, Any] | None] = {
        "eager": None,
        "inductor": {},
        "auto": ours,
        "all": {**ours, "options": {"fused_rect.sites": "all"}},
    }
    runs: dict[str, Callable[[], Any] | str] = {}
    for way, options in ways.items():
        net = model(rectifier).train(mode == "training")
        function = net if options is None else torch.compile(net, **options)
        run = _step(function, net, x) if mode == "training" else _inference(function, x)
        try:
            run()
            runs[way] = run
        except torch._dynamo.exc.TorchDynamoException as error:
            runs[way] = str(error).splitlines()[0]
    return runs


def _step(function: Callable[..., Any], net: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> None:
        net.zero_grad()
        function(x).square().mean().backward()

    return run


def _inference(function: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            function(x)

    return run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_rect.perf.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="rectifier", help=f"of {', '.join(RECTIFIERS)}; by default all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(RECTIFIERS):
        parser.error(f"rectifier must be of {', '.join(RECTIFIERS)}, got {', '.join(sorted(unknown))}")
    cases = [
        Case(
            f"{name} {mode}", "fused_rect.perf.compiled:build",
            {"rectifier": name, "mode": mode, "batch": options.batch},
        )
        for name in options.names or RECTIFIERS
        for mode in options.modes
    ]  # fmt: skip
    for case, samples in zip(cases, measure(cases, processes=options.processes, rounds=options.rounds)):
        for ours in ("auto", "all"):
            for other in ("eager", "inductor"):
                ratio = samples.ratio(other, ours) if other in samples.seconds else samples.absent[other]
                print(f"{case.name:16} {other + ' / ' + ours:16} {ratio}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
