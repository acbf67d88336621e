"""The finishing sum: each channel's partial sums, added in a fixed order by one program. No atomics."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tail_at"])
def finish(
    partials, first, second, channels, inner, copies, chunks, entries, stride, touched, tail, tail_at,
    UNIT: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, V: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, INDEX_64: tl.constexpr, SUMS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """first[c], and second[c] of the other sum: channel c over chunks, copies of the period in a row, and its segments.

    ``partials``: the sums ``stride`` apart, the tail's elements last in each.
    UNIT: elements a segment, STEP: partials a segment (2: its first channel's and the next one's; 1: columns).
    ``touched`` bounds how many segments one channel touches in one copy, that shared with its predecessor included.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    which = tl.program_id(1).to(tl.int64)
    partials += which * stride
    if INDEX_64:
        c = c.to(tl.int64)
    acc = tl.zeros((SLOTS, BLOCK), COMPUTE)
    for begin in range(0, chunks * copies * touched, SLOTS):
        t = (begin + tl.arange(0, SLOTS)[:, None]).to(tl.uint32)
        rest = t // tl.cast(touched, tl.uint32)
        k = (t - rest * touched).to(tl.int32)
        chunk = (rest // tl.cast(copies, tl.uint32)).to(tl.int32)
        copy = rest.to(tl.int32) - chunk * copies
        head = (copy * channels + c) * inner  # this channel's first column in this copy
        segment = head // UNIT + k
        # The first one may start in the channel before, whose sum stands first in it.
        later = (segment * UNIT < head).to(tl.int32)
        mask = (chunk < chunks) & (c < channels) & (segment * UNIT < head + inner)
        at = chunk.to(tl.int64) * entries + segment * STEP + later
        acc += tl.load(partials + at, mask=mask, other=0)
    total = tl.sum(acc, axis=0)
    c = tl.reshape(c, BLOCK)
    if TAIL:
        j = tl.arange(0, V)[:, None]
        mine = ((tail_at + j) // inner % channels == c[None, :]) & (j < tail)
        total += tl.sum(tl.load(partials + (stride - V) + j, mask=mine, other=0), axis=0)
    tl.store(first + c, total.to(first.dtype.element_ty), mask=c < tl.where(which == 0, channels, 0))
    if SUMS == 2:
        tl.store(second + c, total.to(second.dtype.element_ty), mask=c < tl.where(which == 1, channels, 0))
