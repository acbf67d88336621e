"""The calls in C++ (kernels/direct/) that are tested: of CPU tensors or, where Triton alone is, of CUDA tensors."""

import os

import pytest
import torch

import fused_rect as fr
from fused_rect import backends
from fused_rect.kernels import cpu, direct

BACKEND = "triton" if os.environ.get("FUSED_RECT_BACKEND") == "triton" else "native"
DEVICE = "cuda" if BACKEND == "triton" else "cpu"
THERE = torch.cuda.is_available() if DEVICE == "cuda" else cpu.available()
with fr.backend(BACKEND if DEVICE == "cuda" else "auto"):
    DIRECT = backends.direct(torch.empty(0, device=DEVICE)) if THERE else None
MARKS = [
    pytest.mark.ptx,
    pytest.mark.skipif(DIRECT is None, reason="" if DIRECT else f"not there: {direct.why(DEVICE)}"),
]
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="once is enough")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, or a machine that stands in for one")
