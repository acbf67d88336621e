"""The page's pictures: matplotlib draws them as SVG, the page's style sheet colours them, in light and in dark.

Every picture is 380 units wide, so that its text is readable on a phone; a page puts several beside each other.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

from ..svg import INK, LINE, MUTED, STYLE, element
from .peers import COPY, EAGER, FUSED, MATMUL
from .records import one
from .scaling import Curve
from .workloads import RECTIFIERS

ACCENT, WARN = "#040404", "#050505"
COLORS = {color: f"var(--{name})" for color, name in
          ((INK, "ink"), (MUTED, "muted"), (LINE, "line"), (ACCENT, "accent"), (WARN, "warn"))}  # fmt: skip
MARKERS = dict(zip(RECTIFIERS, "os^DvP*X"))
PICTURES = STYLE | {"legend.fontsize": 9, "axes.titleweight": "bold"}


def roofline(records: pd.DataFrame) -> str:
    """Floating-point operations a second against operations a byte, under the measured ceilings; "" without."""
    ceilings = records[records.part == "machine"]
    copy, product = one(ceilings, COPY), one(ceilings, MATMUL)
    measured = records[(records.flops > 0) & (records.absent == "") & records.peer.isin([FUSED, EAGER])]
    measured = measured[measured.part.isin(["layer", "epilogue"])]
    if copy is None or product is None or measured.empty:
        return ""
    bandwidth, peak = copy.bytes / copy.seconds, product.flops / product.seconds
    with plt.rc_context(PICTURES):
        figure, axes = _axes("operations a byte", "GFLOP/s")
        left = min(measured.flops / measured.bytes) / 2
        right = max(max(measured.flops / measured.bytes) * 2, 4 * peak / bandwidth)
        knee = peak / bandwidth
        axes.plot([left, knee, right], [bandwidth * left / 1e9, peak / 1e9, peak / 1e9], color=MUTED, linewidth=1.5)
        middle = (left * knee) ** 0.5
        axes.annotate(f"copy: {bandwidth / 1e9:.1f} GB/s", (middle, bandwidth * middle / 1e9), (-6, 4),
                      textcoords="offset points", color=MUTED, fontsize=9, ha="right")  # fmt: skip
        axes.annotate(f"matrix product: {peak / 1e9:.0f} GFLOP/s", (right, peak / 1e9), (0, 5),
                      textcoords="offset points", color=MUTED, fontsize=9, ha="right")  # fmt: skip
        for key, rows in measured.groupby(["peer", "rectifier"]):
            peer, rectifier = map(str, key)
            axes.plot(rows.flops / rows.bytes, rows.flops / rows.seconds / 1e9, linestyle="", markersize=6,
                      marker=MARKERS[rectifier], color=ACCENT if peer == FUSED else MUTED,
                      markerfacecolor=ACCENT if peer == FUSED else "none")  # fmt: skip
        for rectifier in sorted(set(measured.rectifier)):
            axes.plot([], [], linestyle="", marker=MARKERS[rectifier], color=ACCENT, label=rectifier)
        axes.plot([], [], linestyle="", marker="o", color=MUTED, markerfacecolor="none", label="eager")
        axes.legend(loc="lower right", handletextpad=0.2)
        return element(figure, "Roofline: the fused calls and eager's under this machine's ceilings", COLORS)


def scaling(curve: Curve) -> list[str]:
    """Three pictures of a curve: time of the fused call and the copy, bytes moved a second, and cost in copies."""
    with plt.rc_context(PICTURES):
        figure, axes = _axes(curve.axis, "time, ms")
        xs = [p.x for p in curve.points]
        axes.plot(xs, [1e3 * p.seconds for p in curve.points], color=ACCENT, marker="o", markersize=4, label="fused")
        axes.plot(xs, [1e3 * p.copy_seconds for p in curve.points], color=MUTED, marker="o", markersize=4, label="copy")
        axes.legend()
        axes.set_title(f"{curve.title}: time")
        time = element(figure, f"Time against {curve.axis}, {curve.title}", COLORS)
        figure, axes = _axes(curve.axis, "GB/s")
        axes.plot(xs, [p.bytes / p.seconds / 1e9 for p in curve.points], color=ACCENT, marker="o", markersize=4)
        axes.set_title(f"{curve.title}: bytes moved a second")
        moved = element(figure, f"Bytes moved a second against {curve.axis}, {curve.title}", COLORS)
        figure, axes = _axes(curve.axis, "cost, copies")
        for note, color in (("", ACCENT), ("launch-bound", MUTED), ("not flat", WARN)):
            chosen = [p for p in curve.points if p.note == note]
            if chosen:
                spread = [
                    [p.cost - p.cost_low for p in chosen],
                    [min(p.cost_high, 4 * p.cost) - p.cost for p in chosen],
                ]
                axes.errorbar([p.x for p in chosen], [p.cost for p in chosen], spread, color=color, marker="o",
                              markersize=4, linestyle="", capsize=2, label=note or "flat")  # fmt: skip
        axes.legend()
        axes.set_title(f"{curve.title}: cost")
        return [time, moved, element(figure, f"Cost relative to a copy against {curve.axis}, {curve.title}", COLORS)]


def _axes(x: str, y_label: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(380 / 72, 290 / 72), layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y_label)
    return figure, axes
