"""Bias and rectifier, forward and backward, in one kernel; the kind of slope and the sums are known when compiling.

SLOPE is one of `rules.SLOPES`; `plan.py` says what a tile is. Arithmetic is float32 (float64 for float64) and rounds
once. Launch with enable_fp_fusion=False: contracted sums would no longer equal eager's bit for bit.

A tile is done in steps, one access of 16 bytes a thread each. The loads of all of them come first, and a barrier behind
them (`tl.debug_barrier`: one instruction; no thread waits for data) keeps ptxas from moving them behind the arithmetic
of the first. Without it PReLU's backward had 80 of its 256 bytes per thread in flight on B200, the divisor law's
forward 16 of 128. Then step follows step: done all at once, the sides of 64 elements a thread, on which slope and bits
both depend, do not fit the 7 predicates that a thread has (Leaky ReLU's forward:
14.4 instructions per element for 11.1).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import key as philox_key
from .philox import words
from .traffic import launch_metadata


class Tensors(NamedTuple):
    """Pointers or None."""

    x: tl.tensor
    grad: tl.tensor
    out: tl.tensor
    bits: tl.tensor


class Parameters(NamedTuple):
    """Pointers or None, and `Rule.constants` and a norm's eps as the bits of float64."""

    bias: tl.tensor
    weight: tl.tensor
    seed: tl.tensor
    mean: tl.tensor
    var: tl.tensor
    norm_weight: tl.tensor
    scale: tl.tensor
    middle: tl.tensor
    eps: tl.tensor


class Channels(NamedTuple):
    """Position p of a row is in channel p // inner % count."""

    count: tl.tensor
    inner: tl.tensor
    origin: tl.tensor  # the tile's first position


class Tile(NamedTuple):
    """Scalars, counted in vectors."""

    chunk: tl.tensor  # number of the tile down the rows
    corner: tl.tensor  # its first column
    start: tl.tensor  # where its rows start in memory, int64
    left: tl.tensor  # from there to the tensor's end
    row: tl.tensor  # the length of a row


class Elements(NamedTuple):
    """Vectors of V elements, done at once: (DOWN, ACROSS, V), or (..., 1) where V share a value."""

    start: tl.tensor  # the vector in memory that those below count from, int64
    vector: tl.tensor
    position: tl.tensor  # of each vector's first element in its row, unsigned
    mask: tl.tensor  # vectors that exist, be it in part
    live: tl.tensor  # elements that exist
    in_row: tl.tensor  # those whose channel may be looked up


# ---- where ----


@triton.jit
def _unsigned(position, INDEX_64: tl.constexpr):
    """Unsigned: the division by a runtime value is cheaper."""
    return position.to(tl.uint64 if INDEX_64 else tl.uint32)


@triton.jit
def _plane(c):
    """(index, end) of the channel plane that the tile starts in."""
    inner = tl.cast(c.inner, c.origin.dtype)
    plane = c.origin // inner
    return plane, (plane + 1) * inner


