"""The page's pictures: matplotlib draws them as SVG, the page's style sheet colours them, in light and in dark.

Every picture is 380 units wide, so that its text is readable on a phone; a page puts several beside each other.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import pandas as pd

from .peers import COPY, EAGER, FUSED, MATMUL
from .records import one
from .scaling import Curve
from .workloads import RECTIFIERS

matplotlib.use("svg")
from matplotlib import pyplot as plt

# Drawn in the left colour, shown in the right one.
COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--warn)",
    "#060606": "var(--good)",
}
INK, MUTED, LINE, ACCENT, WARN, GOOD = COLORS
MARKERS = dict(zip(RECTIFIERS, "os^DvP*X"))
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fused_rect", "font.size": 10, "text.color": INK, "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold",
}  # fmt: skip


def roofline(records: pd.DataFrame) -> str:
    """Floating-point operations a second against operations a byte, under the measured ceilings; "" without."""
    ceilings = records[records.part == "machine"]
    copy, product = one(ceilings, COPY), one(ceilings, MATMUL)
    measured = records[(records.flops > 0) & (records.absent == "") & records.peer.isin([FUSED, EAGER])]
    measured = measured[measured.part.isin(["layer", "epilogue"])]
    if copy is None or product is None or measured.empty:
        return ""
    bandwidth, peak = copy.bytes / copy.seconds, product.flops / product.seconds
    with plt.rc_context(STYLE):
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
        return _svg(figure, "Roofline: the fused calls and eager's under this machine's ceilings")


def scaling(curve: Curve) -> list[str]:
    """Three pictures of a curve: time of the fused call and the copy, bytes moved a second, and cost in copies."""
    with plt.rc_context(STYLE):
        figure, axes = _axes(curve.axis, "time, ms")
        xs = [p.x for p in curve.points]
        axes.plot(xs, [1e3 * p.seconds for p in curve.points], color=ACCENT, marker="o", markersize=4, label="fused")
        axes.plot(xs, [1e3 * p.copy_seconds for p in curve.points], color=MUTED, marker="o", markersize=4, label="copy")
        axes.legend()
        axes.set_title(f"{curve.title}: time")
        time = _svg(figure, f"Time against {curve.axis}")
        figure, axes = _axes(curve.axis, "GB/s")
        axes.plot(xs, [p.bytes / p.seconds / 1e9 for p in curve.points], color=ACCENT, marker="o", markersize=4)
        axes.set_title(f"{curve.title}: bytes moved a second")
        moved = _svg(figure, f"Bytes moved a second against {curve.axis}")
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
        return [time, moved, _svg(figure, f"Cost relative to a copy against {curve.axis}")]


def _axes(x: str, y_label: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(380 / 72, 290 / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y_label)
    axes.grid(True, color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The figure as an SVG element to be put into a page: no prolog, no identifiers but those that it refers to."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    referred = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in referred else "", text)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", text)
    for drawn, shown in COLORS.items():
        text = text.replace(drawn, shown)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
