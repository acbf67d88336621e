"""What changed since an earlier profile, noise taken into account.

Two runs meet a machine in two states, so times are not compared across runs. What is: the fused call's time over that
of a peer timed in the same rounds (eager's, or the copy's where there is no eager). Its change is tested with Welch's t
test on the logarithms, and the p values of all cases are adjusted together (Benjamini and Hochberg), so that a
comparison of two equal states reports any change at all in one of twenty comparisons, however many cases it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

from .measure import CONFIDENCE, Interval
from .peers import COPY, EAGER
from .records import CASE, key, shown


@dataclass(frozen=True)
class Change:
    """The fused call's cost now over its cost then, both relative to ``against``: above 1 it became slower."""

    case: str
    against: str
    change: Interval
    p: float  # adjusted
    verdict: str  # "slower", "faster", "unchanged" or "indistinguishable"


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_then: list[str]
    only_now: list[str]

    def regressions(self, tolerance: float) -> list[Change]:
        """Slower beyond noise, and by more than ``tolerance`` (0.1: 10 %)."""
        return [c for c in self.changes if c.verdict == "slower" and c.change.value > 1 + tolerance]


def compare(then: pd.DataFrame, now: pd.DataFrame) -> Comparison:
    """Cases of both frames, by :data:`fused_rect.perf.profiling.records.CASE`; those of one alone are named."""
    before, after = _costs(then), _costs(now)
    both = [name for name in after if name in before]
    raw = [_change(before[name], after[name]) for name in both]
    adjusted = stats.false_discovery_control([p for _, p in raw]) if raw else []
    changes = [Change(_name(case), case[-1], change, float(p), _verdict(change, p))
               for case, (change, _), p in zip(both, raw, adjusted)]  # fmt: skip
    return Comparison(changes, *([_name(k) for k in a if k not in b] for a, b in ((before, after), (after, before))))


def _costs(records: pd.DataFrame) -> dict[tuple[Any, ...], dict[Any, Any]]:
    """The record of the peer that each case is judged against, by what identifies it, the peer last."""
    usable = records[(records.absent == "") & records.ratio.notna()]
    rows: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for peer in (COPY, EAGER):  # eager takes the copy's place
        for row in usable[usable.peer == peer].to_dict("records"):
            rows[key(row)] = row
    return {(*case, row["peer"]): row for case, row in rows.items()}


def _change(before: dict[str, Any], after: dict[str, Any]) -> tuple[Interval, float]:
    """The change of 1 / ratio, and Welch's p value of there being none."""
    logs = [-math.log(row["ratio"]) for row in (before, after)]
    degrees = [int(row["degrees"]) for row in (before, after)]
    errors = [
        Interval(row["ratio"], row["ratio_low"], row["ratio_high"], free).log_error
        for row, free in zip((before, after), degrees)
    ]
    variance = sum(e**2 for e in errors)
    moved = logs[1] - logs[0]
    value = _exp(moved)
    if min(degrees) < 1 or not math.isfinite(variance):
        return Interval(value, 0.0, math.inf, 0), 1.0
    if variance == 0:
        return Interval(value, value, value, sum(degrees)), float(moved == 0)
    free = variance**2 / sum(e**4 / d for e, d in zip(errors, degrees))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, free)) * variance**0.5
    p = 2 * float(stats.t.sf(abs(moved) / variance**0.5, free))
    return Interval(value, _exp(moved - half), _exp(moved + half), int(free)), p


def _exp(log: float) -> float:
    return math.exp(min(max(log, -700.0), 700.0))


def _verdict(change: Interval, p: float) -> str:
    if p >= 1 - CONFIDENCE:
        return "indistinguishable"
    return "slower" if change.value > 1 else "faster"


def _name(case: tuple[Any, ...]) -> str:
    about = dict(zip(CASE, case))
    words = (about[name] for name in ("workload", "layer", "rectifier", "part", "mode", "dtype", "layout", "shape"))
    return shown(" ".join(str(word) for word in words if word))
