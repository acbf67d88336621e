"""The steps of the GPU check, in the order of their worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..profiling import measure, records
from ..profiling.measure import Case
from ..profiling.named import described
from . import sizes
from .agreement import agreement
from .large import large
from .prepare import prepare
from .replays import replays
from .sanitizer import sanitizer
from .sizes import Size
from .suite import suite

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """seconds: its budget. what: it shows. run: yields a row for each thing found, as it is found.

    A row's "ok" is True, False, or None where there is nothing to try it with.
    """

    seconds: int
    what: str
    run: Callable[[Size], Rows]
    graphs: bool = False  # whether it is about CUDA graphs


def measured(cases: Sequence[Case], size: Size) -> Rows:
    """The records of each case as `fused-rect profile` has them. A call that could not be timed is not ok."""
    for case in cases:
        start = time.monotonic()
        try:
            found = measure.sampled(case, rounds=size.rounds, least=size.least)
            rows = records.rows(case, measure.joined([found]))
        except Exception as error:
            yield {"ok": False, "case": case.name, "raised": described(error)}
            continue
        missing = {row["peer"]: row["absent"] for row in rows if row["absent"]}
        row = {"ok": not missing, "case": case.name, "clock": case.clock, "seconds": round(time.monotonic() - start, 2)}
        yield row | ({"missing": missing} if missing else {}) | {"records": rows}
        torch.cuda.empty_cache()


STEPS = {
    "prepare": Step(90, "kernels and compiled models into the caches, by all cores; inspect's predictions", prepare),
    "agreement": Step(35, "the kernels' values, gradients, sums and bits against eager's on the CPU",
                      lambda size: agreement("cuda", size.agreement)),
    "kernels": Step(90, "each kernel's time on the device alone, beside Inductor's, eager's and a copy's",
                    lambda size: measured(sizes.kernels(size), size)),
    "models": Step(70, "networks, training and inference: eager, fuse(), torch.compile, ours; time and peak memory",
                   lambda size: measured(sizes.models(size), size)),
    "graph": Step(15, "a training step with RReLU in a CUDA graph: new slopes and weights at each replay",
                  lambda size: replays("cuda"), graphs=True),
    "tests": Step(60, "the tests that reach the kernels", lambda size: suite(size.tests)),
    "large": Step(25, "tensors of more than 2^31 elements", lambda size: large("cuda", size.elements)),
    "host": Step(15, "what a call costs the host", lambda size: measured(sizes.host(size), size)),
    "layers": Step(30, "whole layers, training and inference; time and peak memory",
                   lambda size: measured(sizes.layers(size), size)),
    "sanitizer": Step(35, "compute-sanitizer: memory, races, reads of what nobody wrote", lambda size: sanitizer()),
}  # fmt: skip
