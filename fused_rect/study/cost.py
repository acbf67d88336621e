"""What each rectifier costs in the study's own network, fused against eager: an epoch's time, a step's peak bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from ..perf.profiling.memory import peak_live_bytes
from .data import Dataset
from .protocol import Protocol
from .training import Job, Run

ROUNDS, STEPS = 7, 8


@dataclass(frozen=True)
class Cost:
    """Seconds an epoch (median over rounds), their ratio eager / fused (median, lowest, highest), bytes of a step."""

    variant: str
    fused_seconds: float
    eager_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    fused_bytes: int
    eager_bytes: int


def measure(
    protocol: Protocol, variants: list[str], dataset: Dataset, device: torch.device, rounds: int = ROUNDS
) -> list[Cost]:
    """Fused and eager in turns, round by round, so that what else the machine does meets both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs have it
    try:
        return [_cost(protocol, variant, dataset, device, rounds) for variant in variants]
    finally:
        torch.set_num_threads(threads)


def _cost(protocol: Protocol, variant: str, dataset: Dataset, device: torch.device, rounds: int) -> Cost:
    protocols = [replace(protocol, epilogue=epilogue) for epilogue in ("fused", "eager")]
    runs = [Run(Job(p, variant, 0, Path("unused")), dataset, device) for p in protocols]
    for run in runs:
        _seconds(run, 2)
    steps = min(STEPS, runs[0].per_epoch)
    scale = runs[0].per_epoch / steps
    times = []
    for number in range(rounds):
        turn = (0, 1) if number % 2 == 0 else (1, 0)
        taken = {i: _seconds(runs[i], steps) * scale for i in turn}
        times.append((taken[0], taken[1]))
    ratios = [eager / fused for fused, eager in times]
    fused_bytes, eager_bytes = (_bytes(run) for run in runs)
    return Cost(
        variant, median(f for f, _ in times), median(e for _, e in times),
        median(ratios), min(ratios), max(ratios), fused_bytes, eager_bytes,
    )  # fmt: skip


def _seconds(run: Run, steps: int) -> float:
    run.step = 0  # always whole batches of the first epoch
    _synchronize(run.device)
    start = time.perf_counter()
    for _ in range(steps):
        run.update()
    _synchronize(run.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(run: Run) -> int:
    """The peak of what one update allocates, gradients included."""
    run.step = 0
    run.optimizer.zero_grad(set_to_none=True)
    return peak_live_bytes(run.update, run.device)
