"""What compiled models move, launch and hold on a GPU, against plain Inductor: the record, and some counted anew."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fused_rect.compile.placement import BACKWARD, INDUCTOR, OURS, Around, in_training, traffic
from fused_rect.perf import counting
from fused_rect.perf.blocks import BLOCKS
from fused_rect.perf.models import MODELS

ROOT = Path(__file__).parents[2]
AT_MOST = {"relu": 0.84, "leaky_relu": 0.84, "prelu": 0.84, "rrelu": 0.50}  # bytes of a chain's training step
CHAIN = Around("leaky_relu", 2, bias=True, opaque=1, fusing=0, ready=True, made=True)


def place(**changes):
    return in_training(CHAIN._replace(**changes)).place


@pytest.mark.parametrize("rectifier", ["relu", "leaky_relu"])
def test_a_constant_slope_is_ours_between_two_convolutions_alone(rectifier):
    assert place(rectifier=rectifier) == OURS
    assert place(rectifier=rectifier, itemsize=4) == OURS
    assert place(rectifier=rectifier, bias=False) == OURS
    for opaque, fusing in ((1, 1), (0, 1), (2, 0)):
        assert place(rectifier=rectifier, opaque=opaque, fusing=fusing, ready=False) == INDUCTOR
    assert place(rectifier=rectifier, opaque=0, fusing=1) == INDUCTOR  # a sum behind it
    assert place(rectifier=rectifier, made=False) == INDUCTOR


def test_a_learned_slope_is_inline_with_our_backward_where_a_bias_pays_for_it():
    assert place(rectifier="prelu") == place(rectifier="prelu", opaque=0, fusing=1) == BACKWARD
    assert place(rectifier="prelu", bias=False) == place(rectifier="prelu", fusing=1, ready=False) == INDUCTOR


@pytest.mark.parametrize("rectifier", counting.RECTIFIERS)
def test_a_tensor_smaller_than_the_sums_is_inductors(rectifier):
    assert place(rectifier=rectifier, elements=100) == INDUCTOR != place(rectifier=rectifier, elements=4096)


def test_a_random_slope_is_ours_behind_every_convolution():
    for opaque, fusing in ((1, 0), (0, 1), (1, 1), (2, 0)):
        assert place(rectifier="rrelu", opaque=opaque, fusing=fusing, ready=(opaque, fusing) == (1, 0)) == OURS


def test_the_estimate_is_what_was_counted_between_two_convolutions():
    """Bytes an element of 3 x [conv, rectifier] in bfloat16, from Inductor's kernels and ours."""
    counted = {"leaky_relu": (8.25, 10), "prelu": (10, 14), "rrelu": (8.25, 18)}
    for rectifier, bytes_ in counted.items():
        assert traffic(CHAIN._replace(rectifier=rectifier)) == bytes_


def test_the_record_moves_and_holds_no_more_than_inductor():
    rows = counting.load()
    assert {row.name for row in rows} <= {*BLOCKS, *MODELS}
    for row in rows:
        assert not {"bytes", "peak"} & set(row.worse), row
        assert row.kernels[0] <= row.kernels[1] + row.fused + 1, row  # the sums' end is a launch of its own
        if row.chain and row.mode == "training":
            assert row.ratio <= AT_MOST[row.rectifier], row
        if row.chain and row.mode == "training" and row.rectifier in ("leaky_relu", "rrelu"):
            assert row.peak_ratio <= 0.65, row
        if row.mode == "inference":
            assert row.fused == 0, row


def test_counting_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "softcuda", raising=False)
    assert counting.main(["chain"]) == 2 and "nothing was counted" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("softcuda") is None, reason="needs the package softcuda on PYTHONPATH")
@pytest.mark.parametrize("name", ["chain", "head"])
def test_a_step_counted_anew_is_the_recorded_one(name):
    program = f"""
import softcuda; softcuda.install(90)
from fused_rect.perf import counting
rows = list(counting.rows([{name!r}], ["leaky_relu", "rrelu"], ["bfloat16"], ["training"]))
recorded = {{(r.name, r.rectifier, r.dtype, r.mode): r for r in counting.load()}}
for row in rows:
    print(row)
    was = recorded[row.name, row.rectifier, row.dtype, row.mode]
    assert all(abs(a - b) <= 0.02 * b for a, b in zip(row.bytes, was.bytes)), (row, was)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
