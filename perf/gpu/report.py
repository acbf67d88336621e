"""The check's results as Markdown, for a person: what each step came to, and tables of what was timed."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..inspection.compiling import NAMES
from .sizes import shape

Report = Mapping[str, Any]
PASSES = {"forward": "forward", "training": "backward"}
COLUMNS = ("rectifier", "dtype", "layout", "shape", "pass", "µs", "GB/s", "of a copy's", "predicted",
           "Inductor / ours", "eager / ours")  # fmt: skip
NOTE = (
    "Of a copy's: GB/s over those of a copy of the same tensor in the same rounds. Predicted: the fraction of the "
    "memory roofline that `fused-rect inspect` expects (sm_90: of an H100's)."
)


def markdown(where: Report, steps: Report, budgets: Mapping[str, int]) -> str:
    """``where``: facts of the machine; ``steps``: what :func:`.running.run` gave for each."""
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in where.items()), ""]
    outcomes = ((name, step["outcome"], step["seconds"], budgets[name]) for name, step in steps.items())
    lines += _table(("step", "outcome", "seconds", "budget"), outcomes)
    for name, step in steps.items():
        lines += ["", f"## {name}", "", *_told(step)]
        found = [record for row in step["rows"] for record in row.get("records", ())]
        if found:
            lines += _kernels(found, _predictions(steps)) if name == "kernels" else TABLES.get(name, _profile)(found)
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def _told(step: Report) -> Iterator[str]:
    """What each row says that no table does, and what is not ok."""
    tabled = {"ok", "case", "records", "clock", "seconds", "predicted"}
    for row in step["rows"]:
        if row.keys() & {"predicted", "so far"} or (row.get("ok") and "records" in row):
            continue
        said = ", ".join(f"{key}: {value}" for key, value in row.items() if key not in tabled)
        mark = "**FAILED** " if row.get("ok") is False else ""
        yield " ".join(f"- {mark}{row.get('case', '')}: {said}".split())


def _profile(found: list[dict[str, Any]]) -> list[str]:
    """The tables of `fused-rect profile`."""
    from rich.console import Console

    from ..profiling import cli, records
    from ..profiling.report import print_report

    text = io.StringIO()
    print_report(records.typed(records.frame(found)), Console(file=text, width=150, **cli.PLAIN))
    return ["", "```", text.getvalue().rstrip(), "```"]


def _host(found: list[dict[str, Any]]) -> list[str]:
    """Microseconds a call of each peer."""
    peers = list(dict.fromkeys(record["peer"] for record in found))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for r in found:
        told = "absent" if r["seconds"] is None else f"{r['seconds'] * 1e6:.1f}"
        rows.setdefault((r["part"], r["rectifier"], r["mode"], r["shape"]), {})[r["peer"]] = told
    cells = ((*case, *(of.get(peer, "") for peer in peers)) for case, of in rows.items())
    return ["", "Microseconds of the host a call:", "", *_table(("", "rectifier", "mode", "shape", *peers), cells)]


TABLES = {"host": _host}


# ---- kernels


def _predictions(steps: Report) -> dict[tuple[Any, ...], float]:
    """Predicted fraction of the roofline by rectifier, dtype, layout, shape and pass."""
    found = {}
    for row in steps.get("prepare", {"rows": ()})["rows"]:
        if "predicted" in row and row["fraction"] is not None:
            p = row["predicted"]
            output = "x".join(map(str, p["shape"]))
            found[p["rectifier"], p["dtype"], NAMES[p["layout"]], output, row["kernel"]] = row["fraction"]
    return found


def _kernels(found: list[dict[str, Any]], predicted: Mapping[tuple[Any, ...], float]) -> list[str]:
    """A row a pass; backward is training without forward, and holds the sums and their end."""
    from ..profiling.peers import COMPILED, COPY, EAGER, FUSED

    cases: defaultdict[tuple[str, ...], dict[tuple[str, str], tuple[float, int]]] = defaultdict(dict)
    for r in found:
        if r["seconds"] is not None and r["part"] == "epilogue":
            cases[r["rectifier"], r["dtype"], r["layout"], r["output"]][r["mode"], r["peer"]] = r["seconds"], r["bytes"]
    rows = []
    for case, of in cases.items():
        copied = 2 * math.prod(shape(case[3])) * getattr(torch, case[1]).itemsize
        for mode, name in PASSES.items():
            seconds, moved = _passed(of, mode, FUSED)
            if seconds is None:
                continue
            copy, _ = of.get((mode, COPY), (None, 0))
            ratios = [_over(_passed(of, mode, peer)[0], seconds) for peer in (COMPILED, EAGER)]
            of_a_copys = _over(copy and moved / seconds * copy, copied)
            told = (f"{seconds * 1e6:.1f}", f"{moved / seconds / 1e9:.0f}", of_a_copys)
            rows.append((*case, name, *told, _over(predicted.get((*case, name)), 1), *ratios))
    return ["", *_ceilings(found), NOTE, "", *_table(COLUMNS, rows)]


def _passed(of: Mapping[Any, tuple[float, int]], mode: str, peer: str) -> tuple[float | None, int]:
    """A peer's seconds and bytes of one pass; None for what is no time, such as two that the noise has swapped."""
    there, forward = of.get((mode, peer)), of.get(("forward", peer))
    if there is None or forward is None:
        return None, 0
    seconds, moved = there if mode == "forward" else (there[0] - forward[0], there[1] - forward[1])
    return (seconds if seconds > 0 else None), moved


def _over(value: float | None, by: float | None) -> str:
    return "" if value is None or not by else f"{value / by:.2f}"


def _ceilings(found: list[dict[str, Any]]) -> list[str]:
    told = [f"a {r['peer']}: " + (f"{r['bytes'] / r['seconds'] / 1e9:.0f} GB/s" if r["peer"] == "copy" else
            f"{r['flops'] / r['seconds'] / 1e12:.0f} TFLOP/s")
            for r in found if r["part"] == "machine" and r["seconds"]]  # fmt: skip
    return ["The machine, in the same run: " + ", ".join(told), ""] if told else []