@triton.jit
def _seam(c, tile, V: tl.constexpr):
    """The vector of both that plane and the next, counted from the tile's first; out of reach where there is none."""
    _, end = _plane(c)
    return tl.where(end % V == 0, 0x7FFFFFFF, (end // V).to(tile.corner.dtype) - tile.corner)


@triton.jit
def _tile(row, columns, vectors, ROWS: tl.constexpr, WIDTH: tl.constexpr, INDEX_64: tl.constexpr):
    column, chunk = tl.program_id(0), 0
    if ROWS > 1:  # else there is one row only
        chunk = column // columns
        column -= chunk * columns
    if INDEX_64:
        column = column.to(tl.int64)
    start = tl.cast(chunk * ROWS, tl.int64) * row
    left = tl.minimum(vectors - start, 0x7FFFFFFF if not INDEX_64 else vectors)
    return Tile(chunk, column * WIDTH, start, left if INDEX_64 else left.to(tl.int32), row)


@triton.jit
def _step(
    tile, d, b, V: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, INDEX_64: tl.constexpr
):  # fmt: skip
    """The elements of the tile's step (d, b)."""
    r = d * DOWN + tl.arange(0, DOWN)[:, None, None]
    if INDEX_64:
        r = r.to(tl.int64)
    g = tile.corner + b * ACROSS + tl.arange(0, ACROSS)[None, :, None]
    vector = r * tile.row + g
    mask = vector < tile.left
    in_row = mask
    if DEPTH * DOWN > 1:  # a single row ends where the tensor does
        in_row = g < tile.row
        mask &= in_row
    return Elements(tile.start, vector, _unsigned(g * V, INDEX_64), mask, mask, in_row)


@triton.jit
def _tail(vectors, tail, tail_at, V: tl.constexpr, INDEX_64: tl.constexpr):
    """The last elements, which fill no vector."""
    zero = tl.zeros((1, 1, 1), tl.int64 if INDEX_64 else tl.int32)
    live = tl.arange(0, V)[None, None, :] < tail
    return Elements(tl.cast(vectors, tl.int64), zero, _unsigned(tail_at + zero, INDEX_64), zero == 0, live, live)


# ---- parameters ----


@triton.jit
def _look_up(pointer, e, c, LOOKUP: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The parameter of each element, 0.0 where there is none; see `plan.py` for LOOKUP."""
    if pointer is None:
        value = 0.0
    elif LOOKUP == "one":
        value = tl.load(pointer).to(COMPUTE)
    else:
        j = tl.arange(0, V)[None, None, :].to(e.position.dtype)
        count = tl.cast(c.count, e.position.dtype)
        inner = tl.cast(c.inner, e.position.dtype)
        if LOOKUP == "element":
            channel = (e.position + j) // inner % count
            value = tl.load(pointer + channel, mask=e.in_row & (j >= 0), other=0).to(COMPUTE)
        else:
            plane = e.position // inner
            channel = plane % count
            value = tl.load(pointer + channel, mask=e.in_row, other=0).to(COMPUTE)
            if LOOKUP == "split":
                following = tl.where(channel + 1 == count, 0, channel + 1)
                second = tl.load(pointer + following, mask=e.in_row, other=0).to(COMPUTE)
                value = tl.where(j < (plane + 1) * inner - e.position, value, second)
    return value


@triton.jit
def _look_ups(p, e, c, LOOKUP: tl.constexpr, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """(bias, weight, scale) of each element: z = x * scale + bias."""
    bias, weight = _look_up(p.bias, e, c, LOOKUP, V, COMPUTE), _look_up(p.weight, e, c, WEIGHT, V, COMPUTE)
    scale = 1.0
    if p.var is not None:
        scale = tl.rsqrt(_look_up(p.var, e, c, LOOKUP, V, COMPUTE) + _number(p.eps, COMPUTE))
        if p.norm_weight is not None:
            scale *= _look_up(p.norm_weight, e, c, LOOKUP, V, COMPUTE)
        bias -= _look_up(p.mean, e, c, LOOKUP, V, COMPUTE) * scale
    return bias, weight, scale


@triton.jit
def _of_channel(p, channel, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The same, all of one channel."""
    own = Parameters(
        None if p.bias is None else p.bias + channel,
        None if p.weight is None else p.weight + (0 if WEIGHT == "one" else channel),
        p.seed,
        None if p.mean is None else p.mean + channel,
        None if p.var is None else p.var + channel,
        None if p.norm_weight is None else p.norm_weight + channel,
        p.scale,
        p.middle,
        p.eps,
    )
    return _look_ups(own, None, None, "one", "one", V, COMPUTE)


@triton.jit
def _of_both(p, c, LOOKUP: tl.constexpr, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """Those of the two channels that a tile of one row may meet."""
    here = _of_channel(p, 0, WEIGHT, V, COMPUTE)
    there = here
    if LOOKUP != "one":
        plane, _ = _plane(c)
        count = tl.cast(c.count, plane.dtype)
        channel = plane % count
        here = _of_channel(p, channel, WEIGHT, V, COMPUTE)
        there = _of_channel(p, tl.where(channel + 1 == count, 0, channel + 1), WEIGHT, V, COMPUTE)
    return here, there


@triton.jit
def _chosen(first, here, there):
    """Of those, whichever each element or vector has."""
    return tl.where(first, here[0], there[0]), tl.where(first, here[1], there[1]), tl.where(first, here[2], there[2])


@triton.constexpr_function
def _parameters_first(slope, lookup):
    """Whether the parameters come before the inputs. If not, nothing can use an input before they are there.

    But a column's eight or sixteen look-ups take many registers: behind the loads they made ptxas spill. And so did
    any where little else happens.
    """
    return slope in ("zero", "constant") or lookup == "element"


# ---- the rule ----


@triton.jit
def _number(bits, COMPUTE: tl.constexpr):
    """A host float64, passed as its bits: a float argument arrives as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def _key(p):
    """Of random slopes. Read behind the barrier, or ptxas would make the slopes before the loads."""
    if p.seed is None:
        return 0, 0
    else:
        return philox_key(p.seed)


@triton.jit
def _slope(p, weight, key, vector, SLOPE: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The negative side's slope; ``vector``: unsigned indices of the vectors in memory."""
    if SLOPE == "learned":
        return weight
    elif SLOPE == "drawn" or SLOPE == "drawn divisor":
        drawn = words(vector, key, V, LANES).to(COMPUTE)
        value = tl.fma(drawn, _number(p.scale, COMPUTE), _number(p.middle, COMPUTE))
        if SLOPE == "drawn divisor":
            # A division that rounds correctly calls a subroutine, the fast one takes 7 instructions to cover all of
            # float32. The root's square takes 2, and a Newton step brings it within 1 ulp.
            root = tl.rsqrt(value)
            inverse = root * root
            value = tl.fma(inverse, tl.fma(-value, inverse, 1.0), inverse)
        return value
    else:
        return _number(p.scale, COMPUTE)


@triton.jit
def _is_negative(z, SLOPE: tl.constexpr):
    """Which side NaN takes is eager's choice: threshold and rrelu test z <= 0, leaky_relu and prelu test z > 0."""
    if SLOPE == "constant" or SLOPE == "learned":
        return ~(z > 0)
    else:
        return z <= 0


@triton.jit
def _rectified(value, negative, slope, SLOPE: tl.constexpr):
    if SLOPE == "zero":
        # Of z itself one `max`, which makes +0.0 of -0.0. CPU torch keeps it, as z < 0 would for two instructions more.
        return tl.where(negative, 0.0, value)
    else:
        return tl.where(negative, value * slope, value)


# ---- bits: bit i % 8 of byte i // 8 for the element at position i of the memory, so a byte for each vector ----


@triton.jit
def _byte_of(vector, LANES: tl.constexpr):
    """(D, A, 1) vectors -> (D, A, LANES): each lane of the LANES that share a vector addresses its byte.

    By a division, which hides from the compiler that neighbouring addresses are adjacent: it would have a thread
    access several bytes at once, and carry them to the lanes that need them through shared memory.
    """
    return (vector * LANES + tl.arange(0, LANES)[None, None, :]) // LANES


@triton.jit
def _store_bits(bits, negative, e, V: tl.constexpr, LANES: tl.constexpr):
    own = tl.where(negative, tl.full((1,), 1, tl.uint32) << tl.arange(0, V)[None, None, :], 0)
    own = tl.reshape(own, negative.shape[0], negative.shape[1], LANES, V // LANES)
    # Without the product, of which the upper byte is the lowest again, LLVM calculates in bytes, and packs them first.
    byte = tl.sum(tl.sum(own, axis=3), axis=2, keep_dims=True) * 0x01010101 >> 24
    at = bits + e.start + _byte_of(e.vector, LANES)
    first = tl.arange(0, LANES)[None, None, :] == 0
    tl.store(at, tl.broadcast_to(byte, at.shape).to(tl.uint8), mask=e.mask & first)


@triton.jit
def _unpacked(byte, V: tl.constexpr, LANES: tl.constexpr):
    own = byte.to(tl.int32) >> (tl.arange(0, LANES) * (V // LANES))[None, None, :]
    place = tl.arange(0, V // LANES)[None, None, None, :]
    negative = (tl.expand_dims(own, 3) & (1 << place)) != 0
    return tl.reshape(negative, byte.shape[0], byte.shape[1], V)


# ---- one step ----


@triton.jit
def _load(t, e, LANES: tl.constexpr, V: tl.constexpr):
    """(z without its bias, itself), or (grad, the byte of bits in each lane, or z without its bias).

    Absent vectors have no gradient, and bits of 0, or an infinite z: any finite bias leaves them on the positive side,
    where no slope (inf among them) reaches the sums.
    """
    offset = e.vector * V + tl.arange(0, V)[None, None, :]
    if t.grad is None:
        value = tl.load(t.x + e.start * V + offset, mask=e.live)
        side = value
    else:
        value = tl.load(t.grad + e.start * V + offset, mask=e.live, other=0)
        if t.x is None:
            at = t.bits + e.start + _byte_of(e.vector, LANES)
            side = tl.load(at, mask=tl.broadcast_to(e.mask, at.shape), other=0)
        else:
            side = tl.load(t.x + e.start * V + offset, mask=e.live, other=float("inf"))
    return value, side


@triton.jit
def _apply(
    loaded, t, p, e, values, key, SLOPE: tl.constexpr, WHOLE: tl.constexpr, COUNTER_64: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Stores `out` and, in forward, `bits`; returns what grad_bias and grad_weight sum, 0 for absent elements.

    WHOLE: no vector exists in part.
    """
    value, side = loaded
    bias, weight, scale = values
    counted = (e.start + e.vector).to(tl.uint64 if COUNTER_64 else tl.uint32)
    slope = _slope(p, weight, key, counted, SLOPE, LANES, V, COMPUTE)
    if t.x is None:
        z = value
        negative = _unpacked(side, V, LANES)
    else:
        z = side.to(COMPUTE)
        if p.var is not None:
            z *= scale
        if p.bias is not None or p.var is not None:
            z += bias
        negative = _is_negative(z, SLOPE)
    if t.grad is None:
        value = z
        if t.bits is not None:
            _store_bits(t.bits, negative if WHOLE else negative & e.live, e, V, LANES)
    value = value.to(COMPUTE)
    result = _rectified(value, negative, slope, SLOPE)
    offset = e.vector * V + tl.arange(0, V)[None, None, :]
    tl.store(t.out + e.start * V + offset, result.to(t.out.dtype.element_ty), mask=e.live)
    learned = result
    if SLOPE == "learned":
        learned = tl.where(negative, value * z, 0.0)
    return result, learned


# ---- sums ----


@triton.jit
def _of_segments(
    values, c, first, LOOKUP: tl.constexpr, V: tl.constexpr, ACROSS: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """(ACROSS, V) -> two of (ACROSS,): of the channel that each vector's segment starts in, and of the next one."""
    lane = tl.arange(0, ACROSS)
    vector = first + lane
    boundary = ((vector - lane % SEGMENT) * V // c.inner + 1) * c.inner
    left = boundary - vector * V  # in the segment's first channel
    if LOOKUP == "split":
        belongs = tl.arange(0, V)[None, :] < left[:, None]
        return tl.sum(tl.where(belongs, values, 0.0), axis=1), tl.sum(tl.where(belongs, 0.0, values), axis=1)
    else:
        values = tl.sum(values, axis=1)
        return tl.where(left > 0, values, 0.0), tl.where(left > 0, 0.0, values)


@triton.jit
def _store_segments(to, head, rest, first, ACROSS: tl.constexpr, SEGMENT: tl.constexpr):
    """The two sums of each segment; ``first``: the number of the first one."""
    count: tl.constexpr = ACROSS // SEGMENT
    both = tl.sum(tl.reshape(tl.join(head, rest), count, SEGMENT, 2), axis=1)
    at = (first + tl.arange(0, count))[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(to + at, both)


@triton.jit
def _store_step(
    to, values, c, tile, b, LOOKUP: tl.constexpr, V: tl.constexpr, ACROSS: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """The sums of step b, each column's or each segment's; ``values``: (DOWN, ACROSS, V)."""
    values = tl.sum(values, axis=0)
    first = tile.corner + b * ACROSS
    if SEGMENT == 0:
        vector = first + tl.arange(0, ACROSS)[:, None]
        tl.store(to + vector * V + tl.arange(0, V)[None, :], values, mask=vector < tile.row)
    else:
        head, rest = _of_segments(values, c, first, LOOKUP, V, ACROSS, SEGMENT)
        _store_segments(to, head, rest, first // SEGMENT, ACROSS, SEGMENT)


# ---- tiles ----


@triton.jit
def _rows(
    t, p, c, tile, to_bias, to_weight,
    SLOPE: tl.constexpr, LOOKUP: tl.constexpr, WEIGHT: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_WEIGHT: tl.constexpr,
    INDEX_64: tl.constexpr, COUNTER_64: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr,
    BESIDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, SEGMENT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile whose columns each look their parameters up, and have sums of their own."""
    FIRST: tl.constexpr = _parameters_first(SLOPE, LOOKUP)
    parameters = ()
    loaded = ()
    if FIRST:
        for b in tl.static_range(BESIDE):
            e = _step(tile, 0, b, V, DEPTH, DOWN, ACROSS, INDEX_64)
            parameters += (_look_ups(p, e, c, LOOKUP, WEIGHT, V, COMPUTE),)
    for b in tl.static_range(BESIDE):
        for d in tl.static_range(DEPTH):
            loaded += (_load(t, _step(tile, d, b, V, DEPTH, DOWN, ACROSS, INDEX_64), LANES, V),)
    tl.debug_barrier()
    key = _key(p)
    for b in tl.static_range(BESIDE):
        e = _step(tile, 0, b, V, DEPTH, DOWN, ACROSS, INDEX_64)
        values = parameters[b] if FIRST else _look_ups(p, e, c, LOOKUP, WEIGHT, V, COMPUTE)
        dx, dw = _apply(loaded[b * DEPTH], t, p, e, values, key, SLOPE, True, COUNTER_64, LANES, V, COMPUTE)
        for d in tl.static_range(1, DEPTH):
            e = _step(tile, d, b, V, DEPTH, DOWN, ACROSS, INDEX_64)
            more = _apply(loaded[b * DEPTH + d], t, p, e, values, key, SLOPE, True, COUNTER_64, LANES, V, COMPUTE)
            dx += more[0]
            dw += more[1]
        if SUM_BIAS:
            _store_step(to_bias, dx, c, tile, b, LOOKUP, V, ACROSS, SEGMENT)
        if SUM_WEIGHT:
            _store_step(to_weight, dw, c, tile, b, LOOKUP, V, ACROSS, SEGMENT)


@triton.jit
def _wide(
    t, p, c, tile, to_bias, to_weight,
    SLOPE: tl.constexpr, LOOKUP: tl.constexpr, WEIGHT: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_WEIGHT: tl.constexpr,
    INDEX_64: tl.constexpr, COUNTER_64: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, BESIDE: tl.constexpr,
    ACROSS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of one row, in two channels at most: one of its steps may have a vector of both, the seam."""
    FIRST: tl.constexpr = _parameters_first(SLOPE, LOOKUP)
    _, end = _plane(c)
    loaded = ()
    if FIRST:
        both = _of_both(p, c, LOOKUP, WEIGHT, V, COMPUTE)
    for b in tl.static_range(BESIDE):
        loaded += (_load(t, _step(tile, 0, b, V, 1, 1, ACROSS, INDEX_64), LANES, V),)
    tl.debug_barrier()
    key = _key(p)
    if not FIRST:
        both = _of_both(p, c, LOOKUP, WEIGHT, V, COMPUTE)
    seam, shared = 0, False
    if LOOKUP == "seam":
        seam = _seam(c, tile, V)
        shared = seam < tl.minimum(BESIDE * ACROSS, tile.row - tile.corner)
    if shared:
        sums = _wide_steps(
            loaded, t, p, tile, both, end, seam // ACROSS, key, SLOPE, INDEX_64, COUNTER_64, LANES, V, BESIDE, ACROSS,
            COMPUTE,
        )  # fmt: skip
    else:
        sums = _wide_steps(
            loaded, t, p, tile, both, end, -1, key, SLOPE, INDEX_64, COUNTER_64, LANES, V, BESIDE, ACROSS, COMPUTE,
        )  # fmt: skip
    first = tile.corner // (BESIDE * ACROSS)
    if SUM_BIAS:
        _store_segments(to_bias, sums[0], sums[1], first, ACROSS, ACROSS)
    if SUM_WEIGHT:
        _store_segments(to_weight, sums[2], sums[3], first, ACROSS, ACROSS)


@triton.jit
def _wide_steps(
    loaded, t, p, tile, both, end, seam, key, SLOPE: tl.constexpr, INDEX_64: tl.constexpr, COUNTER_64: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, BESIDE: tl.constexpr, ACROSS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The bias' two sums and the weight's, (ACROSS,) each. ``seam``: the step that has it, or -1."""
    sums = None
    for b in tl.static_range(BESIDE):
        e = _step(tile, 0, b, V, 1, 1, ACROSS, INDEX_64)
        if seam == b:
            more = _wide_step(loaded[b], t, p, e, both, end, key, SLOPE, True, COUNTER_64, LANES, V, COMPUTE)
        else:
            more = _wide_step(loaded[b], t, p, e, both, end, key, SLOPE, False, COUNTER_64, LANES, V, COMPUTE)
        sums = more if sums is None else (sums[0] + more[0], sums[1] + more[1], sums[2] + more[2], sums[3] + more[3])
    return sums


@triton.jit
def _wide_step(
    loaded, t, p, e, both, end, key, SLOPE: tl.constexpr, SHARED: tl.constexpr, COUNTER_64: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What one step adds to those sums. SHARED: with the seam."""
    at = e.position
    if SHARED:
        at += tl.arange(0, V)[None, None, :].to(at.dtype)
    here = at < end
    values = _chosen(here, both[0], both[1])
    dx, dw = _apply(loaded, t, p, e, values, key, SLOPE, True, COUNTER_64, LANES, V, COMPUTE)
    of_bias, of_weight = _of_two(dx, here, SHARED), _of_two(dw, here, SHARED)
    return of_bias[0], of_bias[1], of_weight[0], of_weight[1]


@triton.jit
def _of_two(values, here, SHARED: tl.constexpr):
    """(1, ACROSS, V) -> of the vectors' elements in the first channel, and in the second."""
    if not SHARED:
        values = tl.sum(values, axis=2, keep_dims=True)
    first, second = tl.sum(tl.where(here, values, 0.0), axis=2), tl.sum(tl.where(here, 0.0, values), axis=2)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


# ---- the kernel ----


@triton.constexpr_function
def _in_tail(lookup):
    """The tail's own look-up, in the planner's place."""
    return lookup if lookup == "one" else "element"


@triton.jit(
    do_not_specialize=["scale", "middle", "eps", "tail_at"],
    do_not_specialize_on_alignment=["bits"],
    launch_metadata=launch_metadata,
)
def rectify(
    x, grad, out, bits, bias, weight, seed, partials, mean, var, norm_weight, scale: "i64",
    middle: "i64", eps,
    channels, inner, row, columns, vectors, tail, tail_at, entries, stride,
    SLOPE: tl.constexpr, LOOKUP: tl.constexpr, WEIGHT: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_WEIGHT: tl.constexpr,
    TAIL: tl.constexpr, INDEX_64: tl.constexpr, COUNTER_64: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr,
    BESIDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, SEGMENT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out = rectify(norm(x) + bias), and which elements are negative into ``bits``, unless that is None.

    With ``grad``, out = grad_input, from ``bits`` or, where ``x`` is given, from forward's input; and partial sums of
    grad_bias and grad_weight, each written by one program.
    """
    LANES: tl.constexpr = V * out.dtype.element_ty.primitive_bitwidth // 128
    t = Tensors(x, grad, out, bits)
    p = Parameters(bias, weight, seed, mean, var, norm_weight, scale, middle, eps)
    tile = _tile(row, columns, vectors, DEPTH * DOWN, BESIDE * ACROSS, INDEX_64)
    c = Channels(channels, inner, _unsigned(tile.corner * V, INDEX_64))
    to_bias = None if partials is None else partials + tl.cast(tile.chunk, tl.int64) * entries
    to_weight = to_bias + stride if SUM_BIAS and SUM_WEIGHT else to_bias
    if LOOKUP == "one" or LOOKUP == "plane" or LOOKUP == "seam":
        _wide(
            t, p, c, tile, to_bias, to_weight, SLOPE, LOOKUP, WEIGHT, SUM_BIAS, SUM_WEIGHT, INDEX_64, COUNTER_64,
            LANES, V, BESIDE, ACROSS, COMPUTE,
        )  # fmt: skip
    else:
        _rows(
            t, p, c, tile, to_bias, to_weight, SLOPE, LOOKUP, WEIGHT, SUM_BIAS, SUM_WEIGHT, INDEX_64, COUNTER_64,
            LANES, V, DEPTH, BESIDE, DOWN, ACROSS, SEGMENT, COMPUTE,
        )  # fmt: skip
    if TAIL:
        if tl.program_id(0) == 0:
            e = _tail(vectors, tail, tail_at, V, INDEX_64)
            values = _look_ups(p, e, c, _in_tail(LOOKUP), _in_tail(WEIGHT), V, COMPUTE)
            dx, dw = _apply(
                _load(t, e, LANES, V), t, p, e, values, _key(p), SLOPE, False, COUNTER_64, LANES, V, COMPUTE
            )
            if SUM_BIAS or SUM_WEIGHT:
                to = partials + (stride - V) + tl.arange(0, V)
                if SUM_BIAS:
                    tl.store(to, tl.reshape(dx, V))
                    to += stride
                if SUM_WEIGHT:
                    tl.store(to, tl.reshape(dw, V))
