"""Holds the compiled kernels to their recorded figures.

`python -m fused_rect.perf.inspection.gate [--record] [--triton VERSION]`.

figures.json keeps them by Triton version, one line a kernel. A kernel is worse where a thread needs more registers or
instructions, where anything spills, and so on (`compare`); getting better is no failure, recording it lowers the bar.
Another version than the installed one runs in an environment of its own (`tritons.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import triton

from . import tritons
from .cli import SHAPES, TARGETS, collect, shape_name
from .compiling import LAYOUTS, RECTIFIERS, Step

FILE = Path(__file__).with_name("figures.json")
BATCH_OF_ONE = (1, 51, 407, 409)  # an odd count of elements too, so the last vector is not whole
VARIANTS = [*product(["bfloat16"], [SHAPES[1], BATCH_OF_ONE]), ("float16", SHAPES[0]), ("float32", SHAPES[1])]
STEPS = [
    Step(target, rectifier, dtype, layout, shape)
    for target, rectifier, layout, (dtype, shape) in product(TARGETS, RECTIFIERS, LAYOUTS, VARIANTS)
]
# What `make test` compiles: every rectifier and both layouts on the newest target but one, RReLU on the newest.
QUICK = [
    step
    for step in STEPS
    if step.dtype == "bfloat16"
    and step.shape == SHAPES[1]
    and (step.target == "sm_90" or (step.target == "sm_100" and step.rectifier == "rrelu"))
]

MORE_IS_WORSE = {
    "registers": "registers a thread",
    "spills": "bytes spilled a thread",
    "shared": "bytes of shared memory a program",
    "barriers": "barriers a program",
    "looped": "shared-memory, barrier or call instructions in loops",
    "calls": "calls",
}
LESS_IS_WORSE = {"load": "bytes of the widest load", "store": "bytes of the widest store"}
# These cost more than a slot each, so they may not grow even where the sum does not.
COSTLY = ("wide multiply", "special", "load", "store", "shared", "shuffle", "local")
ROUNDING = 0.001  # figures are kept with three digits behind the point


def key(step: Step, kernel: str) -> str:
    return f"{step.target} {kernel} {step.rectifier} {step.dtype} {step.layout} {shape_name(step.shape)}"


def kept(figures: dict[str, Any]) -> dict[str, Any]:
    """What the file keeps of one kernel's figures."""
    counts = {name: figures[name] for name in (*MORE_IS_WORSE, *LESS_IS_WORSE)}
    classes = {kind: round(count, 3) for kind, count in figures["by_class"].items()}
    return {"instructions": round(figures["instructions"], 3), **counts, "classes": classes}


def measure(steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    found = collect(steps)
    return {key(step, k["kernel"]): kept(k) for step in steps for k in found[step]}


def compare(name: str, now: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """One line for each figure of kernel ``name`` that is worse than its record, with by how much and where."""
    worse = [
        f"{name}: {now[figure]} {what}, recorded {recorded[figure]}"
        for figures, sign in ((MORE_IS_WORSE, 1), (LESS_IS_WORSE, -1))
        for figure, what in figures.items()
        if sign * (now[figure] - recorded[figure]) > 0
    ]
    before, after = recorded["classes"], now["classes"]
    grown = {kind: n - before.get(kind, 0) for kind, n in after.items() if n - before.get(kind, 0) > ROUNDING}
    excess = now["instructions"] - recorded["instructions"]
    if excess > ROUNDING:
        where = ", ".join(f"{kind} +{n:.3f}" for kind, n in sorted(grown.items(), key=lambda item: -item[1]))
        worse.append(
            f"{name}: {now['instructions']} instructions per element, recorded {recorded['instructions']} ({where})"
        )
    else:
        costly = [kind for kind in COSTLY if kind in grown]
        worse += [
            f"{name}: {kind} instructions +{grown[kind]:.3f} per element over {before.get(kind, 0)}" for kind in costly
        ]
    return worse


def failures(now: dict[str, dict[str, Any]], recorded: dict[str, dict[str, Any]]) -> list[str]:
    missing = [
        f"{name}: no figure is recorded; python -m fused_rect.perf.inspection.gate --record"
        for name in now
        if name not in recorded
    ]
    return missing + [line for name in now if name in recorded for line in compare(name, now[name], recorded[name])]


def load() -> dict[str, dict[str, Any]]:
    """{version: {kernel: figures}}"""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def save(version: str, figures: dict[str, dict[str, Any]]) -> None:
    """One kernel a line, so that a change of the file shows which kernels changed."""
    versions = {**load(), version: figures}
    blocks = []
    for name in sorted(versions):
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(versions[name].items())]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def installed() -> str:
    """The installed Triton's version, without a local suffix."""
    return str(triton.__version__).split("+")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-rect-gate", description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep what is measured as the figures to hold")
    parser.add_argument("--quick", action="store_true", help="the steps of `make test` alone")
    parser.add_argument("--triton", metavar="VERSION", help="in an environment of its own; default: the installed one")
    options = parser.parse_args(arguments)
    if options.triton and options.triton != installed():
        flags = [flag for flag in ("record", "quick") if getattr(options, flag)]
        return tritons.run(options.triton, ["-m", "fused_rect.perf.inspection.gate", *(f"--{flag}" for flag in flags)])
    now = measure(QUICK if options.quick else STEPS)
    recorded = load().get(installed(), {})
    if options.record:
        save(installed(), {**recorded, **now} if options.quick else now)
        print(f"{len(now)} kernels recorded for Triton {installed()} in {FILE}")
        return 0
    worse = failures(now, recorded)
    print(*worse, f"Triton {installed()}: {len(now)} kernels compiled, {len(worse)} figures worse", sep="\n")
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
