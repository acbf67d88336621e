"""The finishing sum: each channel's partial sums, added in a fixed order by one program. No atomics."""

import triton
import triton.language as tl


@triton.jit
def finish(
    partials, tails, first, second, channels, inner, copies, chunks, entries, stride, touched, tail, tail_at,
    UNIT: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, SUMS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out[c] = the sum of channel c over chunks, copies of the period in a row, and its segments.

    UNIT: elements a segment, STEP: partials a segment (2: its first channel's and the next one's; 1: columns).
    ``touched`` bounds how many segments one channel touches in one copy, that shared with its predecessor included.
    """
    c = tl.program_id(0)
    which = tl.program_id(1).to(tl.int64)
    partials += which * stride
    if WIDE:
        c = c.to(tl.int64)
    per_copy = tl.cast(touched, tl.uint32)
    per_chunk = tl.cast(copies, tl.uint32)
    acc = tl.zeros((BLOCK,), COMPUTE)
    for begin in range(0, chunks * copies * touched, BLOCK):
        t = (begin + tl.arange(0, BLOCK)).to(tl.uint32)
        k = (t % per_copy).to(tl.int32)
        copy = (t // per_copy % per_chunk).to(tl.int32)
        chunk = (t // per_copy // per_chunk).to(tl.int32)
        head = (copy * channels + c) * inner  # this channel's first column in this copy
        shared = head // UNIT  # the segment that holds it
        segment = shared + k
        # The shared segment starts in the channel before, whose sum stands first, unless it starts right at the head.
        later = (segment * UNIT < head).to(tl.int32)
        mask = (chunk < chunks) & (segment * UNIT < head + inner)
        at = chunk.to(tl.int64) * entries + segment * STEP + later
        acc += tl.load(partials + at, mask=mask, other=0)
    total = tl.sum(acc, axis=0)
    if TAIL:
        j = tl.arange(0, V)
        mine = ((tail_at + j) // inner % channels == c) & (j < tail)
        total += tl.sum(tl.load(tails + j * SUMS + which, mask=mine, other=0), axis=0)
    if SUMS == 2:
        if which == 1:
            tl.store(second + c, total.to(second.dtype.element_ty))
        else:
            tl.store(first + c, total.to(first.dtype.element_ty))
    else:
        tl.store(first + c, total.to(first.dtype.element_ty))
