"""`make fuzz`, a minute's share of it; and that it notices a wrong bit."""

import os

import fuzz
import pytest
import torch

from fused_rect.kernels import cpu

# Compiled, a case takes some seconds: hardly two of them share a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXHAUSTIVE = {"native": 200, "triton": 50 if INTERPRETED else 15, "autograd": 1500}
MARKS = {"triton": [pytest.mark.ptx]}


@pytest.mark.parametrize(
    "kind, count",
    [
        *[pytest.param(kind, 3, marks=MARKS.get(kind, ())) for kind in fuzz.KINDS],
        *[
            pytest.param(kind, count, marks=[pytest.mark.exhaustive, *MARKS.get(kind, ())])
            for kind, count in EXHAUSTIVE.items()
        ],
    ],
)
def test_nothing_is_wrong(kind, count):
    if kind == "native" and not cpu.available():
        pytest.skip(cpu.reason())
    fuzz.fuzz(kind, seed=1, first=0, count=count)


def test_cases_repeat():
    def drawn():
        rng = fuzz.random.Random("native 1 7")
        return fuzz.a_shape(rng, 1000), fuzz.a_rule(rng), fuzz.a_program(rng)

    assert drawn() == drawn()


@pytest.mark.skipif(not cpu.available(), reason=cpu.reason())
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_wrong_element_is_noticed_and_its_case_named(monkeypatch, what, capsys):
    original = getattr(cpu, what)

    def wrong(x, kept_or_parameters, *rest):
        found = original(x, kept_or_parameters, *rest)
        written = rest[1] if what == "forward" else rest[2]
        if written.numel() > 5:
            torch.nan_to_num_(written.as_strided((1,), (1,), 5), nan=1.0).add_(1)
        return found

    monkeypatch.setattr(cpu, what, wrong)
    assert fuzz.main(["native", "--count", "20"]) == 1
    assert "python tests/fuzz.py native --seed 0 --first " in capsys.readouterr().out
