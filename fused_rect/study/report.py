"""results.json, report.html and the tables on the terminal: one set of numbers, three forms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from .. import files
from ..environment import machine
from . import paper, statistics
from .cost import Cost
from .data import Dataset
from .protocol import SOURCE, Protocol, deviations
from .variants import VARIANTS

NAMES = {"nin": "Network in Network", "ndsb": "the plankton network", "inception": "BN-Inception"}


def results(
    protocol: Protocol, dataset: Dataset, runs: list[dict[str, Any]], costs: list[Cost], command: str,
    device: torch.device, world_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything the report says, as plain JSON values (NaN as null)."""
    frame = statistics.table(runs)
    value = {
        "title": "Rectified activations, after Xu et al. 2015 (arXiv 1505.00853)",
        "command": command,
        "protocol": dataclasses.asdict(protocol),
        "deviations": deviations(protocol),
        "deviations_from": SOURCE[protocol.network],
        "metric": "final epoch; nothing was chosen by the images reported on",
        "data": {
            "name": dataset.name, "source": dataset.source, "sha256": dataset.fingerprint(), "classes": dataset.classes,
        },
        "environment": {**machine(str(device)), "processes": world_size},
        "conclusions": statistics.conclusions(frame, int(frame["test_count"].fillna(0).max()) if len(frame) else 0),
        "summary": statistics.summary(frame).to_dict("records"),
        "differences": {m: statistics.differences(frame, m).to_dict("records") for m in statistics.METRICS},
        "cost": [dataclasses.asdict(cost) for cost in costs],
        "paper": {"results": paper.RESULTS, "caveats": paper.CAVEATS},
        "runs": runs,
    }  # fmt: skip
    return _plain(value)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, value: dict[str, Any]) -> None:
    """results.json and report.html in ``folder``."""
    files.replace_json(folder / "results.json", value)
    files.replace_text(folder / "report.html", html(value))


def html(value: dict[str, Any]) -> str:
    from . import plots

    frame = statistics.table(value["runs"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(percent=percent, loss=loss, p=statistics.p_value, mb=lambda b: f"{b / 1e6:.2f}")
    several = len(statistics.order(frame)) > 1
    return environment.get_template("report.html").render(
        **value,
        labels={key: v.label for key, v in VARIANTS.items()},
        rows=list(rows(value)),
        network=NAMES[value["protocol"]["network"]],
        seeds=sorted(frame["seed"].unique().tolist()),
        curves=plots.learning_curves(value["runs"]),
        difference_plot=plots.differences(frame) if several else "",
        paper_columns=paper.COLUMNS,
        settings=json.dumps(value["protocol"], indent=2),
    )


def rows(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One a variant: its label, the seeds in its means, each figure as {mean, low, high}, and the paper's figures."""
    variants = dict.fromkeys(entry["variant"] for entry in value["summary"])
    for key in variants:
        figures = {e["figure"]: e for e in value["summary"] if e["variant"] == key}
        n, lost = figures["test_loss"]["n"], sum(bool(r.get("diverged")) for r in value["runs"] if r["variant"] == key)
        seeds = f"{n} ({lost} diverged)" if lost else str(n)
        paper = value["paper"]["results"][key]
        yield {"key": key, "label": VARIANTS[key].label, "seeds": seeds, "paper": paper, **figures}


# ---- on the terminal ----


def show(console: Console, value: dict[str, Any]) -> None:
    where = f"{value['data']['name']}, {value['protocol']['network']}"
    headings = ("error %", "log-loss", "train error %\n(eval mode)", "train error %\n(train mode)")
    table = _table(f"{where}: mean [95 % interval] over seeds", "rectifier", "seeds", *headings)
    table.add_column("the paper's\nCIFAR-10 test error %", justify="right", style="dim")
    for row in rows(value):
        figures = (
            percent(row["test_error"]), loss(row["test_loss"]), percent(row["train_error"]),
            percent(row["train_mode_train_error"]),
        )  # fmt: skip
        below = (text.replace(" [", "\n[") for text in figures)
        table.add_row(row["label"], row["seeds"], *below, f"{100 * row['paper']['cifar-10'][1]:.2f}")
    console.print(table)
    for metric, name in statistics.METRICS.items():
        console.print(_pairs_table(value["differences"][metric], name, metric))
    if value["cost"]:
        console.print(_cost_table(value["cost"]))
    for heading, lines in (
        ("What these data can and cannot separate", value["conclusions"]),
        (f"Departures from {value['deviations_from']}", value["deviations"]),
    ):
        console.print(heading, style="bold", highlight=False, markup=False)
        for line in lines:
            console.print(f"- {line}", highlight=False, markup=False)


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _pairs_table(pairs: list[dict[str, Any]], name: str, metric: str) -> Table:
    table = _table(f"Paired differences in {name}", "pair", "difference [95 %]", "Holm p")
    for pair in pairs:
        figure = {"mean": pair["difference"], "low": pair["low"], "high": pair["high"]}
        text = percent(figure) if metric == "test_error" else loss(figure)
        labels = f"{VARIANTS[pair['b']].label} − {VARIANTS[pair['a']].label}"
        table.add_row(labels, text, statistics.p_value(pair["p_holm"]), style="bold" if pair["separated"] else "")
    return table


def _cost_table(costs: list[dict[str, Any]]) -> Table:
    headings = ("epoch, fused", "epoch, eager", "eager / fused [range]", "peak fused MB", "peak eager MB")
    table = _table("Cost, fused against eager in turns", "rectifier", *headings)
    for c in costs:
        table.add_row(
            VARIANTS[c["variant"]].label, f"{c['fused_seconds']:.3f} s", f"{c['eager_seconds']:.3f} s",
            f"{c['speedup']:.2f} [{c['speedup_low']:.2f}, {c['speedup_high']:.2f}]",
            f"{c['fused_bytes'] / 1e6:.2f}", f"{c['eager_bytes'] / 1e6:.2f}",
        )  # fmt: skip
    return table


def percent(figure: dict[str, Any]) -> str:
    return _figure(figure, 100, 2)


def loss(figure: dict[str, Any]) -> str:
    return _figure(figure, 1, 3)


def _figure(figure: dict[str, Any], factor: float, places: int) -> str:
    mean, low, high = (figure[k] for k in ("mean", "low", "high"))
    if mean is None or pd.isna(mean):
        return "n/a"
    text = f"{factor * mean:.{places}f}"
    if low is None or pd.isna(low):
        return text.replace("-", "−")
    return f"{text} [{factor * low:.{places}f}, {factor * high:.{places}f}]".replace("-", "−")
