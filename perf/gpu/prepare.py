"""Runs once what the other steps time, by all cores: what they compile is in the caches of Triton and Inductor then.

With each of our kernels that is timed comes `inspect`'s prediction for it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fused_rect import backends

from ..inspection import figures
from ..inspection.compiling import NAMES, Step
from ..profiling.measure import Case
from ..profiling.named import described, named
from . import sizes
from .pool import pooled

Row = dict[str, Any]
TOLD = ("kernel", "fraction", "bound", "bytes_per_element")


def prepare(size: sizes.Size) -> Iterator[Row]:
    """A row for each prediction and whatever could not be compiled, and one for each kind of work."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the pool's processes are as many as the cores are
    timed = [*sizes.kernels(size), *sizes.layers(size), *sizes.models(size), *sizes.host(size)]
    timed.sort(key=lambda case: case.about["part"] != "model")  # the longest first
    ran = [case for case in timed if case.about["part"] != "machine"]
    work: list[Callable[[], list[Row]]] = [*(partial(_run, case) for case in ran),
                                           *(partial(_predict, step) for step in predicted(size))]  # fmt: skip
    seconds: defaultdict[str, float] = defaultdict(float)
    for kind, rows, spent in pooled(_timed, work, worth=4):
        yield from rows
        seconds[kind] += spent
    yield {"ok": True, "case": "calls", "are": backends.calls("cuda")}
    for kind, name in ((_run.__name__, "compiled"), (_predict.__name__, "predicted")):
        yield {"ok": True, "case": name, "processes' seconds": round(seconds[kind], 1)}


def predicted(size: sizes.Size) -> list[Step]:
    """The kernels that are timed, as `inspect` names them."""
    major, minor = torch.cuda.get_device_capability()
    layouts = {layout: name for name, layout in NAMES.items()}
    found = {
        Step(f"sm_{major}{minor}", a["rectifier"], a["dtype"], layouts[a["layout"]], sizes.shape(a["output"]))
        for a in (case.about for case in sizes.kernels(size))
        if a["part"] == "epilogue"
    }
    return sorted(found, key=str)


# ---- in the pool ----


def _timed(work: Any) -> tuple[str, list[Row], float]:
    start = time.monotonic()
    try:
        rows = work()
    except Exception as error:
        rows = [{"ok": False, "case": str(work.args[0]), "raised": described(error)}]
    return work.func.__name__, rows, time.monotonic() - start


def _run(case: Case) -> list[Row]:
    for call in named(case.build)(**case.arguments).values():
        if not isinstance(call, str):
            call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return []


def _predict(step: Step) -> list[Row]:
    return [{"predicted": asdict(step), **{key: found[key] for key in TOLD}} for found in figures.of_step(step)]
