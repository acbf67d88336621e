"""The random words: Philox4x32 as published, the same bits from kernels, reference and plain integers."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fused_rect import reference
from fused_rect.kernels import philox

# Random123's known-answer vectors (kat_vectors): rounds, counter, key, words.
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
ZEROS = ((0,) * 4, (0,) * 2)
KNOWN = [
    (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def plain(counter, key, rounds=7):
    """Philox4x32 in Python integers, written from Salmon et al. 2011, section 3.3 and table 2."""
    counter, key = list(counter), list(key)
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return tuple(counter)


def plain_words(seed, start, count):
    words = []
    for i in range(start, start + count):
        c, key = i // 4, seed % 2**64
        word = plain((c % 2**32, c // 2**32, 0, 0), (key % 2**32, key // 2**32))[i % 4]
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


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
def kernel_words(out, seed, start: "i64", VECTORS: tl.constexpr, V: tl.constexpr, FAR: tl.constexpr):  # noqa: F821
    at = tl.arange(0, VECTORS)[:, None]
    vector = (tl.cast(start, tl.int64) + at).to(tl.uint64 if FAR else tl.uint32)
    words = tl.reshape(philox.words(vector, tl.load(seed), V), VECTORS, V)
    tl.store(out + at * V + tl.arange(0, V)[None, :], words)


@pytest.mark.parametrize(("rounds", "given_", "words"), KNOWN)
def test_plain_philox_gives_the_published_answers(rounds, given_, words):
    assert plain(*given_, rounds) == words


@pytest.mark.ptx
@pytest.mark.parametrize(("rounds", "given_", "words"), KNOWN)
def test_kernel_gives_the_published_answers(rounds, given_, words):
    counter, key = (torch.tensor(given, dtype=torch.uint32) for given in given_)
    out = torch.zeros(4, dtype=torch.uint32)
    known_answer[(1,)](counter, key, out, ROUNDS=rounds)
    assert tuple(out.tolist()) == words


def test_seven_rounds_everywhere():
    assert philox.ROUNDS.value == reference.ROUNDS == 7


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(1, 40))
def test_reference_words_are_the_rule(seed, start, count):
    assert reference.words(seed, start, count).tolist() == plain_words(seed, start, count)


# Where the second counter word begins (2^32 counters are 2^34 elements), and both sides of each sign.
@pytest.mark.ptx
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, 2**32, -(2**32)])
@pytest.mark.parametrize("V", [4, 8])
@pytest.mark.parametrize("start", [0, 7, 2**31 - 8, 2**32 - 16, 2**34 - 32, 2**34, 2**40 + 16])
def test_kernel_words_are_the_rule(seed, V, start):
    out = torch.zeros(16 * V, dtype=torch.int32)
    far = start + 16 * V > 2**34
    kernel_words[(1,)](out, torch.tensor([seed]), start // V, VECTORS=16, V=V, FAR=far)
    assert out.tolist() == plain_words(seed, start // V * V, 16 * V)
    assert out.tolist() == reference.words(seed, start // V * V, 16 * V).tolist()
