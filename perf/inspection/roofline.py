"""Predicted fraction of the memory roofline, from instructions, bytes and bytes in flight; nothing is measured.

A launch takes at least bytes / bandwidth, at least its instructions over what the multiprocessors issue, and at least
its bytes over what the loads in flight bring in (Little's law: bytes in flight / latency). The fraction is the first
over the largest of the three. `ASSUMPTIONS` says what that leaves out; docs/inspect.md discusses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .instructions import Instruction

ASSUMPTIONS = (
    "instructions, loads and stores overlap perfectly, and every multiprocessor gets the same share of the programs",
    "boost clocks and datasheet bandwidths (a copy reaches 85 to 93 % of those); latencies under load are approximate",
    "each scheduler issues one warp instruction a cycle; integer and conversion units take two cycles an instruction",
    "launches, the finishing sum, cache hits and the ramp of the first and last programs are left out",
)
# The parts of a kernel, each with the share of its threads that go through it.
Paths = Sequence[tuple[float, Sequence[Instruction]]]
SCHEDULERS = 4
LANES = 32


@dataclass(frozen=True)
class GPU:
    """What bounds an elementwise kernel. ``cycles``: of a scheduler's unit for one warp instruction, by pipe."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    latency: float  # seconds from a load's issue to its data, under load
    cycles: dict[str, int]
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    shared: int = field(default=164 * 1024)

    @property
    def needed(self) -> float:
        """Bytes in flight a multiprocessor that the full bandwidth takes."""
        return self.latency * self.bandwidth / self.multiprocessors


# float32 runs at 16 lanes a scheduler on A100 and 32 on the later ones, integer multiplication at 16 on all.
_LATER = {"alu": 2, "fma": 1, "packed": 2, "imad": 2, "special": 8, "load-store": 4}
_A100 = {**_LATER, "fma": 2, "packed": 4}
GPUS = {
    "sm_80": GPU("A100", 108, 1.410e9, 2.04e12, 480e-9, _A100),
    "sm_90": GPU("H100", 132, 1.755e9, 3.35e12, 600e-9, _LATER, shared=228 * 1024),
    "sm_100": GPU("B200", 148, 1.850e9, 8.00e12, 700e-9, _LATER, shared=228 * 1024),
}


@dataclass(frozen=True)
class Prediction:
    """Without arguments: of a target without a model."""

    fraction: float | None = None  # of the memory roofline: of the time that the bytes alone would take
    bound: str = ""  # "memory", "issue" or another pipe, "in flight"
    resident: int = 0  # programs a multiprocessor holds at once
    in_flight_sm: int = 0  # bytes of loads in flight a multiprocessor


def occupancy(gpu: GPU, threads: int, registers: int, shared: int) -> int:
    """Programs of ``threads`` threads that fit a multiprocessor. Registers go to warps in units of 256."""
    warps = math.ceil(threads / LANES)
    a_warp = math.ceil(max(registers, 1) * LANES / 256) * 256
    limits = [gpu.programs, gpu.threads // threads, gpu.registers // (a_warp * warps)]
    if shared:
        limits.append(gpu.shared // (shared + 1024))  # 1 KB of each program's is the system's
    return min(limits)


def slots(gpu: GPU, paths: Paths) -> dict[str, float]:
    """Scheduler cycles of the issue port and of each unit that a warp takes on average."""
    taken = dict.fromkeys(("issue", *gpu.cycles), 0.0)
    for share, path in paths:
        for instruction in path:
            taken["issue"] += share
            if instruction.pipe:
                # A multiprocessor has one load-store unit: 32 lanes of 4 bytes a cycle, for four schedulers.
                times = max(1, instruction.width // 4) if instruction.pipe == "load-store" else 1
                taken[instruction.pipe] += share * gpu.cycles[instruction.pipe] * times
    # Multiplication of integers occupies half of the float unit, so together they take what the unit as a whole gives.
    taken["fma"] += taken.pop("packed") + taken["imad"] * gpu.cycles["fma"] / 2
    return taken


def predict(
    gpu: GPU,
    paths: Paths,
    *,
    elements: int,
    bytes_per_element: float,
    threads: int,
    registers: int,
    shared: int,
    in_flight: int,
    programs: int,
) -> Prediction:
    """One launch of ``programs`` programs; each thread does ``elements``, with ``in_flight`` bytes under way."""
    taken = slots(gpu, paths)
    unit = max(taken, key=lambda name: taken[name])
    rate = gpu.multiprocessors * SCHEDULERS * LANES * gpu.clock
    resident = occupancy(gpu, threads, registers, shared)
    at_once = min(resident, programs / gpu.multiprocessors) * threads * in_flight
    times = {
        "memory": bytes_per_element / gpu.bandwidth,
        unit: taken[unit] / elements / rate,
        "in flight": bytes_per_element * gpu.latency / (at_once * gpu.multiprocessors) if at_once else math.inf,
    }
    bound = max(times, key=lambda name: times[name])
    return Prediction(times["memory"] / times[bound], bound, resident, int(at_once))
