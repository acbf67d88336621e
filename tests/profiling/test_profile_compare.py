"""`--compare`: slower beyond noise and tolerance is a regression, noise alone is not."""

import numpy as np
import pytest
from made_up import report

from fused_rect.perf.profiling import records
from fused_rect.perf.profiling.compare import compare
from fused_rect.perf.profiling.measure import interval


def test_a_slowed_kernel_is_a_regression_and_the_others_are_unchanged():
    then, now = report((1.5, 1.5, 1.5)), report((1.5, 1.0, 1.5))
    found = compare(then, now)
    regressions = found.regressions(0.1)
    assert {c.case for c in regressions} == {c.case for c in found.changes if "layer 1" in c.case}
    assert [c.change.value for c in regressions] == pytest.approx([1.5, 1.5])
    assert {c.verdict for c in found.changes if c not in regressions} == {"indistinguishable"}


def test_tolerance_and_direction():
    found = compare(report((1.5,)), report((1.5 / 1.2,)))
    assert found.regressions(0.1) and not found.regressions(0.3)
    faster = compare(report((1.5,)), report((3.0,)))
    assert not faster.regressions(0.0) and {c.verdict for c in faster.changes} == {"faster"}


def test_a_slower_machine_is_no_regression():
    now = report()
    for column in ("seconds", "seconds_low", "seconds_high"):
        now[column] *= 3
    assert not compare(report(), now).regressions(0.0)


def test_noise_is_taken_into_account():
    assert compare(report((1.5,), spread=1.02), report((1.2,), spread=1.02)).regressions(0.1)
    assert not compare(report((1.5,), spread=1.5), report((1.2,), spread=1.5)).regressions(0.1)


def test_without_eager_the_copy_stands_in_and_one_round_supports_nothing():
    only = [r[~r.peer.isin(["eager"])] for r in (report((1.5,)), report((1.5,)))]
    assert {c.against for c in compare(*only).changes} == {"copy"}
    then, now = report((1.5,)), report((0.5,))
    now["degrees"] = 0
    assert not compare(then, now).regressions(0.1)


def test_cases_of_one_profile_alone_are_named():
    found = compare(report((1.0, 1.0)), report((1.0,)))
    assert len(found.only_then) == 2 and not found.only_now and "layer 1" in found.only_then[0]
    nothing = compare(report(), records.frame([]))
    assert not nothing.changes


def test_equal_states_raise_an_alarm_in_about_one_of_twenty_comparisons():
    """20 cases a comparison, 3 processes of 5 rounds: unadjusted, 4 comparisons of 10 would report a regression."""
    rng = np.random.default_rng(0)
    cases = report((1.0,) * 20).query("part == 'layer' and peer == 'eager'")

    def measured():
        logs = rng.normal(size=(20, 3, 1)) * 0.02 + rng.normal(size=(20, 3, 5)) * 0.05
        found = [interval(np.exp(case)) for case in logs]
        frame = cases.copy()
        frame[["ratio", "ratio_low", "ratio_high", "degrees"]] = [(f.value, f.low, f.high, f.degrees) for f in found]
        return frame

    alarms = sum(bool(compare(measured(), measured()).regressions(0.0)) for _ in range(60))
    assert alarms <= 6  # 2.5 % expected, since half of the false alarms are in the other direction
