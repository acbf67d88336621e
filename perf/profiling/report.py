"""The report in the terminal: one table for each part and mode, then what it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .peers import COPY, EAGER, MATMUL, YARDSTICKS
from .records import base, cases, judged, one, shown
from .scaling import Curve, curves

MARKS = {"faster": ("▲", "green"), "slower": ("▼", "red"), "indistinguishable": ("≈", "dim"), "": (" ", "")}
STYLE: dict[str, Any] = {
    "title_justify": "left", "caption_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD,
    "padding": (0, 1), "pad_edge": False,
}  # fmt: skip
LEGEND = "under a peer: its time / that of {0}: ▲ {0} is faster, ▼ slower, ≈ indistinguishable from 1 at 95 %"
TITLES = {"layer": "convolution + bias + rectifier", "epilogue": "bias + rectifier alone", "model": "model"}
TABLE = ["part", "mode", "dtype", "layout"]  # what the cases of one table have in common


def seconds(value: float) -> str:
    """A time with its unit, three digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: float) -> str:
    """Bytes with their unit, three digits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def print_report(records: pd.DataFrame, console: Console) -> None:
    """Tables of all cases, the curves of a scaling run, and the sentences of :func:`conclusions`."""
    measured = records[(records.part != "machine") & ~records.workload.str.startswith("scaling ")]
    for key, group in measured.groupby(TABLE, sort=False):
        if (group.absent == "").any():
            console.print(_table(group, *map(str, key)))
    for curve in curves(records):
        console.print(_curve_table(curve))
    for line in conclusions(records):
        console.print(shown(line), soft_wrap=True)


def _table(group: pd.DataFrame, part: str, *how: str) -> Table:
    ours = group.base.iloc[0]
    peers = [p for p in group[group.absent == ""].peer.unique() if p != ours and p not in YARDSTICKS]
    table = Table(title=", ".join((TITLES[part], *how)), caption=LEGEND.format(ours), **STYLE)
    table.add_column(part if part == "model" else "layer")
    if part != "model":
        table.add_column("rectifier")
    for header in (ours, *peers, *(("GB/s", "copies") if part == "epilogue" else ("kept", "peak"))):
        table.add_column(header, justify="right")
    for case in cases(group):
        found = base(case)
        if found is not None:
            name = [shown(found.layer)] if part == "model" else [shown(found.layer), found.rectifier]
            ratios = [_ratio(one(case, peer)) for peer in peers]
            table.add_row(*name, seconds(found.seconds), *ratios, *_extras(part, case, found))
    return table


def _ratio(record: Any) -> Text:
    if record is None:
        return Text("absent", "dim")
    mark, style = MARKS[record.verdict]
    return Text(f"{record.ratio:.2f} {mark} {record.ratio_low:.2f}–{record.ratio_high:.2f}", style)


def _extras(part: str, case: pd.DataFrame, found: Any) -> tuple[str, ...]:
    """Of an epilogue: bandwidth, and its cost in copies; else memory kept and its peak, against eager's."""
    if part == "epilogue":
        return f"{found.bytes / found.seconds / 1e9:.1f}", f"{1 / one(case, COPY).ratio:.2f}"
    eager = one(case, EAGER)
    both = ("kept_bytes", "live_bytes")
    return tuple(change(getattr(found, size), getattr(eager, size) if eager else 0) for size in both)


def change(now: float, before: float) -> str:
    """Relative, in percent, with its sign; empty where there is nothing to compare."""
    return f"{100 * (now / before - 1):+.0f} %" if now and before else ""


def _curve_table(curve: Curve) -> Table:
    table = Table(title=f"{curve.axis}: {curve.title}", **STYLE)
    for header in (curve.axis, "time", "moved", "ns / element", "copies", ""):
        table.add_column(header, justify="left" if not header else "right")
    for p in curve.points:
        table.add_row(
            f"{p.x:,}", seconds(p.seconds), size(p.bytes), f"{1e9 * p.seconds / p.elements:.3g}",
            f"{p.cost:.3g} ({p.cost_low:.3g}–{p.cost_high:.3g})", p.note,
        )  # fmt: skip
    return table


def conclusions(records: pd.DataFrame) -> Iterator[str]:
    """Sentences: the ceilings, the verdicts against eager, what was absent and why, and where a curve is not flat."""
    copy, product = (one(records[records.part == "machine"], peer) for peer in (COPY, MATMUL))
    if copy is not None and product is not None:
        yield (
            f"This machine: a copy moves {copy.bytes / copy.seconds / 1e9:.1f} GB/s, "
            f"a {copy.dtype} matrix product does {product.flops / product.seconds / 1e9:.0f} GFLOP/s."
        )
    for part in ("layer", "epilogue", "model"):
        counts = judged(records[records.part == part])
        if total := sum(counts.values()):
            told = ", ".join(f"{word} in {count}" for word, count in counts.items())
            yield f"{records.base.iloc[0]} against eager, {part}: {told} of {total}."
    for curve in curves(records):
        for p in curve.points:
            if p.note == "not flat":
                yield f"Not flat: {curve.title}, at {curve.axis} {p.x:,} costs {p.cost:.2f} copies."
    missing = records[records.absent != ""].drop_duplicates(["peer", "absent"])
    for reason, group in missing.groupby("absent", sort=False):
        yield f"Absent: {', '.join(group.peer)}: {reason}."
    timed = records[records.absent == ""]
    if len(set(timed.rounds)) > 1:
        yield f"Some cases had {min(timed.rounds)} rounds of {max(timed.rounds)}: the budget of time was used up."
    if (records[records.absent == ""].degrees == 0).any():
        yield "One process and one round give no interval: raise --rounds and --processes."
    elif (records.processes == 1).any():
        yield "One process: the intervals leave out what varies from one process to the next."


def print_comparison(comparison: Comparison, tolerance: float, console: Console) -> None:
    """The changes beyond noise, all of them where there are few, and what could not be compared."""
    table = Table(title="changes since then", **STYLE)
    for header in ("case", "against", "now / then", "p", ""):
        table.add_column(header)
    beyond = {c.case for c in comparison.regressions(tolerance)}
    for c in sorted(comparison.changes, key=lambda c: -c.change.value):
        style = {"slower": "red", "faster": "green"}.get(c.verdict, "dim")
        told = f"{c.change.value:.2f} ({c.change.low:.2f}–{c.change.high:.2f})"
        verdict = "REGRESSION" if c.case in beyond else c.verdict
        table.add_row(c.case, c.against, told, f"{c.p:.3f}", verdict, style=style)
    console.print(table)
    for which, names in (("only in the earlier profile", comparison.only_then), ("new", comparison.only_now)):
        if names:
            console.print(f"{len(names)} cases {which}: {', '.join(names)}")
    count = len(beyond)
    console.print(f"{count} of {len(comparison.changes)} cases slower by more than {100 * tolerance:.0f} % and noise.")
