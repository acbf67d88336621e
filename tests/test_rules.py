"""The table: what each rule keeps for backward, evaluates as, and refuses."""

import math

import pytest

from fused_rect import rules
from fused_rect.rules import RULES, SLOPES, Rule


@pytest.mark.parametrize("name", RULES)
def test_a_row_answers_everything(name):
    rule = Rule.default(name)
    assert rule.slope in SLOPES and rule.number == SLOPES.index(rule.slope) and rule.flops >= 1
    assert rule.random == (rule.name.startswith("rrelu")) and rule.learned == (name == "prelu")
    assert rule.keeps_input == rule.learned
    assert not rule.evaluation().random and (rule.random or rule.evaluation() == rule)


def test_nan_goes_where_torch_sends_it():
    assert [name for name in RULES if Rule.default(name).nan_is_negative] == ["leaky_relu", "prelu"]


def test_default_bounds_are_pytorchs_slopes_and_the_papers_divisors():
    assert rules.rrelu(None, None, "slope") == ("rrelu", 1 / 8, 1 / 3)
    assert rules.rrelu(None, None, "divisor") == ("rrelu_divisor", 3.0, 8.0)


def test_evaluation_is_at_the_midpoint_of_what_was_drawn():
    assert rules.rrelu(0.25, 0.75, "slope", training=False) == rules.leaky_relu(0.5)
    assert rules.rrelu(3, 8, "divisor", training=False) == rules.leaky_relu(1 / 5.5)


def test_constants_of_the_kernels():
    assert rules.leaky_relu(0.3).constants == (0.3, 0.0)
    assert Rule("rrelu", 0.25, 0.75).constants == (0.5 * 2.0**-32, 0.5)


def test_one_bound_may_be_left_to_the_law():
    assert rules.rrelu(0.2, None, "slope").upper == 1 / 3
    assert rules.rrelu(None, 5.0, "divisor").lower == 3.0


@pytest.mark.parametrize(
    "lower, upper, law, error, message",
    [
        (0.4, 0.3, "slope", RuntimeError, "Lower bound should be less than or equal to the upper bound.*0.4.*0.3"),
        (-math.inf, 0.3, "slope", RuntimeError, "must be finite, got lower=-inf"),
        (0.1, math.nan, "slope", RuntimeError, "must be finite.*upper=nan"),
        (0.0, 8.0, "divisor", ValueError, "lower must be > 0, got lower=0.0, upper=8.0; use law='slope'"),
        (-1.0, 8.0, "divisor", ValueError, "lower must be > 0"),
        (1e-39, 8.0, "divisor", ValueError, "must lie in .*normal inverse, got lower=1e-39"),
        (3.0, 1e38, "divisor", ValueError, "must lie in .*upper=1e[+]38"),
        (0.1, 0.3, "gaussian", ValueError, "law must be one of 'slope', 'divisor', got 'gaussian'"),
    ],
)
def test_bounds_that_make_no_sense(lower, upper, law, error, message):
    with pytest.raises(error, match=message):
        rules.rrelu(lower, upper, law)


def test_the_sign_of_a_slope_of_zero_is_not_lost_in_the_numbers_that_are_kept():
    """0.0 == -0.0, so one would be found under the other's name; their zeros differ in sign."""
    for slope in (-0.0, 0.0, -0.0):
        assert math.copysign(1, rules.numbers(rules.leaky_relu(slope))[1]) == math.copysign(1, slope)
    for upper in (0.0, -0.0, 0.0):
        assert math.copysign(1, rules.numbers(Rule("rrelu", -0.0, upper))[2]) == math.copysign(1, upper)
