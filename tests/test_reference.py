"""The specification against sources that are not ours: Philox's known answers, exact rational arithmetic, torch."""

from fractions import Fraction

import numpy as np
import published_philox
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fused_rect import reference
from fused_rect.rules import PRELU, RELU, RULES, Parameters, Rule, leaky_relu

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x243F6A8885A308D3)


@pytest.mark.parametrize(("rounds", "given_", "words"), published_philox.KNOWN)
def test_plain_philox_gives_the_published_answers(rounds, given_, words):
    assert published_philox.philox(*given_, rounds) == words


@given(counter=st.integers(0, 2**63 - 1), seed=st.integers(-(2**63), 2**63 - 1))
def test_philox_for_any_counter_and_seed(counter, seed):
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    expected = published_philox.philox((counter & 0xFFFFFFFF, counter >> 32, 0, 0), key)
    assert tuple(int(w) for w in reference.philox(torch.tensor([counter]), seed)) == expected


@given(start=st.integers(0, 2**40), count=st.integers(1, 9), seed=st.sampled_from(SEEDS))
def test_word_of_a_position(start, count, seed):
    assert reference.words(seed, start, count).tolist() == published_philox.words(seed, start, count)


def test_words_do_not_depend_on_the_chunks_they_are_made_in(monkeypatch):
    whole = reference.words(5, 3, 1000)
    monkeypatch.setattr(reference, "CHUNK", 7)
    assert torch.equal(reference.words(5, 3, 1000), whole)


def to_float(value, dtype):
    """A fraction rounded once, to nearest even."""
    double = value.numerator / value.denominator  # Python divides integers with one rounding
    if dtype is np.float64:
        return double
    near = np.float32(double)
    candidates = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    nearest = min(abs(Fraction(float(c)) - value) for c in candidates)
    ties = [c for c in candidates if abs(Fraction(float(c)) - value) == nearest]
    return min(ties, key=lambda c: int(np.float32(c).view(np.uint32)) & 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(bounds=st.tuples(st.floats(-4, 4), st.floats(-4, 4)).map(sorted), seed=st.sampled_from(SEEDS))
def test_slope_is_one_fma_of_the_word(dtype, bounds, seed):
    """fma(w, (upper - lower) * 2^-32, (upper + lower) / 2) in exact fractions, rounded once."""
    lower, upper = bounds
    kind = np.float64 if dtype is torch.float64 else np.float32
    scale, middle = Fraction(float(kind((upper - lower) * 2.0**-32))), Fraction(float(kind((upper + lower) / 2)))
    got = reference.flat_slopes(seed, 8, Rule("rrelu", lower, upper), dtype).tolist()
    for word, slope in zip(reference.words(seed, 0, 8).tolist(), got):
        word = Fraction(float(kind(word)))
        exact = to_float(word * scale + middle, kind)
        # float64 has no wider type to hold the exact sum: within one rounding of it.
        tolerance = 0 if kind is np.float32 else 2 * np.spacing(max(abs(lower), abs(upper), abs(float(exact))))
        assert abs(slope - exact) <= tolerance, (word, slope, exact)


def test_divisor_law_is_the_inverse_of_what_the_slope_law_draws():
    drawn = reference.flat_slopes(3, 100, Rule("rrelu", 3, 8), torch.float32)
    assert torch.equal(reference.flat_slopes(3, 100, Rule("rrelu_divisor", 3, 8), torch.float32), 1 / drawn)


def test_narrow_dtypes_use_the_float32_slopes():
    expected = reference.flat_slopes(3, 9, Rule("rrelu", 0, 1), torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(reference.flat_slopes(3, 9, Rule("rrelu", 0, 1), dtype), expected)


def test_slopes_follow_the_position_in_memory_not_the_index():
    like = torch.empty(2, 3, 4, 5)
    seed = torch.tensor([11])
    last = reference.slopes(seed, like.to(memory_format=torch.channels_last), Rule("rrelu", 0.1, 0.3))
    assert last.is_contiguous(memory_format=torch.channels_last)
    flat = reference.flat_slopes(11, like.numel(), Rule("rrelu", 0.1, 0.3), torch.float32)
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), flat)
    assert torch.equal(reference.slopes(seed, like, Rule("rrelu", 0.1, 0.3)).flatten(), flat)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 3, 3, 3)])
def test_rectify_is_torchs_own_pair(shape):
    z, bias, weight = torch.randn(shape), torch.randn(3), torch.randn(3)
    total = z + bias.view(3, *[1] * (len(shape) - 2))
    assert torch.equal(reference.rectify(z, Parameters(bias), RELU), F.relu(total))
    assert torch.equal(reference.rectify(z, Parameters(bias), leaky_relu(0.2)), F.leaky_relu(total, 0.2))
    assert torch.equal(reference.rectify(z, Parameters(bias, weight), PRELU), F.prelu(total, weight))
    slope = torch.rand(shape)
    assert torch.equal(
        reference.rectify(z, Parameters(bias), Rule("rrelu", 0, 1), slope), torch.where(total > 0, total, total * slope)
    )


def test_bits_in_the_order_of_the_memory():
    negative = torch.tensor([True, False, False, False, False, False, False, True, False, True])
    assert reference.pack_bits(negative).tolist() == [0b10000001, 0b00000010]
    columns = torch.tensor([[True, False, False], [False, True, True]]).t().contiguous().t()
    assert columns.stride() == (1, 2) and reference.pack_bits(columns).tolist() == [0b101001]
    assert torch.equal(reference.unpack_bits(torch.tensor([0b101001], dtype=torch.uint8), columns), columns)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_come_back(sides):
    negative = torch.tensor(sides)
    bits = reference.pack_bits(negative)
    assert bits.numel() == (len(sides) + 7) // 8 and torch.equal(reference.unpack_bits(bits, negative), negative)
    assert sum(int(byte).bit_count() for byte in bits) == sum(sides)


def test_the_side_of_zeros_and_nan():
    z = torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0])
    for name in RULES:
        nan = name in ("leaky_relu", "prelu")  # torch tests z > 0 there, and z <= 0 elsewhere
        assert reference.is_negative(z, Rule.default(name)).tolist() == [True, True, nan, False, True]
