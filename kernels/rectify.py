"""The forward and the backward kernel of all four rectifiers; the slope rule is the only thing that varies.

RULE is "relu", "leaky_relu", "prelu", "rrelu" or "rrelu_divisor", known when compiling. `plan.py` says what a tile is.
Arithmetic is float32 (float64 for float64) and rounds once. Launch with enable_fp_fusion=False: contracted sums would
no longer equal eager's bit for bit.

All loads of a thread come before the slopes are made, and a barrier behind them (`tl.debug_barrier`: one instruction;
no thread waits for data) keeps ptxas from moving them behind the arithmetic of the first. Without it PReLU's backward
had 80 of its 256 bytes a thread under way on B200, the divisor law's forward 16 of 128.
"""

import triton
import triton.language as tl

from .philox import words
from .traffic import launch_metadata


@triton.jit
def _plane(origin, inner):
    """Of the channel's plane that the place ``origin`` of a row is in: (its index, the place where it ends)."""
    inner = tl.cast(inner, origin.dtype)
    plane = origin // inner
    return plane, (plane + 1) * inner


@triton.jit
def _channel_values(
    pointer, first, origin, inner, channels, mask, LOOKUP: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """The parameter of each element: ``first`` (1, 1, G, 1) is the place in the row of each vector's first element.

    In a tile of at most two channels, ``origin`` is its first place, and ``first`` may be places of elements as well.
    """
    if LOOKUP == "one":
        value = tl.load(pointer).to(COMPUTE)
    elif LOOKUP == "tile" or LOOKUP == "seam":
        plane, end = _plane(origin, inner)
        channel = plane % tl.cast(channels, origin.dtype)
        following = tl.where(channel + 1 == tl.cast(channels, origin.dtype), 0, channel + 1)
        value = tl.where(first < end, tl.load(pointer + channel).to(COMPUTE), tl.load(pointer + following).to(COMPUTE))
    else:
        inner = tl.cast(inner, first.dtype)
        channels = tl.cast(channels, first.dtype)
        j = tl.arange(0, V)[None, None, None, :]
        if LOOKUP == "element":
            channel = (first + j.to(first.dtype)) // inner % channels
            value = tl.load(pointer + channel, mask=mask & (j >= 0), other=0).to(COMPUTE)
        else:
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
            # A division that rounds correctly calls a subroutine, the fast one takes 7 instructions to cover all of
            # float32. The root's square takes 2, and a Newton step brings it within 1 ulp.
            root = tl.rsqrt(value)
            inverse = root * root
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
        # One `max` instruction. It makes +0.0 of -0.0, which CPU torch keeps, as z < 0 would for two instructions more.
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
def _tile(row, columns, vectors, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, WIDE: tl.constexpr):
    """This program's tile: its rows' number, their first vector, the vectors left from there; its rows; its corner."""
    column, chunk = tl.program_id(0), 0
    if DEPTH > 1:  # else there is one row only
        chunk = column // columns
        column -= chunk * columns
    r = tl.arange(0, DEPTH)[:, None, None, None] * DOWN + tl.arange(0, DOWN)[None, :, None, None]
    if WIDE:
        column = column.to(tl.int64)
        r = r.to(tl.int64)
    start = tl.cast(chunk * (DEPTH * DOWN), tl.int64) * row
    left = tl.minimum(vectors - start, 0x7FFFFFFF if not WIDE else vectors)
    return chunk, start, left if WIDE else left.to(tl.int32), r, column * ACROSS


@triton.jit
def _vectors(r, corner, row, left, ACROSS: tl.constexpr):
    """A tile's vectors: their columns, their places behind its start, whether in the row, whether in the tensor too."""
    g = corner + tl.arange(0, ACROSS)[None, None, :, None]
    behind = r * row + g
    in_row = g < row
    return g, behind, in_row, in_row & (behind < left)


@triton.jit
def _seam(corner, inner, V: tl.constexpr, WIDE: tl.constexpr):
    """The first vector behind the tile's corner that holds elements of two channels; -1 if they change between two."""
    _, end = _plane(_unsigned(corner * V, WIDE), inner)
    return tl.where(end % V == 0, -1, (end // V).to(corner.dtype))


@triton.jit
def _unsigned(position, WIDE: tl.constexpr):
    """Unsigned: the division by a runtime value is cheaper."""
    return position.to(tl.uint64 if WIDE else tl.uint32)


@triton.jit
def _counted(vector, FAR: tl.constexpr):
    """Vector indices as Philox counts them: in 64 bits only where the tensor is FAR, past 2^34 elements."""
    return vector.to(tl.uint64 if FAR else tl.uint32)


@triton.jit
def _tail(vectors, tail, tail_at, V: tl.constexpr, WIDE: tl.constexpr):
    """The last elements, which fill no vector: (their vector, its first element's place in the row, mask)."""
    vector = tl.zeros((1, 1, 1, 1), tl.int64) + vectors  # Triton makes a constant of a count of 1: no vectors.to()
    first = tail_at + tl.zeros((1, 1, 1, 1), tl.int64 if WIDE else tl.int32)
    return vector, _unsigned(first, WIDE), tl.arange(0, V)[None, None, None, :] < tail


@triton.constexpr_function
def _each(lookup):
    """The lookup of the tail: its elements may belong to any channels."""
    return lookup if lookup in ("", "one") else "element"


@triton.constexpr_function
def _looked_up_first(rule, bias, weight):
    """Whether the parameters come before the inputs. If not, nothing can use an input before they are there.

    But a column's eight or sixteen look-ups take many registers: behind the loads they made ptxas spill. And so did
    any where little else happens.
    """
    return rule in ("relu", "leaky_relu") or "element" in (bias, weight)


@triton.jit
def _parameters(
    bias, weight, channels, inner, first, origin, mask,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(bias, weight) of each element; BIAS and WEIGHT are the lookups of the two parameters, or "" for none."""
    shift = 0.0
    if BIAS != "":
        shift = _channel_values(bias, first, origin, inner, channels, mask, BIAS, V, COMPUTE)
    learned = 0.0
    if WEIGHT != "":
        learned = _channel_values(weight, first, origin, inner, channels, mask, WEIGHT, V, COMPUTE)
    return shift, learned


@triton.jit
def _forward(
    x, out, shift, slope, offset, mask, RULE: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    z = x.to(COMPUTE)
    if BIAS != "":
        z += shift
    tl.store(out + offset, _rectify(z, slope, RULE).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _forward_few(
    input, out, bias, weight, seed, lower, upper, channels, inner, vector, first, origin, offset, mask,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The elements that the tiles leave out: behind the last whole vector, or in a vector of two channels."""
    shift, learned = _parameters(bias, weight, channels, inner, first, origin, mask, BIAS, WEIGHT, V, COMPUTE)
    slope = _slope(learned, vector, seed, lower, upper, RULE, V, COMPUTE)
    _forward(tl.load(input + offset, mask=mask), out, shift, slope, offset, mask, RULE, BIAS, COMPUTE)


@triton.jit(do_not_specialize=["lower", "upper", "tail_at"], launch_metadata=launch_metadata)
def forward(
    input, out, bias, weight, seed, lower: "i64", upper: "i64", channels, inner, row, columns, vectors, tail, tail_at,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
    FAR: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """out = rectify(input + bias); BIAS and WEIGHT are the lookups of the two parameters, or ""."""
    j = tl.arange(0, V)[None, None, None, :]
    _, start, left, r, corner = _tile(row, columns, vectors, DEPTH, DOWN, ACROSS, WIDE)
    g, behind, in_row, mask = _vectors(r, corner, row, left, ACROSS)
    at, origin = start * V, _unsigned(corner * V, WIDE)
    if BIAS == "seam" or WEIGHT == "seam":
        seam = _seam(corner, inner, V, WIDE)
        mask &= g != seam
    FIRST: tl.constexpr = _looked_up_first(RULE, BIAS, WEIGHT)
    if FIRST:
        shift, learned = _parameters(
            bias, weight, channels, inner, _unsigned(g * V, WIDE), origin, in_row, BIAS, WEIGHT, V, COMPUTE
        )  # fmt: skip
    x = tl.load(input + at + (behind * V + j), mask=mask)
    tl.debug_barrier()
    if not FIRST:
        shift, learned = _parameters(
            bias, weight, channels, inner, _unsigned(g * V, WIDE), origin, in_row, BIAS, WEIGHT, V, COMPUTE
        )  # fmt: skip
    slope = _slope(learned, _counted(start + behind, FAR), seed, lower, upper, RULE, V, COMPUTE)
    _forward(x, out + at, shift, slope, behind * V + j, mask, RULE, BIAS, COMPUTE)
    if BIAS == "seam" or WEIGHT == "seam":
        if (seam >= 0) & (seam < tl.minimum(corner + ACROSS, row)):
            within = r * row + seam
            _forward_few(
                input + at, out + at, bias, weight, seed, lower, upper, channels, inner, _counted(start + within, FAR),
                _unsigned(seam * V + j, WIDE), origin, within * V + j, (within < left) & (j >= 0),
                RULE, BIAS, WEIGHT, V, COMPUTE,
            )  # fmt: skip
    if TAIL:
        if tl.program_id(0) == 0:
            last, first, ragged = _tail(vectors, tail, tail_at, V, WIDE)
            _forward_few(
                input, out, bias, weight, seed, lower, upper, channels, inner, _counted(last, FAR), first, origin,
                last * V + j, ragged, RULE, _each(BIAS), _each(WEIGHT), V, COMPUTE,
            )  # fmt: skip


@triton.jit
def _store_sums(
    partials, values, seams, seam, g, chunk, corner, row, inner, entries, stride,
    LOOKUP: tl.constexpr, V: tl.constexpr, ACROSS: tl.constexpr, SEGMENT: tl.constexpr, SUMS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile's sums: each column's, or each segment's of the channel it starts in and of the next one.

    ``values`` (DEPTH, DOWN, ACROSS, V) holds the summands of grad_bias or grad_weight, or (..., V, 2) those of both;
    ``seams`` the two sums of the vector ``seam``, which holds elements of both channels.
    """
    values = tl.sum(tl.sum(values, axis=0), axis=0)  # first a thread's own rows, then the threads below
    to = partials + tl.cast(chunk, tl.int64) * entries
    vector = tl.reshape(g, ACROSS)
    if SEGMENT == 0:
        element = vector[:, None] * V + tl.arange(0, V)[None, :]
        at = _by_sum(element, stride, 2, SUMS)
        tl.store(to + at, values, mask=_by_sum(element < row * V, None, 2, SUMS))
    else:
        begin = (vector - tl.arange(0, ACROSS) % SEGMENT) * V
        if LOOKUP == "tile" or LOOKUP == "seam":
            _, end = _plane(_unsigned(corner * V, WIDE), inner)
            boundary = tl.where(begin < end.to(begin.dtype), end.to(begin.dtype), (begin + SEGMENT * V))
        else:
            boundary = (begin // inner + 1) * inner
        if LOOKUP == "split":
            belongs = _by_sum(tl.arange(0, V)[None, :] < (boundary - vector * V)[:, None], None, 2, SUMS)
            head = tl.sum(tl.where(belongs, values, 0.0), axis=1)
            rest = tl.sum(tl.where(belongs, 0.0, values), axis=1)
        else:
            values = tl.sum(values, axis=1)
            belongs = _by_sum(vector * V < boundary, None, 1, SUMS)
            head = tl.where(belongs, values, 0.0)
            rest = tl.where(belongs, 0.0, values)
        count: tl.constexpr = ACROSS // SEGMENT
        both = tl.join(head, rest)
        both = tl.reshape(both, count, SEGMENT, 2, 2) if SUMS == 2 else tl.reshape(both, count, SEGMENT, 2)
        segment = corner // SEGMENT + tl.arange(0, count)
        at = segment[:, None] * 2 + tl.arange(0, 2)[None, :]
        both = tl.sum(both, axis=1)
        if LOOKUP == "seam":
            mine = segment[:, None] == seam // SEGMENT
            both += tl.where(tl.expand_dims(mine, 2) if SUMS == 2 else mine, seams, 0.0)
        tl.store(to + _by_sum(at, stride, 1, SUMS), both)


@triton.jit
def _sum_seam(values, seam, corner, inner, V: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr):
    """Sums of the seam's vector, of the channel before it and the one behind it: (1, 2), or (1, 2, 2) of two sums."""
    values = tl.sum(tl.sum(values, axis=0), axis=0)
    _, end = _plane(_unsigned(corner * V, WIDE), inner)
    before = _by_sum(_unsigned(seam * V + tl.arange(0, V)[None, :], WIDE) < end, None, 2, SUMS)
    return tl.join(tl.sum(tl.where(before, values, 0.0), axis=1), tl.sum(tl.where(before, 0.0, values), axis=1))


@triton.jit
def _by_sum(at, stride, AXIS: tl.constexpr, SUMS: tl.constexpr):
    """Where two sums are kept, they lie along their own axis and ``stride`` apart."""
    if SUMS == 2:
        at = tl.expand_dims(at, AXIS)
        if stride is not None:
            lane = tl.arange(0, 2)
            lane = lane[None, None, :] if AXIS == 2 else lane[None, :, None]
            at += lane * stride
    return at


@triton.jit
def _load_both(grad, saved, offset, mask):
    """Lanes without an element: no gradient, and infinite, so that any finite bias leaves them on the positive side,
    where no slope (inf among them) reaches the sums."""
    return tl.load(grad + offset, mask=mask, other=0), tl.load(saved + offset, mask=mask, other=float("inf"))


@triton.jit
def _backward(
    grad, saved, grad_input, shift, slope, offset, mask, RULE: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr
):
    """Stores grad_input; returns what grad_bias and grad_weight sum, 0 where ``mask`` is off."""
    dy = grad.to(COMPUTE)
    z = saved.to(COMPUTE)
    if BIAS != "":
        z += shift
    dx = _derivative(dy, z, slope, RULE)
    tl.store(grad_input + offset, dx.to(grad_input.dtype.element_ty), mask=mask)
    return dx, tl.where(_is_negative(z, RULE), dy * z, 0.0)


@triton.jit
def _summands(dx, dw, SUM_BIAS: tl.constexpr, SUM_WEIGHT: tl.constexpr):
    if SUM_BIAS and SUM_WEIGHT:
        values = tl.join(dx, dw)
    elif SUM_BIAS:
        values = dx
    else:
        values = dw
    return values


@triton.jit
def _backward_few(
    grad, saved, grad_input, bias, weight, seed, lower, upper, channels, inner, vector, first, origin, offset, mask,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The elements that the tiles leave out: behind the last whole vector, or in a vector of two channels."""
    shift, learned = _parameters(bias, weight, channels, inner, first, origin, mask, BIAS, WEIGHT, V, COMPUTE)
    slope = _slope(learned, vector, seed, lower, upper, RULE, V, COMPUTE)
    dy, x = _load_both(grad, saved, offset, mask)
    return _backward(dy, x, grad_input, shift, slope, offset, mask, RULE, BIAS, COMPUTE)


@triton.jit(do_not_specialize=["lower", "upper", "tail_at"], launch_metadata=launch_metadata)
def backward(
    grad, saved, grad_input, bias, weight, seed, partials, tails, lower: "i64", upper: "i64",
    channels, inner, row, columns, vectors, tail, tail_at, entries, stride,
    RULE: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_WEIGHT: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr, LOOKUP: tl.constexpr, SEGMENT: tl.constexpr,
    V: tl.constexpr, DEPTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = SUM_BIAS + SUM_WEIGHT
    """grad_input, and in the same pass the partial sums of grad_bias and grad_weight, each written by one program.

    ``saved`` is the output (BIAS == "") or the convolution's, to which the bias is added again.
    """
    j = tl.arange(0, V)[None, None, None, :]
    chunk, start, left, r, corner = _tile(row, columns, vectors, DEPTH, DOWN, ACROSS, WIDE)
    g, behind, in_row, mask = _vectors(r, corner, row, left, ACROSS)
    at, origin = start * V, _unsigned(corner * V, WIDE)
    seam = -1
    if LOOKUP == "seam":
        seam = _seam(corner, inner, V, WIDE)
        mask &= g != seam
    FIRST: tl.constexpr = _looked_up_first(RULE, BIAS, WEIGHT)
    if FIRST:
        shift, learned = _parameters(
            bias, weight, channels, inner, _unsigned(g * V, WIDE), origin, in_row, BIAS, WEIGHT, V, COMPUTE
        )  # fmt: skip
    dy, x = _load_both(grad + at, saved + at, behind * V + j, mask)
    tl.debug_barrier()
    if not FIRST:
        shift, learned = _parameters(
            bias, weight, channels, inner, _unsigned(g * V, WIDE), origin, in_row, BIAS, WEIGHT, V, COMPUTE
        )  # fmt: skip
    slope = _slope(learned, _counted(start + behind, FAR), seed, lower, upper, RULE, V, COMPUTE)
    dx, dw = _backward(dy, x, grad_input + at, shift, slope, behind * V + j, mask, RULE, BIAS, COMPUTE)
    seams = tl.zeros((1, 2, 2) if SUMS == 2 else (1, 2), COMPUTE)
    if LOOKUP == "seam":
        if (seam >= 0) & (seam < tl.minimum(corner + ACROSS, row)):
            within = r * row + seam
            seam_dx, seam_dw = _backward_few(
                grad + at, saved + at, grad_input + at, bias, weight, seed, lower, upper, channels, inner,
                _counted(start + within, FAR), _unsigned(seam * V + j, WIDE), origin, within * V + j,
                (within < left) & (j >= 0), RULE, BIAS, WEIGHT, V, COMPUTE,
            )  # fmt: skip
            if SUMS > 0:
                values = _summands(seam_dx, seam_dw, SUM_BIAS, SUM_WEIGHT)
                seams = _sum_seam(values, seam, corner, inner, V, SUMS, WIDE)
    if SUMS > 0:
        _store_sums(
            partials, _summands(dx, dw, SUM_BIAS, SUM_WEIGHT), seams, seam, g, chunk, corner, row, inner, entries,
            stride, LOOKUP, V, ACROSS, SEGMENT, SUMS, WIDE,
        )  # fmt: skip
    if TAIL:
        if tl.program_id(0) == 0:
            last, first, ragged = _tail(vectors, tail, tail_at, V, WIDE)
            last_dx, last_dw = _backward_few(
                grad, saved, grad_input, bias, weight, seed, lower, upper, channels, inner, _counted(last, FAR), first,
                origin, last * V + j, ragged, RULE, _each(BIAS), _each(WEIGHT), V, COMPUTE,
            )  # fmt: skip
            if SUMS > 0:
                values = tl.reshape(_summands(last_dx, last_dw, SUM_BIAS, SUM_WEIGHT), V * SUMS)
                tl.store(tails + tl.arange(0, V * SUMS), values)
