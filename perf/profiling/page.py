"""The report as one self-contained HTML page: no script, style, font or picture from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from . import plots, report
from .compare import Comparison
from .peers import EAGER, FUSED, YARDSTICKS
from .records import cases, one
from .scaling import curves

TEMPLATE = Path(__file__).with_name("page.html")
# The table's columns: header, field, and how a value is shown.
TABLE: list[tuple[str, str, Any]] = [
    ("layer", "layer", str), ("rectifier", "rectifier", str), ("part", "part", str), ("mode", "mode", str),
    ("peer", "peer", str), ("input", "shape", str), ("time", "seconds", report.seconds),
    ("time, low", "seconds_low", report.seconds), ("time, high", "seconds_high", report.seconds),
    ("ratio", "ratio", "{:.2f}".format), ("ratio, low", "ratio_low", "{:.2f}".format),
    ("ratio, high", "ratio_high", "{:.2f}".format), ("verdict", "verdict", str),
    ("kept", "kept_bytes", report.size), ("peak", "live_bytes", report.size),
]  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A bar and its interval, as percentages of the track's width; ``at`` is where 1 (or 0) lies."""

    label: str
    note: str
    start: float
    width: float
    low: float
    high: float
    text: str
    kind: str


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    bars: list[Bar]
    at: float = 0.0


def page(
    records: pd.DataFrame, environment: Mapping[str, Any], command: str, comparison: Comparison | None = None
) -> str:
    """The page of ``records``; with what changed, where there is a ``comparison``."""
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    measured = records[(records.part != "machine") & ~records.workload.str.startswith("scaling ")]
    return template.get_template(TEMPLATE.name).render(
        conclusions=list(report.conclusions(records)),
        ratios=_ratio_charts(measured),
        memory=_memory_charts(measured),
        roofline=plots.roofline(records),
        scaling=[picture for curve in curves(records) for picture in plots.scaling(curve)],
        headers=[header for header, _, _ in TABLE],
        rows=[_row(record) for record in records[records.absent == ""].to_dict("records")],
        environment=environment,
        command=command,
        comparison=comparison,
    )


def _ratio_charts(measured: pd.DataFrame) -> list[Chart]:
    charts = []
    for key, group in measured.groupby([*report.TABLE, "peer"], sort=False):
        part, *how, peer = map(str, key)
        ours = group.base.iloc[0]
        rows: list[Any] = list(group[(group.absent == "") & group.ratio.notna()].itertuples(index=False))
        if peer in (ours, *YARDSTICKS) or not rows:
            continue
        # Logarithmic and symmetric about 1: twice as fast is as far to the right as half as fast to the left.
        reach = math.log(min(max(1.5, *(max(r.ratio, 1 / r.ratio) for r in rows)) * 1.25, 32))
        place = lambda ratio, reach=reach: 50 + 50 * max(-1.0, min(1.0, math.log(max(ratio, 1e-9)) / reach))  # noqa: E731
        bars = [_ratio_bar(row, part, place) for row in rows]
        scale = f"logarithmic, from {math.exp(-reach):.2f} to {math.exp(reach):.2f}"
        caption = f"{peer}'s time over that of {ours}, {scale}: to the right of the line, {ours} is the faster"
        charts.append(Chart(f"{', '.join((report.TITLES[part], *how))}: against {peer}", caption, bars, 50.0))
    return charts


def _ratio_bar(row: Any, part: str, place: Any) -> Bar:
    low, at, high = place(row.ratio_low), place(row.ratio), place(row.ratio_high)
    kind = {"faster": "good", "slower": "warn"}.get(row.verdict, "even")
    text = f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}), {row.verdict}"
    name = row.layer if part == "model" else f"{row.layer} · {row.rectifier}"
    return Bar(name, f"{row.ratio:.2f}×", min(50.0, at), abs(at - 50), low, high, text, kind)


def _memory_charts(measured: pd.DataFrame) -> list[Chart]:
    """What a call keeps for backward (its output included), eager above fused."""
    charts = []
    kept = measured[measured.kept_bytes > 0]
    for key, group in kept.groupby(report.TABLE, sort=False):
        part, *how = map(str, key)
        most = max(group.kept_bytes)
        bars = []
        for case in cases(group):
            for record, kind in ((one(case, EAGER), "even"), (one(case, FUSED), "accent")):
                if record is not None:
                    width = 100 * record.kept_bytes / most
                    name = record.layer if part == "model" else f"{record.layer} · {record.rectifier}"
                    label = name if kind == "even" else ""
                    bars.append(Bar(label, f"{record.peer} {report.size(record.kept_bytes)}", 0, width, 0, 0, "", kind))
        title = f"{', '.join((report.TITLES[part], *how))}: bytes kept"
        charts.append(Chart(title, "for backward, the output included", bars))
    return charts


def _row(record: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """(shown, sorted by) of each column."""
    cells = []
    for _, field, shown in TABLE:
        value = record[field]
        number = isinstance(value, float | int)
        known = not number or (math.isfinite(value) and (value > 0 or "bytes" not in field))
        cells.append((shown(value) if known else "", value if known else (-1 if number else "")))
    return cells
