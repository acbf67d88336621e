"""The figures of one compiled launch, from its machine code and its plan."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from fused_rect.kernels.plan import VECTOR

from . import amdgcn, roofline, sass
from .compiling import Launch, Step, launches
from .instructions import Code, classes


@dataclass(frozen=True)
class Figures:
    """Counts are per element, thread or program, as named; bytes throughout.

    Where a share of the programs has a vector of two channels (`Plan.seams`), an element's count is the average of the
    main path's and, for those, of the dearest one's, which does the tail as well.
    """

    kernel: str  # "forward", "backward" or "finish"
    elements: int  # a thread does
    instructions: float  # per element, everything a thread does
    body: float  # per element, without the prologue
    by_class: dict[str, float]  # per element
    registers: int
    spills: int  # a thread
    shared: int  # a program
    barriers: int  # a program
    looped: int  # shared-memory, barrier and call instructions inside loops
    calls: int
    load: int
    store: int
    in_flight: int  # loads in flight a thread
    bytes_per_element: float
    programs: int
    rows: int  # a program
    threads: int  # a program
    fraction: float | None = None  # of the memory roofline, predicted; None for a target without a model
    bound: str = ""
    resident: int = 0  # programs a multiprocessor
    in_flight_sm: int = 0  # loads in flight a multiprocessor

    @property
    def wide_multiplies(self) -> float:
        return self.by_class.get("wide multiply", 0.0)


def of_step(step: Step) -> list[dict[str, Any]]:
    """The figures of each distinct kernel that ``step`` launches, as plain data: it crosses processes."""
    return [asdict(of_launch(step, launch)) for launch in launches(step)]


def of_launch(step: Step, launch: Launch) -> Figures:
    code = read(launch)
    plan = launch.variant.plan
    rows = plan.depth * plan.down
    # The finishing sum has no elements of the tensor: its counts are a thread's, loops taken once.
    elements = 1 if launch.name == "finish" else max(1, rows * plan.beside * plan.across * VECTOR // launch.threads)
    path = code.main_path()
    paths = [(1.0, path)]
    if launch.name != "finish" and plan.seams:
        paths = [(1 - plan.seams, path), (plan.seams, code.dearest_path())]
    prediction = _prediction(step, launch, code, paths, elements)
    return Figures(
        kernel=launch.name,
        elements=elements,
        instructions=sum(share * len(part) for share, part in paths) / elements,
        body=len(code.body()) / elements,
        by_class=_by_class(paths, elements),
        registers=code.registers,
        spills=code.spills,
        shared=code.shared,
        barriers=sum(i.kind == "barrier" for i in path),
        looped=sum(i.kind in ("shared", "barrier", "call") for loop in code.loops() for i in loop),
        calls=sum(i.kind == "call" for i in code.instructions),
        load=code.widest("load"),
        store=code.widest("store"),
        in_flight=code.in_flight(),
        bytes_per_element=launch.bytes / step.size,
        programs=launch.programs,
        rows=rows,
        threads=launch.threads,
        **prediction,
    )


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


def _prediction(step: Step, launch: Launch, code: Code, paths: roofline.Paths, elements: int) -> dict[str, Any]:
    gpu = roofline.GPUS.get(step.target)
    if gpu is None or launch.name == "finish":
        return {}
    found = roofline.predict(
        gpu,
        paths,
        elements=elements,
        bytes_per_element=launch.bytes / step.size,
        threads=launch.threads,
        registers=code.registers,
        shared=code.shared,
        in_flight=code.in_flight(),
        programs=launch.programs,
    )
    return {
        "fraction": found.fraction,
        "bound": found.bound,
        "resident": found.resident,
        "in_flight_sm": found.in_flight,
    }
