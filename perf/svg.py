"""Matplotlib's figures as SVG that takes its colours from the page around it, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

# Drawn so, shown as what a page's style sheet has for them: text, text of less weight, lines.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.edgecolor": LINE, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.5, "legend.frameon": False,
    "axes.titlesize": 11, "axes.titlelocation": "left",
}  # fmt: skip


def element(figure: Any, label: str, shown: Mapping[str, str]) -> str:
    """The figure as an element to be put into a page: no prolog, no identifiers but those that it refers to.

    label: says what it shows, and tells its identifiers from another figure's. shown: what each colour becomes.
    """
    stream = io.StringIO()
    with plt.rc_context({"svg.hashsalt": label}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    text = stream.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    referred = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in referred else "", text)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", text)
    for drawn, color in shown.items():
        text = text.replace(drawn, color)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
