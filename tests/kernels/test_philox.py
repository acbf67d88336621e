"""The random words: Philox4x32 as published, the same bits from kernels, reference and plain integers."""

import published_philox
import pytest
import torch
import triton
import triton.language as tl

from fused_rect import reference
from fused_rect.kernels import philox


@triton.jit
def known_answer(counter, key, out, ROUNDS: tl.constexpr):
    r0, r1, r2, r3 = philox.philox(
        tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3), tl.load(key),
        tl.load(key + 1), ROUNDS,
    )  # fmt: skip
    tl.store(out, r0)
    tl.store(out + 1, r1)
    tl.store(out + 2, r2)
    tl.store(out + 3, r3)


@triton.jit
def kernel_words(
    out, seed, start: "i64",  # noqa: F821
    VECTORS: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, COUNTER_64: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, VECTORS)[None, :, None]
    vector = (tl.cast(start, tl.int64) + at).to(tl.uint64 if COUNTER_64 else tl.uint32)
    tl.store(out + at * V + tl.arange(0, V)[None, None, :], philox.words(vector, philox.key(seed), V, LANES))


@pytest.mark.ptx
@pytest.mark.parametrize(("rounds", "given_", "words"), published_philox.KNOWN)
def test_kernel_gives_the_published_answers(rounds, given_, words):
    counter, key = (torch.tensor(given, dtype=torch.uint32) for given in given_)
    out = torch.zeros(4, dtype=torch.uint32)
    known_answer[(1,)](counter, key, out, ROUNDS=rounds)
    assert tuple(out.tolist()) == words


def test_seven_rounds_everywhere():
    assert philox.ROUNDS.value == reference.ROUNDS == 7


# Where the second counter word begins (2^32 counters are 2^34 elements), and both sides of each sign.
@pytest.mark.ptx
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, 2**32, -(2**32)])
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 7, 2**31 - 8, 2**32 - 16, 2**34 - 32, 2**34, 2**40 + 16])
def test_kernel_words_are_the_rule(seed, lanes, start):
    out = torch.zeros(16 * 8, dtype=torch.int32)
    far = start + 16 * 8 > 2**34
    kernel_words[(1,)](out, torch.tensor([seed]), start // 8, VECTORS=16, V=8, LANES=lanes, COUNTER_64=far)
    assert out.tolist() == published_philox.words(seed, start // 8 * 8, 16 * 8)
    assert out.tolist() == reference.words(seed, start // 8 * 8, 16 * 8).tolist()
