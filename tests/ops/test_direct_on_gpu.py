"""Calls in C++ on CUDA tensors, and launches without Triton's binder, on a machine that stands in for a GPU.

In a process of its own, since the machine comes before torch: softcuda, whose folder must be on PYTHONPATH.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What only a GPU shows; the rest is the same code as on CPU tensors.
CHOSEN = "python or plan or slopes or hooks or triton or compiled or threads or bound or stream or argument or listens"


@pytest.mark.skipif(importlib.util.find_spec("softcuda") is None, reason="softcuda is not on PYTHONPATH")
def test_on_a_soft_device():
    files = "tests/kernels/test_compiled.py", "tests/ops/test_direct.py"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "softcuda.plugin", *files]
    environment = {**os.environ, "FUSED_RECT_BACKEND": "triton"}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run([*command, "-k", CHOSEN], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "launches of 2 kernels" in done.stdout, done.stdout + done.stderr
    assert "not there:" not in done.stdout, "direct.cpp was not built"
