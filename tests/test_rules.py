"""The table: what each rectifier keeps for backward, evaluates as, and refuses."""

import math

import pytest

from fused_rect import rules as rectifiers


@pytest.mark.parametrize(
    "op, lower, expected",
    [
        ("relu", 0.0, True),
        ("leaky_relu", 0.01, True),
        ("leaky_relu", 0.0, True),  # 0 * z has no sign, but the gradient at y <= 0 is the slope's, as it is at z <= 0
        ("leaky_relu", -0.01, False),
        ("prelu", 0.0, False),
        ("rrelu", 0.125, True),
        ("rrelu", 0.0, True),
        ("rrelu", -0.125, False),
        ("rrelu_divisor", 3.0, True),
    ],
)
def test_the_output_is_kept_where_its_sign_tells_the_side(op, lower, expected):
    assert rectifiers.saves_output(op, lower) is expected


def test_default_bounds_are_pytorchs_slopes_and_the_papers_divisors():
    slope, divisor = rectifiers.rrelu(None, None, "slope"), rectifiers.rrelu(None, None, "divisor")
    assert (slope.lower, slope.upper, slope.op) == (1 / 8, 1 / 3, "rrelu")
    assert (divisor.lower, divisor.upper, divisor.op) == (3.0, 8.0, "rrelu_divisor")


def test_evaluation_is_at_the_midpoint_of_what_was_drawn():
    assert rectifiers.rrelu(0.25, 0.75, "slope").evaluation() == rectifiers.LeakyReLU(0.5)
    assert rectifiers.rrelu(3, 8, "divisor").evaluation() == rectifiers.LeakyReLU(1 / 5.5)


def test_a_leaky_relu_has_its_slope_as_both_bounds():
    leaky = rectifiers.LeakyReLU(0.3)
    assert (leaky.lower, leaky.upper, leaky.op) == (0.3, 0.3, "leaky_relu")


def test_one_bound_may_be_left_to_the_law():
    assert rectifiers.rrelu(0.2, None, "slope").upper == 1 / 3
    assert rectifiers.rrelu(None, 5.0, "divisor").lower == 3.0


@pytest.mark.parametrize(
    "lower, upper, law, error, message",
    [
        (0.4, 0.3, "slope", RuntimeError, "Lower bound should be less than or equal to the upper bound.*0.4.*0.3"),
        (-math.inf, 0.3, "slope", RuntimeError, "must be finite, got lower=-inf"),
        (0.1, math.nan, "slope", RuntimeError, "must be finite.*upper=nan"),
        (0.0, 8.0, "divisor", ValueError, "lower must be > 0, got lower=0.0; use law='slope'"),
        (-1.0, 8.0, "divisor", ValueError, "lower must be > 0"),
        (1e-39, 8.0, "divisor", ValueError, "must lie in .*normal inverse, got lower=1e-39"),
        (3.0, 1e38, "divisor", ValueError, "must lie in .*upper=1e[+]38"),
        (0.1, 0.3, "gaussian", ValueError, "law must be 'slope' or 'divisor', got 'gaussian'"),
    ],
)
def test_bounds_that_make_no_sense(lower, upper, law, error, message):
    with pytest.raises(error, match=message):
        rectifiers.rrelu(lower, upper, law)
