"""From the layout of a dense tensor to tiles: pure Python, no torch, no triton, so every case can be tried.

Dense memory repeats its channel pattern with the period C * inner (inner = the stride of the channel dim: H*W in NCHW,
1 in channels_last). A row is the period taken often enough to be a whole number of 16-byte vectors. A program owns the
same columns of several rows, so it looks the channel up once for all of them and every access is 128 bits wide,
whatever C and H*W are. Where there is one row only (a batch of one), a program owns more columns instead.

A tile is (depth, lanes_down, across, vector): `depth` rows a thread, so that its loads are all under way before the
first store; `lanes_down` rows and `across` vectors share out the 128 threads.

How a parameter is looked up:
    "vector"   once a vector: all of it is one channel
    "split"    twice a vector, which holds at most two channels
    "element"  for each element
    "tile"     twice a program: one row in planes wider than the tile, at most two channels; a vector belongs to one
    "seam"     the same, but the vector where the channels meet belongs to both: it is left out and done by itself
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

THREADS = 128
# Vectors a thread, twice as many where there are rows enough: 4 loads of 16 bytes keep 64 KB under way at 1024 threads
# an SM, above the 38 KB that B200 needs; 8 share the look-up and the partial sums among more elements.
DEPTH = 4
# Rows are widened up to this often where that wastes fewer lanes.
WIDEST = 64
# Tiles of 8 vectors a thread in place of 4 only where so many programs remain: about four a multiprocessor.
FEWEST = 512
# Instructions of one column's look-up (bfloat16, sm_90), and of a seam.
LOOKUP_COST = {"tile": 4, "seam": 6, "vector": 30, "split": 60, "element": 200}
SEAM_COST = 250


@dataclass(frozen=True)
class Plan:
    """How one launch walks a dense tensor of ``size`` elements."""

    size: int
    channels: int
    inner: int
    vector: int  # elements a vector
    row: int  # vectors a row
    copies: int  # channel periods a row
    rows: int
    depth: int
    lanes_down: int
    across: int
    lookup: str

    @property
    def columns(self) -> int:
        """Tiles across a row."""
        return -(-self.row // self.across)

    @property
    def chunks(self) -> int:
        """Tiles down the rows."""
        return -(-self.rows // (self.depth * self.lanes_down))

    @property
    def programs(self) -> int:
        return self.columns * self.chunks

    @property
    def vectors(self) -> int:
        """Whole vectors of the tensor; what remains is the tail."""
        return self.size // self.vector

    @property
    def tail(self) -> int:
        return self.size % self.vector

    @property
    def tail_at(self) -> int:
        """The tail's place in its row."""
        return self.vectors % self.row * self.vector

    @property
    def segment(self) -> int:
        """Adjacent vectors whose sums are merged: a power of two that spans at most two channels; 0: none are."""
        if self.lookup == "element":
            return 0
        widest = min(self.across, 1 << max(self.inner // self.vector, 1).bit_length() - 1)
        # A warp's 32 vectors, unless a segment spans several vectors of each of the 128 threads.
        return widest if widest > THREADS else min(widest, 32)

    @property
    def entries(self) -> int:
        """Partial sums of one tile row of programs: two a segment, or one a column."""
        if self.segment:
            return 2 * self.columns * (self.across // self.segment)
        return self.columns * self.across * self.vector

    @property
    def unit(self) -> int:
        """Elements that share a partial sum, but for the boundary between two channels."""
        return self.segment * self.vector or 1

    @property
    def touched(self) -> int:
        """At most how many segments hold elements of one channel in one copy of the period."""
        return -(-self.inner // self.unit) + (self.inner % self.unit > 0)

    @property
    def seams(self) -> float:
        """The share of programs with a seam to do."""
        if self.lookup != "seam":
            return 0.0
        planes = self.copies * self.channels
        return (planes - planes * math.gcd(self.inner, self.vector) // self.vector) / self.columns

    @property
    def wide(self) -> bool:
        """Whether offsets inside a tile need 64 bits."""
        reach = self.row + self.across + self.depth * self.lanes_down * self.row
        return reach * self.vector + self.inner >= 2**31

    @property
    def far(self) -> bool:
        """Whether Philox counts past 32 bits; a counter serves four elements."""
        return self.size > 2**34

    @property
    def finish(self) -> tuple[int, int]:
        """The finishing sum's tile: partials of one channel, and channels, a turn; together 1024, 8 a thread."""
        # With one partial a channel, neighbouring channels lie side by side: at least 8 fill a 32-byte sector.
        most = 1024 if self.segment else 128
        slots = min(most, 1 << (self.chunks * self.copies * self.touched - 1).bit_length())
        return slots, 1024 // slots

    @property
    def waste(self) -> float:
        """Lanes launched for each lane that has a vector to do."""
        return self.programs * self.depth * self.lanes_down * self.across / max(self.vectors, 1)


def channel_layout(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """(channels, inner) of a dense tensor: position p of its memory is in channel p // inner % channels."""
    if len(shape) < 2 or shape[1] == 1:
        return 1, max(math.prod(shape), 1)
    return shape[1], strides[1]


@lru_cache(maxsize=4096)
def plan(size: int, channels: int, inner: int, itemsize: int) -> Plan:
    """The tiles for ``size`` elements of ``itemsize`` bytes: the candidate of the fewest instructions."""
    vector = max(4, 16 // itemsize)  # a Philox counter serves four elements, so float64 takes two accesses a vector
    inner = size if channels == 1 else inner
    period = channels * inner
    lookup = "vector" if channels == 1 or inner % vector == 0 else "split" if inner > vector else "element"
    candidates = _flat(size, channels, inner, vector, lookup)
    least = vector // math.gcd(period, vector)
    for widening in range(1, WIDEST + 1):
        copies = least * widening
        if copies * period * 2 > size:
            break
        candidates += _rows(size, channels, inner, vector, copies, lookup)
    return min(candidates, key=_cost)


def _flat(size: int, channels: int, inner: int, vector: int, lookup: str) -> list[Plan]:
    copies = -(-size // (channels * inner))
    row = -(-size // vector)

    wide = "tile" if inner % vector == 0 else "seam"

    def tile(across: int) -> Plan:
        once = channels > 1 and inner >= across * vector
        return Plan(size, channels, inner, vector, row, copies, 1, 1, 1, across, wide if once else lookup)

    usual, larger = tile(DEPTH * THREADS), tile(2 * DEPTH * THREADS)
    # Eight vectors' own look-ups would cost ptxas its registers.
    return [usual, *_enough([larger] if channels == 1 or larger.lookup == wide else [])]


def _rows(size: int, channels: int, inner: int, vector: int, copies: int, lookup: str) -> list[Plan]:
    row = copies * channels * inner // vector
    rows = -(-size // (row * vector))

    def tile(depth: int, lanes_down: int, across: int) -> Plan:
        return Plan(size, channels, inner, vector, row, copies, rows, depth, lanes_down, across, lookup)

    if lookup == "element":
        # Many channels a vector: the sums run down the rows, 8 rows of threads, each 16 vectors = 256 bytes across.
        return [tile(2 * DEPTH, 8, 16), tile(DEPTH, 8, 16)]
    usual = [tile(2 * DEPTH, 1, THREADS), tile(DEPTH, 1, THREADS), tile(DEPTH // 2, 1, 2 * THREADS)]
    return usual + _enough([tile(DEPTH, 1, 2 * THREADS)])


def _enough(plans: list[Plan]) -> list[Plan]:
    return [plan for plan in plans if plan.programs >= FEWEST]


def _cost(plan: Plan) -> tuple[float, int]:
    """Instructions: a thread's own, of each vector column it looks up, of each vector it does, and of a seam."""
    columns = plan.lanes_down * plan.across // THREADS
    thread = 80 + columns * (LOOKUP_COST[plan.lookup] + 64 * plan.depth) + SEAM_COST * plan.seams
    return plan.programs * thread, plan.copies
