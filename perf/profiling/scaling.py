"""How time and bytes follow tensor size, batch, channels and threads, and where the cost is not what it should be.

An elementwise pass should cost what a copy of the same tensor costs, times a constant: from the size where launching
stops to dominate, for every batch, every number of channels and every number of threads. So the cost is judged
relative to the copy that was timed in the same rounds, which takes the machine's caches out of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from fused_rect.environment import cores

from .peers import COPY
from .records import base, cases, one
from .workloads import Layer

AXES = ("size", "batch", "channels", "threads")
# A point is flagged when even the low end of its cost is this far above the median of its curve.
TOLERANCE = 1.25
# Up to this multiple of the shortest call's time, calls are taken to be launches more than work.
LAUNCH = 2.0


class Point(NamedTuple):
    """x: what the axis counts. seconds and copy_seconds a call; cost: their ratio, with its interval."""

    x: int
    elements: int
    seconds: float
    copy_seconds: float
    bytes: int
    cost: float
    cost_low: float
    cost_high: float
    note: str = ""  # "", "launch-bound" or "not flat"


class Curve(NamedTuple):
    axis: str
    title: str
    points: tuple[Point, ...]


def points(axis: str, threads: int) -> list[tuple[Layer, int]]:
    """The layers, and the threads of each, that ``axis`` goes through; ``threads`` where it counts something else."""
    if axis == "size":
        return [(_map(1, 64, 2**k, 2**k), threads) for k in range(2, 10)]
    if axis == "batch":
        return [(_map(2**k, 64, 28, 28), threads) for k in range(7)]
    if axis == "channels":  # some of them odd, all of about 2 million elements
        counts = (1, 3, 16, 51, 64, 192, 255, 512, 1024)
        return [(_map(8, c, side := math.isqrt(2**18 // c), side), threads) for c in counts]
    return [(_map(8, 64, 90, 90), count) for count in thread_counts()]


def thread_counts() -> list[int]:
    """Powers of two up to the cores that this process may use, and that number."""
    most = cores()
    return sorted({*(2**k for k in range(most.bit_length())), most})


def _map(n: int, c: int, h: int, w: int) -> Layer:
    return Layer(f"{n}x{c}x{h}x{w}", (n, c, h, w), c, (1, 1), "leaky_relu")


def curves(records: pd.DataFrame) -> list[Curve]:
    """The curves among ``records``, their points judged."""
    swept = records[records.workload.str.startswith("scaling ")]
    made = []
    for key, group in swept.groupby(["workload", "rectifier", "mode", "dtype", "layout"], sort=False):
        workload, *title = map(str, key)
        axis = workload.removeprefix("scaling ")
        raw = [_point(axis, case) for case in cases(group)]
        made.append(Curve(axis, ", ".join(title), tuple(_judged(axis, sorted(raw, key=lambda p: p.x)))))
    return made


def _point(axis: str, case: pd.DataFrame) -> Point:
    fused, copy = base(case), one(case, COPY)
    shape = [int(size) for size in fused.output.split("x")]
    x = {"size": math.prod(shape), "batch": shape[0], "channels": shape[1], "threads": fused.threads}[axis]
    return Point(
        x, math.prod(shape), fused.seconds, copy.seconds, fused.bytes,
        1 / copy.ratio, 1 / copy.ratio_high, 1 / copy.ratio_low if copy.ratio_low else math.inf,
    )  # fmt: skip


def _judged(axis: str, raw: list[Point]) -> list[Point]:
    shortest = min(p.seconds for p in raw)
    launches = [axis in ("size", "batch") and p.seconds <= LAUNCH * shortest for p in raw]
    costs = sorted(p.cost for p, launch in zip(raw, launches) if not launch)
    middle = costs[len(costs) // 2] if costs else math.inf
    notes = ["launch-bound" if launch else "not flat" if p.cost_low > TOLERANCE * middle else ""
             for p, launch in zip(raw, launches)]  # fmt: skip
    return [p._replace(note=note) for p, note in zip(raw, notes)]
