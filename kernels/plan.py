"""From the layout of a dense tensor to tiles: pure Python, no torch, no triton, so every case can be tried.

Dense memory repeats its channel pattern with the period C * inner (inner = the stride of the channel dim: H*W in NCHW,
1 in channels_last). A row is the period taken often enough to be a whole number of vectors: of 8 elements, so that a
vector has one byte of bits, and an integral number of Philox counters, in every dtype. A program owns the same columns
of several rows, so it looks the channel up once for all of them and every access is 128 bits wide, whatever C and H*W
are. Where there is one row only (a batch of one), a program owns more columns instead.

A tile is `depth` x `beside` steps, each an access of 16 bytes a thread, whose loads are all in flight before the first
store. A step is `down` rows of `across` vectors for 128 threads; several lanes share a vector of more than 16 bytes.

How a parameter is looked up:
    "one"      one for all elements
    "vector"   once a vector: all of it is one channel
    "split"    twice a vector, which holds at most two channels
    "element"  for each element
    "plane"    twice a program: one row in planes wider than the tile, at most two channels; a vector belongs to one
    "seam"     the same, but one vector may belong to both: a step that has it chooses element by element
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

THREADS = 128
ACCESS = 16  # bytes
VECTOR = 8  # elements
# Steps of a tile, twice as many where there are rows enough: 4 loads of 16 bytes keep 64 KB in flight at 1024 threads
# an SM, above the 38 KB that B200 needs; 8 share the look-up and the partial sums among more elements, 2 fit planes of
# 2,048 elements, in so few registers that 1,536 threads have 48 KB in flight.
STEPS = 4
# Rows are widened up to this often where that wastes fewer lanes.
MOST_COPIES = 64
# Tiles of 8 steps in place of 4 only where so many programs remain: about four a multiprocessor.
ENOUGH_PROGRAMS = 512
# Instructions of one column's look-up (bfloat16, sm_90), of a step that chooses element by element, and of adding one
# partial sum at last.
LOOKUP_COST = {"one": 4, "plane": 4, "seam": 6, "vector": 30, "split": 60, "element": 200}
SEAM_COST = 40
PARTIAL_COST = 23


@dataclass(frozen=True)
class Plan:
    """How one launch walks a dense tensor of ``size`` elements."""

    size: int
    channels: int
    inner: int
    lanes: int  # threads to a vector
    row: int  # vectors a row
    copies: int  # channel periods a row
    rows: int
    depth: int
    beside: int
    down: int
    across: int
    lookup: str

    @property
    def columns(self) -> int:
        """Tiles across a row."""
        return -(-self.row // (self.beside * self.across))

    @property
    def chunks(self) -> int:
        """Tiles down the rows."""
        return -(-self.rows // (self.depth * self.down))

    @property
    def programs(self) -> int:
        return self.columns * self.chunks

    @property
    def vectors(self) -> int:
        """Whole vectors of the tensor; what remains is the tail."""
        return self.size // VECTOR

    @property
    def tail(self) -> int:
        return self.size % VECTOR

    @property
    def tail_at(self) -> int:
        """The tail's place in its row."""
        return self.vectors % self.row * VECTOR

    @property
    def segment(self) -> int:
        """Adjacent vectors whose sums are merged, at most two channels': a power of two or the tile; 0: none are."""
        if self.lookup == "element":
            return 0
        if self.lookup in ("one", "plane", "seam"):  # the whole tile
            return self.beside * self.across
        # At most a warp's vectors.
        return min(1 << max(self.inner // VECTOR, 1).bit_length() - 1, 32 // self.lanes)

    @property
    def entries(self) -> int:
        """Partial sums of one tile row of programs: two a segment, or one a column."""
        if self.segment:
            return 2 * self.columns * (self.beside * self.across // self.segment)
        return self.columns * self.beside * self.across * VECTOR

    @property
    def partials(self) -> int:
        """Of one sum: those of the tiles, and one an element of the tail."""
        return self.chunks * self.entries + (VECTOR if self.tail else 0)

    @property
    def unit(self) -> int:
        """Elements that share a partial sum, but for the boundary between two channels."""
        return self.segment * VECTOR or 1

    @property
    def touched(self) -> int:
        """At most how many segments hold elements of one channel in one copy of the period."""
        return -(-self.inner // self.unit) + (self.inner % self.unit > 0)

    @property
    def seams(self) -> float:
        """The share of programs with a vector of two channels."""
        if self.lookup != "seam":
            return 0.0
        planes = self.copies * self.channels
        return (planes - planes * math.gcd(self.inner, VECTOR) // VECTOR) / self.columns

    @property
    def index_64(self) -> bool:
        """Whether offsets inside a tile need 64 bits."""
        reach = self.row + self.beside * self.across + self.depth * self.down * self.row
        return reach * VECTOR + self.inner >= 2**31

    @property
    def counter_64(self) -> bool:
        """Whether Philox counts past 32 bits; a counter serves four elements."""
        return self.size > 2**34

    @property
    def finish(self) -> tuple[int, int]:
        """The finishing sum's tile: partials of one channel, and channels, a turn; together 1024, 8 a thread."""
        # With one partial a channel, neighbouring channels lie side by side: at least 8 fill a 32-byte sector.
        most = 1024 if self.segment else 128
        slots = min(most, 1 << (self.chunks * self.copies * self.touched - 1).bit_length())
        return slots, 1024 // slots


def channel_layout(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """(channels, inner) of a dense tensor: position p of its memory is in channel p // inner % channels."""
    if len(shape) < 2 or shape[1] == 1:
        return 1, max(math.prod(shape), 1)
    return shape[1], strides[1]


@lru_cache(maxsize=4096)
def plan(size: int, channels: int, inner: int, itemsize: int) -> Plan:
    """The tiles for ``size`` elements of ``itemsize`` bytes: the candidate of the fewest instructions."""
    lanes = VECTOR * itemsize // ACCESS
    inner = size if channels == 1 else inner
    period = channels * inner
    candidates = _flat(size, channels, inner, lanes)
    least = VECTOR // math.gcd(period, VECTOR)
    for widening in range(1, MOST_COPIES + 1):
        copies = least * widening
        if copies * period * 2 > size:
            break
        candidates += _rows(size, channels, inner, lanes, copies)
    return min(candidates, key=_cost)


def _lookup(channels: int, inner: int) -> str:
    """That of a program with several rows."""
    if channels == 1:
        return "one"
    return "vector" if inner % VECTOR == 0 else "split" if inner > VECTOR else "element"


def _flat(size: int, channels: int, inner: int, lanes: int) -> list[Plan]:
    copies = -(-size // (channels * inner))
    row = -(-size // VECTOR)
    in_wide_planes = "plane" if inner % VECTOR == 0 else "seam"

    def tile(steps: int) -> Plan:
        across = THREADS // lanes
        wide = channels > 1 and inner >= steps * across * VECTOR
        lookup = in_wide_planes if wide else _lookup(channels, inner)
        return Plan(size, channels, inner, lanes, row, copies, 1, 1, steps, 1, across, lookup)

    few, larger = [tile(steps) for steps in range(2, STEPS + 1)], tile(2 * STEPS)
    # Eight vectors' own look-ups would cost ptxas its registers.
    return [*few, *_enough([larger] if larger.lookup in ("one", in_wide_planes) else [])]


def _rows(size: int, channels: int, inner: int, lanes: int, copies: int) -> list[Plan]:
    row = copies * channels * inner // VECTOR
    rows = -(-size // (row * VECTOR))
    lookup = _lookup(channels, inner)

    def tile(depth: int, beside: int = 1, down: int = 1) -> Plan:
        across = THREADS // lanes // down
        return Plan(size, channels, inner, lanes, row, copies, rows, depth, beside, down, across, lookup)

    if lookup == "element":
        # Many channels a vector: the sums run down the rows, 8 rows of threads, each 256 bytes across.
        return [tile(2 * STEPS, down=8), tile(2 * STEPS, down=4), tile(STEPS, down=8)]
    return [tile(2 * STEPS), tile(STEPS), tile(STEPS // 2, 2), *_enough([tile(STEPS, 2)])]


def _enough(plans: list[Plan]) -> list[Plan]:
    return [plan for plan in plans if plan.programs >= ENOUGH_PROGRAMS]


def _cost(plan: Plan) -> tuple[float, int]:
    """Instructions: a thread's own, of each column it looks up, of each step, of a seam, and of the finishing sum."""
    thread = 80 + plan.beside * LOOKUP_COST[plan.lookup] + plan.depth * plan.beside * 64 + plan.seams * SEAM_COST
    return plan.programs * THREADS * thread + plan.partials * PARTIAL_COST, plan.copies
