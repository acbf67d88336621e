"""The report's two figures as SVG text that takes its colours from the page, so that they follow light and dark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from ..perf.svg import INK, LINE, MUTED, STYLE, element
from . import statistics
from .variants import VARIANTS

_SERIES = {key: f"#0300{i:02d}" for i, key in enumerate(VARIANTS, 10)}
_SHOWN = {color: f"var(--series-{i})" for i, color in enumerate(_SERIES.values(), 1)}
_SHOWN |= {INK: "var(--ink)", MUTED: "var(--soft)", LINE: "var(--line)"}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), "-")
PANELS = (
    ("train_loss", "Training log-loss, as the updates saw it"),
    ("test_loss", "Log-loss reported on, eval mode"),
    ("test_error", "Error reported on, eval mode"),
)


def learning_curves(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds that did not diverge, with 95 % intervals, one panel a figure; "" where none is left."""
    kept = [r for r in runs if not r.get("diverged")]
    if not kept:
        return ""
    frame = pd.DataFrame([{"variant": r["variant"], **entry} for r in kept for entry in r["history"]])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for axis, (column, title) in zip(axes, PANELS):
            for i, key in enumerate(statistics.order(frame)):
                rows = frame[(frame["variant"] == key) & frame[column].notna()]
                grouped = rows.groupby("epoch")[column]
                means, bounds = grouped.mean(), np.array([statistics.interval(g) for _, g in grouped])
                axis.plot(
                    means.index, means, color=_SERIES[key], linestyle=_DASHES[i], linewidth=1.8,
                    marker="o", markersize=3, label=VARIANTS[key].label,
                )  # fmt: skip
                axis.fill_between(means.index, bounds[:, 0], bounds[:, 1], color=_SERIES[key], alpha=0.12, linewidth=0)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return element(figure, "Learning curves", _SHOWN)


def differences(frame: pd.DataFrame) -> str:
    """Each variant against the first (ReLU): every seed's difference as a dot, the mean with its 95 % interval."""
    first, *others = statistics.order(frame)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(12, 0.62 * len(others) + 1.3), sharey=True, layout="constrained")
        for axis, metric in zip(axes, statistics.METRICS):
            wide = frame.pivot(index="seed", columns="variant", values=metric) * (100 if metric == "test_error" else 1)
            for row, key in enumerate(others):
                d = (wide[key] - wide[first]).dropna().to_numpy()
                if not len(d):
                    continue
                low, high = statistics.interval(d)
                color = _SERIES[key]
                axis.plot(d, np.full(len(d), row + 0.22), ".", color=color, alpha=0.45, markersize=5)
                axis.plot([low, high], [row, row], color=color, linewidth=2.5, solid_capstyle="round")
                axis.plot(d.mean(), row, "o", color=color, markersize=7)
            axis.axvline(0, color=INK, linewidth=1)
            axis.set_yticks(range(len(others)), [VARIANTS[key].label for key in others])
            axis.set_ylim(len(others) - 0.45, -0.45)
            unit = " (percentage points)" if metric == "test_error" else ""
            axis.set_xlabel(f"{statistics.METRICS[metric]} − that of {VARIANTS[first].label}{unit}")
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        return element(figure, "Differences from the first rectifier", _SHOWN)
