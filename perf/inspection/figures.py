"""The figures of one compiled launch, from its machine code and its plan."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from fused_rect.kernels.plan import VECTOR

from . import amdgcn, roofline, sass
from .compiling import Launch, Step, launches
from .instructions import Code, classes


def of_step(step: Step) -> list[dict[str, Any]]:
    """The figures of each distinct kernel that ``step`` launches, as plain data: it crosses processes."""
    return [of_launch(step, launch) for launch in launches(step)]


def of_launch(step: Step, launch: Launch) -> dict[str, Any]:
    """Counts are per element, thread or program, as named; bytes throughout.

    Where a share of the programs has a vector of two channels (`Plan.seams`), an element's count is an average: of the
    main path and, for those, of the cheapest one with no such vector after all and, one step in all, of the dearest
    one, which has one in every step (and does the tail).
    """
    code = read(launch)
    plan = launch.variant.plan
    rows = plan.depth * plan.down
    # The finishing sum has no elements of the tensor: its counts are a thread's, loops taken once.
    elements = 1 if launch.name == "finish" else max(1, rows * plan.beside * plan.across * VECTOR // launch.threads)
    path = code.main_path()
    paths = [(1.0, path)]
    if launch.name != "finish" and plan.seams:
        both = plan.seams / plan.beside
        paths = [(1 - plan.seams, path), (plan.seams - both, code.other_path()), (both, code.dearest_path())]
    bounds: dict[str, Any] = {
        "elements": elements,  # a thread does
        "bytes_per_element": launch.bytes / step.size,
        "threads": launch.threads,  # a program
        "registers": code.registers,  # a thread
        "shared": code.shared,  # a program
        "in_flight": code.in_flight(),  # loads in flight a thread
        "programs": launch.programs,
    }
    gpu = None if launch.name == "finish" else roofline.GPUS.get(step.target)
    return {
        **bounds,
        **asdict(roofline.Prediction() if gpu is None else roofline.predict(gpu, paths, **bounds)),
        "kernel": launch.name,
        "instructions": sum(share * len(part) for share, part in paths) / elements,  # all that a thread does
        "body": len(code.body()) / elements,  # without the prologue
        "by_class": _by_class(paths, elements),
        "spills": code.spills,  # a thread
        "barriers": sum(i.kind == "barrier" for i in path),  # a program
        "looped": sum(i.kind in ("shared", "barrier", "call") for loop in code.loops() for i in loop),  # inside loops
        "calls": sum(i.kind == "call" for i in code.instructions),
        "load": code.widest("load"),
        "store": code.widest("store"),
        "rows": rows,  # a program
    }


def read(launch: Launch) -> Code:
    shared = launch.kernel.metadata.shared
    if "cubin" in launch.kernel.asm:
        return sass.read(launch.kernel.asm["cubin"], launch.kernel.name, shared)
    return amdgcn.parse(launch.kernel.asm["amdgcn"], launch.kernel.name, shared)


def _by_class(paths: roofline.Paths, elements: int) -> dict[str, float]:
    count: defaultdict[str, float] = defaultdict(float)
    for share, part in paths:
        for kind, n in classes(part).items():
            count[kind] += share * n / elements
    return dict(sorted(count.items()))
