"""Machine code as instructions and their control flow, whatever the vendor: what `sass.py` and `amdgcn.py` read.

The figures of a kernel are those of its main path: the cheapest way from the entry to an exit that passes as many of
the widest accesses as any way does, loops taken once. The dearest one also does the elements behind the last whole
vector, as one program of the launch, and steps with a vector of two channels, as a share of them (`Plan.seams`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

ACCESSES = ("load", "store")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    kind: str  # the class that the figures count it in: "load", "float", "integer", ...
    pipe: str = ""  # the execution unit, where `roofline.py` has a rate for it
    width: int = 0  # bytes a thread accesses in global memory
    target: int | None = None  # index of the instruction it may branch to
    falls: bool = True  # whether the next instruction may follow
    ends: bool = False  # whether the thread may end here
    written: frozenset[str] = frozenset()  # registers
    read: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Code:
    """One compiled kernel. ``spills``: bytes a thread keeps in local memory; ``shared``: bytes a program."""

    name: str
    instructions: tuple[Instruction, ...]
    registers: int
    spills: int
    shared: int

    def widest(self, kind: str) -> int:
        """Bytes of the widest global "load" or "store"; 0 where there is none."""
        return max((i.width for i in self.instructions if i.kind == kind), default=0)

    def main_path(self) -> list[Instruction]:
        return [self.instructions[i] for i in _path(self.instructions)]

    def dearest_path(self) -> list[Instruction]:
        """The longest way that passes as many of the widest accesses."""
        return [self.instructions[i] for i in _path(self.instructions, dearest=True)]

    def other_path(self) -> list[Instruction]:
        """The cheapest way that turns as the dearest one does where that first leaves the main path."""
        dearest = _path(self.instructions, dearest=True)
        apart = next((n for n, (a, b) in enumerate(zip(dearest, _path(self.instructions), strict=False)) if a != b), 0)
        return [self.instructions[i] for i in dearest[:apart] + _path(self.instructions, start=dearest[apart])]

    def body(self) -> list[Instruction]:
        """The main path from its first to its last access of the widest kind: without the prologue."""
        path = self.main_path()
        widest = max((i.width for i in path), default=0)
        at = [n for n, i in enumerate(path) if i.width == widest]
        return path[at[0] : at[-1] + 1] if at else path

    def loops(self) -> list[list[Instruction]]:
        """The instructions of each loop: those that lead back to its head without passing it."""
        flow = _flow(self.instructions)
        found = []
        for end, head in _walk(flow)[1]:
            below = nx.restricted_view(flow, [head], [])
            body = {head, end} | (nx.ancestors(below, end) if end != head else set())
            found.append([self.instructions[n] for n in sorted(body)])
        return found

    def in_flight(self) -> int:
        """Most bytes of the widest loads that a thread has in flight: a load ends where its first byte is used.

        Threads issue in order, so what follows the first use waits for it.
        """
        path = self.main_path()
        widest = max((i.width for i in path if i.kind == "load"), default=0)
        most = now = 0
        pending: dict[str, int] = {}
        for instruction in path:
            touched = [pending[r] for r in instruction.read | instruction.written if r in pending]
            if touched:
                used = max(touched)
                # Loads return in order, near enough: those issued before the one that is used have ended too.
                pending = {r: n for r, n in pending.items() if n > used}
                now = widest * len(set(pending.values()))
            if instruction.kind == "load" and instruction.width == widest:
                number = max(pending.values(), default=0) + 1
                pending.update(dict.fromkeys(instruction.written, number))
                now += widest
                most = max(most, now)
        return most


def classes(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(i.kind for i in instructions)


def _flow(code: Sequence[Instruction]) -> Any:
    """Which instruction may follow which."""
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(code)))
    for n, i in enumerate(code):
        behind = i.target, n + 1 if i.falls else None
        flow.add_edges_from((n, s) for s in behind if s is not None and s < len(code))
    return flow


def _walk(flow: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Depth first from the entry: (instructions, each behind all that may follow it; edges that close a loop)."""
    order = list(nx.dfs_postorder_nodes(flow, 0)) if flow else []
    place = {n: at for at, n in enumerate(order)}
    return order, [(a, b) for a, b in flow.edges(order) if place[a] <= place[b]]


def _path(code: Sequence[Instruction], dearest: bool = False, start: int = 0) -> list[int]:
    """Indices of a path: most widest accesses first, fewest (or most) instructions then; loops are taken once."""
    step = 1 if dearest else -1
    widest = {kind: max((i.width for i in code if i.kind == kind), default=0) for kind in ACCESSES}
    flow = _flow(code)
    order, back = _walk(flow)
    flow.remove_edges_from(back)
    best: list[tuple[int, int]] = [(0, 0)] * len(code)
    following: list[int | None] = [None] * len(code)
    for n in order:
        i = code[n]
        successors = list(flow[n])
        following[n] = max(successors, key=lambda s: best[s], default=None)
        accesses, length = max((best[s] for s in successors), default=(0, 0))
        if i.ends and (not successors or (accesses, length) < (0, 0)):
            following[n], accesses, length = None, 0, 0
        wide = i.kind in ACCESSES and i.width == widest[i.kind]
        best[n] = (accesses + wide, length + step * (i.kind != "padding"))
    path: list[int] = []
    at: int | None = start if code else None
    while at is not None:
        if code[at].kind != "padding":
            path.append(at)
        at = following[at]
    return path
