"""What only a GPU can show, in one command: `python -m fused_rect.perf.gpu_check --results DIR`, or `make gpu-check`.

Steps in the order of their worth, each in a process of its own with a budget of seconds, 8 minutes in all on 16 cores.
After each the results are written: one JSON file and one Markdown file of a name that no earlier run has, beside the
full log. Nothing is installed or fetched. Exits with 1 where a step failed or had no time, with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_rect import files
from fused_rect.environment import machine

from .gpu import report, running
from .gpu.sizes import SIZES
from .gpu.steps import STEPS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("gpu-check"), help="folder, by default ./gpu-check")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=" ".join(STEPS))
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="small: for a CUDA device made of CPU memory; no CUDA graphs"
    )
    options = parser.parse_args(arguments)
    chosen = [name for name in options.only if SIZES[options.size].graphs or not STEPS[name].graphs]
    print(plan(chosen), flush=True)
    if options.dry_run:
        return 0
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA GPU and torch {torch.__version__} sees none; nothing was run.", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    where = machine("cuda")
    base = _unused(options.results, f"gpu-check-{where['target']}-{time.strftime('%Y-%m-%d')}")
    print(f"results: {base}.json and .md, log: {base}.log", flush=True)
    return check(chosen, options.size, where, base)


def plan(names: Sequence[str]) -> str:
    """What will be done, and how long it may take."""
    width = max(map(len, names))
    lines = [f"  {name:{width}} {STEPS[name].seconds:4} s  {STEPS[name].what}" for name in names]
    total = sum(STEPS[name].seconds for name in names)
    return "\n".join([f"{len(names)} steps, {total} s at most in all, each with its own budget:", *lines])


def check(names: Sequence[str], size: str, where: dict[str, Any], base: Path) -> int:
    """Runs the steps; what they found so far is in the files after each."""
    found: dict[str, Any] = {}
    budgets = {name: STEPS[name].seconds for name in names}
    with open(f"{base}.log", "a") as log:
        for name in names:
            log.write(f"==== {name}\n")
            found[name] = running.run(name, size, budgets[name] * SIZES[size].patience, log)
            print(f"{name}: {found[name]['outcome']} ({found[name]['seconds']} s)", flush=True)
            content = {"machine": where, "size": size, "budgets": budgets, "steps": found}
            files.replace_json(base.with_name(f"{base.name}.json"), content)
            try:
                files.replace_text(base.with_name(f"{base.name}.md"), report.markdown(where, found, budgets))
            except Exception:  # the steps are worth more than how they are told: the JSON file has them
                traceback.print_exc(file=log)
    return int(any(step["outcome"] in (running.FAILED, running.SHORT) for step in found.values()))


def _unused(folder: Path, name: str) -> Path:
    """``folder`` / ``name``, with a number where an earlier run has it: no run writes over another's results."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        base = folder / (name if number == 1 else f"{name}-{number}")
        try:
            open(f"{base}.log", "x").close()
        except FileExistsError:
            continue
        return base
    raise AssertionError


if __name__ == "__main__":
    raise SystemExit(main())
