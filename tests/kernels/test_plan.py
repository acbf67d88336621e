"""The planner, in pure Python: every element in one place of one tile, its summands in its own channel's sum, once.

The kernels' index arithmetic is written here a second time, on numpy integers that cannot overflow; plan.index_64 says
when the kernels need 64 bits for it.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_rect.kernels import plan as planner
from fused_rect.kernels.plan import VECTOR, Plan, channel_layout, plan

ITEMSIZES = (2, 4, 8)


def tile(p: Plan, program: int) -> np.ndarray:
    """The vectors that one program handles."""
    column, chunk = program % p.columns, program // p.columns
    width, down = p.beside * p.across, p.depth * p.down
    g = column * width + np.arange(width)
    r = chunk * down + np.arange(down)
    v = r[:, None] * p.row + g[None, :]
    return v[(g[None, :] < p.row) & (v < p.vectors)]


def partial_of(p: Plan, position: np.ndarray) -> np.ndarray:
    """The partial sum (chunk * entries + entry) that takes in each position of the whole vectors."""
    vector, j = position // VECTOR, position % VECTOR
    g = vector % p.row
    place = g * VECTOR + j
    if p.segment:
        segment = g // p.segment
        boundary = (segment * p.segment * VECTOR // p.inner + 1) * p.inner
        entry = 2 * segment + (place >= boundary)
    else:
        entry = place
    return vector // p.row // (p.depth * p.down) * p.entries + entry


def partials_read(p: Plan, channel: int) -> np.ndarray:
    """The partial sums that the finishing sum of one channel adds up."""
    chunk, copy, k = np.meshgrid(np.arange(p.chunks), np.arange(p.copies), np.arange(p.touched), indexing="ij")
    head = (copy * p.channels + channel) * p.inner
    segment = head // p.unit + k
    at = chunk * p.entries + segment * (2 if p.segment else 1) + (segment * p.unit < head)
    return at[segment * p.unit < head + p.inner]


def check(p: Plan) -> None:
    covered = np.concatenate([tile(p, program) for program in range(p.programs)])
    assert np.array_equal(np.sort(covered), np.arange(p.vectors))
    assert p.vectors * VECTOR + p.tail == p.size and 0 <= p.tail < VECTOR
    channel = np.arange(p.size) // p.inner % p.channels
    # The tail looks its channels up from its place in the row; whole vectors from theirs.
    place = np.arange(p.vectors * VECTOR, p.size) - p.vectors * VECTOR + p.tail_at
    assert np.array_equal(place // p.inner % p.channels, channel[p.vectors * VECTOR :])
    whole = np.arange(p.vectors * VECTOR)
    assert np.array_equal(whole % (p.row * VECTOR) // p.inner % p.channels, channel[: len(whole)])
    assert (p.lookup == "one") == (p.channels == 1)
    if p.lookup in ("vector", "plane"):
        assert p.inner % VECTOR == 0
    if p.lookup == "split":  # at most one boundary inside a vector
        assert p.inner >= VECTOR
    # Sums: distinct powers would overflow, so random 32-bit integers stand for the summands.
    summands = np.random.default_rng(p.size).integers(1, 2**32, p.size)
    partials = np.zeros(p.chunks * p.entries, dtype=np.int64)
    assert p.partials == len(partials) + (VECTOR if p.tail else 0)
    np.add.at(partials, partial_of(p, whole), summands[: len(whole)])
    for c in range(p.channels):
        read = partials_read(p, c)
        assert len(np.unique(read)) == len(read) and (read >= 0).all() and (read < len(partials)).all()
        assert (
            partials[read].sum() + summands[len(whole) :][channel[len(whole) :] == c].sum()
            == summands[channel == c].sum()
        )


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_every_small_tensor(itemsize):
    for batch, channels, inner in itertools.product(
        (1, 2, 3, 9), (1, 2, 3, 7, 8, 16), (1, 2, 3, 4, 5, 7, 8, 9, 16, 25)
    ):
        check(plan(batch * channels * inner, channels, inner, itemsize))


@pytest.mark.exhaustive
def test_every_tensor_of_a_wider_range():
    for batch, channels, inner in itertools.product(range(1, 18), range(1, 34), range(1, 34)):
        for itemsize in ITEMSIZES:
            check(plan(batch * channels * inner, channels, inner, itemsize))


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 3000), st.sampled_from(ITEMSIZES))
def test_middling_tensors(batch, channels, inner, itemsize):
    batch = max(1, min(batch, 300_000 // (channels * inner)))
    if batch * channels * inner <= 1_000_000:
        check(plan(batch * channels * inner, channels, inner, itemsize))


@given(st.sampled_from(ITEMSIZES), st.integers(1, 20), st.integers(2, 20), st.integers(1, 100), st.integers(1, 3))
def test_every_scheme_is_right_whichever_the_planner_prefers(itemsize, batch, channels, inner, widening):
    lanes, size = VECTOR * itemsize // 16, batch * channels * inner
    copies = VECTOR // math.gcd(channels * inner, VECTOR) * widening
    for p in planner._flat(size, channels, inner, lanes) + planner._rows(size, channels, inner, lanes, copies):
        check(p)


@given(st.integers(1, 3), st.integers(2, 5), st.integers(2048, 9000), st.sampled_from(ITEMSIZES))
def test_planes_wider_than_a_tile(batch, channels, inner, itemsize):
    """At most two channels a program, at most one vector of both, and that in the share of programs that is said."""
    p = plan(batch * channels * inner, channels, inner, itemsize)
    check(p)
    assert (p.lookup in ("plane", "seam")) == (p.rows == 1 and inner >= p.beside * p.across * VECTOR)
    if p.lookup not in ("plane", "seam"):
        return
    shared = []
    for program in range(p.programs):
        first = tile(p, program).reshape(-1) * VECTOR
        channel = np.stack([first, first + VECTOR - 1]) // inner
        assert len(np.unique(channel)) <= 2
        shared.append(np.count_nonzero(channel[0] != channel[1]))
    assert max(shared) <= 1 and 0 <= round(p.seams * p.programs) - sum(shared) <= 1  # the tensor's end may count
    assert p.lookup == "seam" or not any(shared)


@given(
    st.integers(1, 2**14),
    st.integers(1, 2**17),
    st.integers(1, 2**33),
    st.sampled_from(ITEMSIZES),
    st.integers(0, 2**63),
)
def test_wherever_the_tensor_is_large(batch, channels, inner, itemsize, where):
    batch = min(batch, max(1, 2**41 // (channels * inner)))  # a few terabytes: more than any device holds
    channels = min(channels, max(1, 2**41 // (batch * inner)))
    size = batch * channels * inner
    p = plan(size, channels, inner, itemsize)
    vector = where % max(p.vectors, 1)
    if p.vectors:
        column, chunk = vector % p.row // (p.beside * p.across), vector // p.row // (p.depth * p.down)
        program = chunk * p.columns + column
        assert program < p.programs < 2**31
        assert np.count_nonzero(tile(p, program) == vector) == 1
    channel = where % channels
    head = where % p.copies * channels * inner + channel * inner
    assert (head + inner - 1) // p.unit - head // p.unit < p.touched
    if not p.index_64:  # what the kernels hold in 32 bits: places in a tile and behind it, boundaries, channels' heads
        down = p.depth * p.down
        assert ((down - 1) * p.row + p.columns * p.beside * p.across) * VECTOR + inner < 2**31
        assert p.copies * channels * inner + inner + p.unit < 2**31
        assert p.chunks * p.copies * p.touched + 1024 < 2**31
        assert p.entries < 2**31


def test_64_bit_indices_only_where_they_must_be():
    """64-bit division is a subroutine: a batch of ordinary images never pays for it, however large."""
    assert not plan(2**12 * 64 * 512 * 512, 64, 512 * 512, 2).index_64
    assert not plan(2**33, 256, 1, 2).index_64
    assert plan(2**33, 2, 2**32, 2).index_64


def test_counters_take_64_bits_only_past_2_to_the_34_elements():
    assert not plan(2**34, 64, 512 * 512, 2).counter_64
    assert plan(2**34 + 8, 64, 512 * 512, 2).counter_64


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize(
    "shape", [(32, 51, 29 * 31), (16, 784, 96), (64, 64, 49), (1, 97, 10815), (4, 192, 1369), (256, 4099, 1)]
)
def test_few_lanes_are_idle(shape, itemsize):
    """Of the threads launched for a million elements or more, at most one in twenty has nothing to do."""
    batch, channels, inner = shape
    for stride in (inner, 1):
        p = plan(batch * channels * inner, channels, stride, itemsize)
        lanes = p.programs * p.depth * p.down * p.beside * p.across
        assert lanes < 1.06 * p.vectors, "lanes launched for each that has a vector to do"


def test_channel_layout():
    assert channel_layout((2, 3, 5, 7), (105, 35, 7, 1)) == (3, 35)
    assert channel_layout((2, 3, 5, 7), (105, 1, 21, 3)) == (3, 1)
    assert channel_layout((4, 6), (6, 1)) == (6, 1)
    assert channel_layout((4, 6), (1, 4)) == (6, 4)
    assert channel_layout((4, 1, 9), (9, 1, 1)) == (1, 36)  # the stride of a dim of one element says nothing
    assert channel_layout((8,), (1,)) == (1, 8)
    assert channel_layout((), ()) == (1, 1)
