"""The slopes as random numbers, and the seed as something to repeat.

The statistics run on the specification, whose words every path repeats bit for bit (test_ops). Each test has a fixed
seed and a threshold that a right generator misses once in 10^5 draws; wrong lanes, streams or bounds miss by far.
"""

import numpy as np
import pytest
import torch
from scipy import stats

import fused_rect as fr
from fused_rect import reference

N = 1 << 18
RARE = 1e-5
LAWS = {"slope": (1 / 8, 1 / 3), "divisor": (3.0, 8.0)}


def uniform(seed=1, count=N, law="slope"):
    """Slopes mapped back to (0, 1)."""
    lower, upper = LAWS[law]
    slopes = fr.random.slopes(torch.tensor([seed]), (count,), law=law, dtype=torch.float64).numpy()
    drawn = slopes if law == "slope" else 1 / slopes
    return (drawn - lower) / (upper - lower)


def correlated(a, b):
    """Whether two samples are correlated beyond chance."""
    return stats.pearsonr(a, b).pvalue < RARE


@pytest.mark.parametrize("law", LAWS)
def test_bounds_mean_and_variance(law):
    lower, upper = LAWS[law]
    slopes = fr.random.slopes(torch.tensor([1]), (N,), law=law, dtype=torch.float64).numpy()
    low, high = (lower, upper) if law == "slope" else (1 / upper, 1 / lower)
    assert low <= slopes.min() < slopes.max() <= high
    mean = (lower + upper) / 2 if law == "slope" else np.log(upper / lower) / (upper - lower)
    second = (upper**3 - lower**3) / 3 / (upper - lower) if law == "slope" else 1 / (lower * upper)
    variance = second - mean**2
    assert abs(slopes.mean() - mean) < 4.5 * np.sqrt(variance / N)
    assert abs(slopes.var() / variance - 1) < 4.5 * np.sqrt(2 / N)


def test_float32_slopes_stay_within_their_bounds():
    slopes = fr.random.slopes(torch.tensor([3]), (N,))
    assert slopes.dtype == torch.float32
    assert float(slopes.min()) >= np.float32(1 / 8) and float(slopes.max()) <= np.float32(1 / 3)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62])
def test_every_bin_is_as_full_as_another(law, seed):
    counts = np.histogram(uniform(seed, law=law), bins=1024, range=(0, 1))[0]
    assert counts.sum() == N
    assert RARE < stats.chisquare(counts).pvalue < 1 - RARE


@pytest.mark.parametrize("lane", range(4))
def test_each_of_the_four_words_of_a_counter_is_uniform(lane):
    assert stats.kstest(uniform()[lane::4], "uniform").pvalue > RARE


def test_words_are_spread_over_every_bit():
    words = reference.words(9, 0, N).numpy().view(np.uint32)
    ones = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=0)
    assert np.all(np.abs(ones - N / 2) < 5 * np.sqrt(N / 4))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 128, 512, 1024, 4096, 65536])
def test_no_lag_correlates(lag):
    u = uniform()
    assert not correlated(u[:-lag], u[lag:])


def test_neighbours_are_independent_as_pairs():
    """Correlation sees straight lines alone: the joint histogram of two neighbours sees every dependence."""
    u = uniform()
    for shift in (1, 2, 3):
        table = np.histogram2d(u[:-shift:4], u[shift::4][: len(u[:-shift:4])], bins=16, range=((0, 1), (0, 1)))[0]
        assert stats.chi2_contingency(table).pvalue > RARE


def test_channels_and_examples_do_not_correlate():
    u = uniform(count=8 * 16 * 32 * 32).reshape(8, 16, -1)
    for c in range(1, 16):
        assert not correlated(u[:, 0].ravel(), u[:, c].ravel())
    for n in range(1, 8):
        assert not correlated(u[0].ravel(), u[n].ravel())


@pytest.mark.parametrize("other", [2, 3, -1, 1 + 2**32, 1 + 2**31, 2**62 + 1])
def test_seeds_are_independent_streams(other):
    """Neighbouring seeds and seeds that differ in their high word alone."""
    a, b = uniform(1), uniform(other)
    assert not correlated(a, b)
    assert (a == b).mean() < 1e-3
    for shift in (1, 4):  # nor is one stream the other, shifted
        assert not correlated(a[shift:], b[:-shift])


def test_no_word_repeats_more_than_chance():
    """The birthday problem: N words of 2^32 collide about N^2 / 2^33 = 8 times."""
    collisions = N - np.unique(reference.words(1, 0, N).numpy()).size
    assert stats.poisson.sf(collisions - 1, N * N / 2**33) > RARE


def test_new_seeds_are_spread_and_distinct():
    torch.manual_seed(0)
    seeds = torch.cat([fr.random.new_seed() for _ in range(2000)])
    assert seeds.dtype == torch.int64 and seeds.unique().numel() == 2000
    assert stats.kstest(seeds.double().numpy() / 2**64 + 0.5, "uniform").pvalue > RARE
    assert fr.random.new_seed().shape == (1,)


def test_manual_seed_repeats_the_seed_and_calls_differ():
    torch.manual_seed(4)
    first, second = fr.random.new_seed(), fr.random.new_seed()
    torch.manual_seed(4)
    assert torch.equal(fr.random.new_seed(), first) and not torch.equal(first, second)


def test_slopes_are_those_of_the_layer():
    z = torch.full((2, 3, 5, 7), -1.0)
    seed = fr.random.new_seed()
    y = fr.functional.bias_rrelu(z, None, 0.1, 0.9, training=True, seed=seed)
    assert torch.equal(-y, fr.random.slopes(seed, z.shape, 0.1, 0.9))


def test_bounds_are_checked():
    with pytest.raises(RuntimeError, match="Lower bound"):
        fr.random.slopes(torch.tensor([1]), (3,), 0.5, 0.1)
