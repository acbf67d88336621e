"""The forward and the backward kernel of all four rectifiers; the slope rule is the only thing that varies.

RULE is "relu", "leaky_relu", "prelu", "rrelu" or "rrelu_divisor", known when compiling. `plan.py` says what a tile is.
Arithmetic is float32 (float64 for float64) and rounds once. Launch with enable_fp_fusion=False: contracted sums would
no longer equal eager's bit for bit.
"""

import triton
import triton.language as tl

from .philox import words


@triton.jit
def _channel_values(pointer, first, inner, channels, mask, LOOKUP: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The parameter of each element: ``first`` (1, 1, G, 1) is the position in the row of each vector's first element."""
    if LOOKUP == "one":
        return tl.load(pointer).to(COMPUTE)
    inner = tl.cast(inner, first.dtype)
    channels = tl.cast(channels, first.dtype)
    j = tl.arange(0, V)[None, None, None, :]
    if LOOKUP == "element":
        channel = (first + j.to(first.dtype)) // inner % channels
        return tl.load(pointer + channel, mask=mask & (j >= 0), other=0).to(COMPUTE)
    plane = first // inner
    channel = plane % channels
    value = tl.load(pointer + channel, mask=mask, other=0).to(COMPUTE)
    if LOOKUP == "split":
        following = tl.where(channel + 1 == channels, 0, channel + 1)
        second = tl.load(pointer + following, mask=mask, other=0).to(COMPUTE)
        value = tl.where(j.to(first.dtype) < (plane + 1) * inner - first, value, second)
    return value


@triton.jit
def _number(bits, COMPUTE: tl.constexpr):
    """A host float64, passed as its bits: a float argument arrives as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def _slope(weight, vector, seed, lower, upper, RULE: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr):
    """The negative side's slope; ``lower`` and ``upper`` are scale and middle of the random rules, made by the host."""
    if RULE == "prelu":
        return weight
    elif RULE == "rrelu" or RULE == "rrelu_divisor":
        drawn = words(vector, tl.load(seed), V).to(COMPUTE)
        drawn = tl.reshape(drawn, vector.shape[0], vector.shape[1], vector.shape[2], V)
        value = tl.fma(drawn, _number(lower, COMPUTE), _number(upper, COMPUTE))
        if RULE == "rrelu_divisor":
            # A division that rounds correctly calls a subroutine; one Newton step brings the fast one within 1 ulp.
            inverse = 1.0 / value
            value = tl.fma(inverse, tl.fma(-value, inverse, 1.0), inverse)
        return value
    else:
        return _number(lower, COMPUTE)


@triton.jit
def _is_negative(z, RULE: tl.constexpr):
    """Which side NaN takes is eager's choice: threshold and rrelu test z <= 0, leaky_relu and prelu test z > 0."""
    if RULE == "leaky_relu" or RULE == "prelu":
        return ~(z > 0)
    else:
        return z <= 0


@triton.jit
def _rectify(z, slope, RULE: tl.constexpr):
    if RULE == "relu":
        return tl.where(_is_negative(z, RULE), 0.0, z)
    else:
        return tl.where(_is_negative(z, RULE), z * slope, z)


@triton.jit
def _derivative(grad, z, slope, RULE: tl.constexpr):
    if RULE == "relu":
        return tl.where(_is_negative(z, RULE), 0.0, grad)
    else:
        return tl.where(_is_negative(z, RULE), grad * slope, grad)


@triton.jit
def _tile(
    row, columns, vectors, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, WIDE: tl.constexpr
):
    """This program's tile: its first row's vector, each vector's place behind that, its column, and two masks."""
    program = tl.program_id(0)
    column = program % columns
    top = (program // columns) * (DEPTH * DOWN)
    g = column * ACROSS + tl.arange(0, ACROSS)[None, None, :, None]
    r = tl.arange(0, DEPTH)[:, None, None, None] * DOWN + tl.arange(0, DOWN)[None, :, None, None]
    if WIDE:
        g = g.to(tl.int64)
        r = r.to(tl.int64)
    start = top.to(tl.int64) * row
    limit = tl.minimum(vectors - start, 0x7FFFFFFF if not WIDE else vectors)
    behind = r * row + g
    in_row = g < row
    return start, behind, g, in_row, in_row & (behind < (limit if WIDE else limit.to(tl.int32)))


@triton.jit(do_not_specialize=["lower", "upper"])
def forward(
    input, out, bias, weight, seed, lower: "i64", upper: "i64", channels, inner, row, columns, vectors, tail,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
    V: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out = rectify(input + bias), element by element; BIAS and WEIGHT are the lookups of the two parameters, or ""."""
    j = tl.arange(0, V)[None, None, None, :]
    start, behind, g, in_row, mask = _tile(row, columns, vectors, DEPTH, DOWN, ACROSS, WIDE)
    offset = behind * V + j
    x = tl.load(input + start * V + offset, mask=mask).to(COMPUTE)
    first = (g * V).to(tl.uint64 if WIDE else tl.uint32)
    if BIAS != "":
        x += _channel_values(bias, first, inner, channels, in_row, BIAS, V, COMPUTE)
    slope = 0.0
    if WEIGHT != "":
        slope = _channel_values(weight, first, inner, channels, in_row, WEIGHT, V, COMPUTE)
    slope = _slope(slope, start + behind, seed, lower, upper, RULE, V, COMPUTE)
    tl.store(out + start * V + offset, _rectify(x, slope, RULE).to(out.dtype.element_ty), mask=mask)
    if TAIL:
        if tl.program_id(0) == 0:
            vector = vectors.to(tl.int64) + tl.zeros((1, 1, 1, 1), tl.int64)
            position = vector * V + j
            x = tl.load(input + position, mask=j < tail).to(COMPUTE)
            z, slope = _tail_parameters(
                x, vector, bias, weight, seed, lower, upper, channels, inner, tail, RULE, BIAS, WEIGHT, V, COMPUTE
            )
            tl.store(out + position, _rectify(z, slope, RULE).to(out.dtype.element_ty), mask=j < tail)


@triton.jit
def _tail_parameters(
    x, vector, bias, weight, seed, lower, upper, channels, inner, tail,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """z and slope of the last elements, which fill no vector: each looks its own channel up."""
    first = (vector * V).to(tl.uint64)
    ragged = tl.arange(0, V)[None, None, None, :] < tail
    if BIAS != "":
        x += _channel_values(bias, first, inner, channels, ragged, "one" if BIAS == "one" else "element", V, COMPUTE)
    slope = 0.0
    if WEIGHT != "":
        lookup: tl.constexpr = "one" if WEIGHT == "one" else "element"
        slope = _channel_values(weight, first, inner, channels, ragged, lookup, V, COMPUTE)
    return x, _slope(slope, vector, seed, lower, upper, RULE, V, COMPUTE)


@triton.jit
def _store_sums(partial, values, g, row, inner, columns, entries, V: tl.constexpr, ACROSS: tl.constexpr,
                SEGMENT: tl.constexpr):  # fmt: skip
    """One tile's sums: each column's, or each segment's of the channel it starts in and of the next one."""
    sums = tl.sum(tl.sum(values, axis=0), axis=0)  # (ACROSS, V): first a thread's own rows, then the threads below
    to = partial + (tl.program_id(0) // columns).to(tl.int64) * entries
    column = tl.arange(0, ACROSS)
    vector = tl.reshape(g, ACROSS)
    if SEGMENT == 0:
        j = tl.arange(0, V)[None, :]
        tl.store(to + vector[:, None] * V + j, sums, mask=(vector < row)[:, None] & (j >= 0))
    else:
        begin = (vector - column % SEGMENT) * V
        boundary = (begin // inner + 1) * inner
        element = vector[:, None] * V + tl.arange(0, V)[None, :]
        belongs = element < boundary[:, None]
        count: tl.constexpr = ACROSS // SEGMENT
        head = tl.sum(tl.reshape(tl.sum(tl.where(belongs, sums, 0.0), axis=1), count, SEGMENT), axis=1)
        rest = tl.sum(tl.reshape(tl.sum(tl.where(belongs, 0.0, sums), axis=1), count, SEGMENT), axis=1)
        at = 2 * (tl.program_id(0) % columns * count + tl.arange(0, count))
        tl.store(to + at, head)
        tl.store(to + at + 1, rest)


@triton.jit(do_not_specialize=["lower", "upper"])
def backward(
    grad, saved, grad_input, bias, weight, seed, partial_bias, partial_weight, tails, lower: "i64", upper: "i64",
    channels, inner, row, columns, vectors, tail, entries,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_WEIGHT: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr,
    V: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """grad_input, and in the same pass the partial sums of grad_bias and grad_weight, each written by one program.

    ``saved`` is the output (BIAS == "") or the convolution's, to which the bias is added again.
    """
    j = tl.arange(0, V)[None, None, None, :]
    start, behind, g, in_row, mask = _tile(row, columns, vectors, DEPTH, DOWN, ACROSS, WIDE)
    offset = behind * V + j
    dy = tl.load(grad + start * V + offset, mask=mask, other=0).to(COMPUTE)
    z = tl.load(saved + start * V + offset, mask=mask, other=1).to(COMPUTE)
    first = (g * V).to(tl.uint64 if WIDE else tl.uint32)
    if BIAS != "":
        z += _channel_values(bias, first, inner, channels, in_row, BIAS, V, COMPUTE)
        # Lanes without an element count as positive, so that no slope (inf among them) reaches the sums.
        z = tl.where(mask, z, 1.0)
    slope = 0.0
    if WEIGHT != "":
        slope = _channel_values(weight, first, inner, channels, in_row, WEIGHT, V, COMPUTE)
    slope = _slope(slope, start + behind, seed, lower, upper, RULE, V, COMPUTE)
    dx = _derivative(dy, z, slope, RULE)
    tl.store(grad_input + start * V + offset, dx.to(grad_input.dtype.element_ty), mask=mask)
    if SUM_BIAS:
        _store_sums(partial_bias, dx, g, row, inner, columns, entries, V, ACROSS, SEGMENT)
    if SUM_WEIGHT:
        dw = tl.where(_is_negative(z, RULE), dy * z, 0.0)
        _store_sums(partial_weight, dw, g, row, inner, columns, entries, V, ACROSS, SEGMENT)
    if TAIL:
        if tl.program_id(0) == 0:
            vector = vectors.to(tl.int64) + tl.zeros((1, 1, 1, 1), tl.int64)
            position = vector * V + j
            dy = tl.load(grad + position, mask=j < tail, other=0).to(COMPUTE)
            z = tl.load(saved + position, mask=j < tail, other=0).to(COMPUTE)
            z, slope = _tail_parameters(
                z, vector, bias, weight, seed, lower, upper, channels, inner, tail, RULE, BIAS, WEIGHT, V, COMPUTE
            )
            z = tl.where(j < tail, z, 1.0)
            dx = _derivative(dy, z, slope, RULE)
            tl.store(grad_input + position, dx.to(grad_input.dtype.element_ty), mask=j < tail)
            if SUM_BIAS:
                tl.store(tails + j + tl.zeros((1, 1, 1, V), tl.int32), dx)
            if SUM_WEIGHT:
                dw = tl.where(_is_negative(z, RULE), dy * z, 0.0)
                tl.store(tails + V + j + tl.zeros((1, 1, 1, V), tl.int32), dw)
