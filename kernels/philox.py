"""Random slopes: the one rule slope(seed, position), as Triton device functions.

Position i of the dense tensor's memory reads word i % 4 of Philox4x32-7 (Salmon et al. 2011) at counter i // 4 under
the call's 64-bit seed. It depends on nothing else: no block size, grid, dtype or GPU model, so backward regenerates it.
Seven rounds pass BigCrush; ten, the cautious default elsewhere, would cost 6 more instructions an element.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def _product(word, FACTOR: tl.constexpr, IN_HALVES: tl.constexpr):
    """(low, high) word of the product, for which ptxas has one instruction (IMAD.WIDE) in either spelling."""
    if IN_HALVES:
        return word * FACTOR, tl.umulhi(word, tl.cast(FACTOR, tl.uint32))
    else:
        product = word.to(tl.uint64) * FACTOR
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)


@triton.jit
def _round(c0, c1, c2, c3, k0, k1, IN_HALVES: tl.constexpr):
    low_0, high_0 = _product(c0, 0xD2511F53, IN_HALVES)
    low_2, high_2 = _product(c2, 0xCD9E8D57, IN_HALVES)
    # The key last: combined with c1 or c3 first, it cost .8 instructions per element more (sm_100).
    return high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, rounds: tl.constexpr = ROUNDS):
    """Philox4x32 of four counter words under two key words, all uint32.

    In the first three rounds some words are a high word and the key alone. Of these LLVM makes the exclusive or, and
    the product behind it, 64 bits wide, and ptxas adds a zero to each such product: hence the halves. In later rounds
    ptxas for sm_90 leaves some pairs of halves two instructions: hence the whole product.
    """
    for r in tl.static_range(rounds):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, r < 3)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def key(seed):
    """The two words of the 64-bit seed at a pointer.

    Each is loaded by itself, and not halved from one number, for the reason that :func:`philox` has.
    """
    halves = seed.to(tl.pointer_type(tl.uint32), bitcast=True)
    return tl.load(halves), tl.load(halves + 1)


@triton.jit
def _four(counter, key):
    """The four words at each counter; what exceeds 32 bits of it is the second counter word."""
    low = counter.to(tl.uint32)
    zero = tl.zeros_like(low)
    high = zero
    if counter.dtype.primitive_bitwidth == 64:
        high = (counter >> 32).to(tl.uint32)
    return philox(low, high, zero, zero, key[0], key[1])


@triton.jit
def words(vector, key, V: tl.constexpr, LANES: tl.constexpr):
    """Words of the V elements of each vector: (D, A, 1) unsigned vector indices -> (D, A, V) int32.

    LANES threads share a vector. 32-bit indices serve tensors of at most 2^34 elements: their second counter word is 0,
    which the compiler carries through the first two rounds. Joining (r0, r2) with (r1, r3) puts word k of a counter at
    position k without leaving registers, and so does joining the words of two counters that one thread computes.
    """
    if LANES == 1:
        a0, a1, a2, a3 = _four(vector * 2, key)
        b0, b1, b2, b3 = _four(vector * 2 + 1, key)
        r0, r1, r2, r3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    else:
        r0, r1, r2, r3 = _four(vector * 2 + tl.arange(0, 2)[None, None, :].to(vector.dtype), key)
    drawn = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    return tl.reshape(drawn, vector.shape[0], vector.shape[1], V).to(tl.int32, bitcast=True)
