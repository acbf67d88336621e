"""The suites of ops, functionals and layers again in other surroundings: other numbers of threads, no compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = ["ops/test_ops.py", "test_functional.py", "test_nn.py"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "surroundings",
    [
        {"FUSED_RECT_BACKEND": "native", "OMP_NUM_THREADS": "1"},
        {"FUSED_RECT_BACKEND": "native", "OMP_NUM_THREADS": "2"},
        {"FUSED_RECT_BACKEND": "native", "OMP_NUM_THREADS": "3"},
        {"FUSED_RECT_BACKEND": "auto", "CXX": "/nonexistent"},
    ],
    ids=lambda variables: "-".join(variables.values()).replace("/", ""),
)
def test_suites(surroundings):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not exhaustive", *SUITES],
        cwd=Path(__file__).parent, env={**inherited, **surroundings}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 400
