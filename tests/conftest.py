"""What all tests share: the implementations to test, and Triton's interpreter where there is no GPU.

A run that sets FUSED_RECT_BACKEND tests that implementation alone, on whatever Triton driver is active.
"""

import os
import sys

import pytest

FORCED = os.environ.get("FUSED_RECT_BACKEND", "")
if FORCED != "triton":
    # Before anything imports a kernel: @triton.jit reads it when it decorates.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
import soft_device
import torch
from hypothesis import HealthCheck, Phase, settings

import fused_rect as fr
from fused_rect.compile import placement
from fused_rect.fusion import waiting

settings.register_profile("fused_rect", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("fused_rect")
# For mutation.py, which asks whether a test fails and not for the least example that makes it fail.
SHRINKLESS = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
settings.register_profile("without_shrinking", settings.get_profile("fused_rect"), phases=SHRINKLESS)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

if "softcuda" in sys.modules:
    soft_device.mend()
if FORCED != "triton":
    interpreter.mend()

PATHS = (FORCED,) if FORCED else ("eager", "native", "triton")


@pytest.fixture(params=PATHS)
def path(request):
    """The name of one implementation, forced for the test; one that is not there is skipped with its reason."""
    if request.param == "native":
        from fused_rect.kernels import cpu

        if not cpu.available():
            pytest.skip(f"no native path: {cpu.reason()}")
    with fr.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _on_the_gpu(request):
    """Where the Triton path alone is tested and there is a GPU, tests of its kernels make their tensors on it."""
    machine = request.config.pluginmanager.hasplugin("ptxgpu.plugin")
    if FORCED == "triton" and torch.cuda.is_available() and not machine and request.node.get_closest_marker("ptx"):
        with torch.device("cuda"):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _small_outputs_count(monkeypatch):
    """What fuse() leaves to torch and the compiler to Inductor for its size is ours too; three tests have the sizes."""
    monkeypatch.setattr(waiting, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(waiting, "MIN_ELEMENTS_OF_NORMS", 0)
    monkeypatch.setattr(placement, "MIN_ELEMENTS", 0)
