"""Compiled layers on the CPU, paired and interleaved: `python -m fused_rect.perf.compiled [rectifier ...]`.

For each rectifier, in training and in inference: the time of eager torch and of plain `torch.compile` over that of
`torch.compile(backend="fused_rect")`, the sites as chosen ("auto") and all fused ("all"). Above 1 ours is faster. A
round runs each once, in turn; a process gives the median of its rounds' ratios, printed is the median of the
processes with their range."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

RECTIFIERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
}
Runs = dict[str, Callable[[], Any]]


def model(name: str) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, padding=1), RECTIFIERS[name]()]
    return nn.Sequential(*layers)


def runs(name: str, training: bool) -> Runs:
    """The four ways to run one model, each compiled and warm; plain torch.compile is absent where it raises."""
    from fused_rect import compile as fused_compile

    x = torch.randn(8, 32, 48, 48)
    ours = {"backend": fused_compile.backend}
    ways: dict[str, dict[str, Any] | None] = {
        "eager": None,
        "inductor": {},
        "auto": ours,
        "all": {**ours, "options": {"fused_rect.sites": "all"}},
    }
    ready: Runs = {}
    for way, options in ways.items():
        net = model(name).train(training)
        function = net if options is None else torch.compile(net, **options)
        run = _step(function, net, x) if training else _inference(function, x)
        try:
            for _ in range(3):
                run()
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"{way} cannot run {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        ready[way] = run
    return ready


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


def ratios(ready: Runs, rounds: int) -> dict[str, float]:
    """Median over the rounds of (other's time) / (ours), for ours "auto" and "all"."""
    taken: dict[str, list[float]] = {way: [] for way in ready}
    for _ in range(rounds):
        for way, run in ready.items():
            start = time.perf_counter()
            run()
            taken[way].append(time.perf_counter() - start)
    return {
        f"{other}/{ours}": statistics.median(a / b for a, b in zip(taken[other], taken[ours]))
        for ours in ("auto", "all")
        for other in ("eager", "inductor")
        if other in taken
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-rect-compiled", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="rectifier", help=f"of {', '.join(RECTIFIERS)}; by default all")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one", choices=("training", "inference"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(ratios(runs(chosen.names[0], chosen.one == "training"), chosen.rounds)))
        return 0
    for name in chosen.names or RECTIFIERS:
        for mode in ("training", "inference"):
            _report(name, mode, chosen.processes, chosen.rounds)
    return 0


def _report(name: str, mode: str, processes: int, rounds: int) -> None:
    command = [sys.executable, "-m", "fused_rect.perf.compiled", name, "--one", mode, "--rounds", str(rounds)]
    found = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(processes)]
    for key in found[0]:
        values = sorted(result[key] for result in found)
        print(
            f"{name:6} {mode:9} {key:14} {statistics.median(values):.2f}  ({values[0]:.2f} to {values[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
