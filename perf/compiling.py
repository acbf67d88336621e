"""Compiles what the launches of `kernels/launch.py` would run, for any target, on any machine, GPU or not.

The launches themselves are called, on meta tensors, with Triton's `run` replaced by one that compiles and notes instead
of launching. So what is inspected is what would run: the same plan, specialization and options. It has to happen in a
process of its own (`in_processes`): Triton's active driver is replaced, and TRITON_INTERPRET has to be unset before a
kernel is decorated.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar
from unittest import mock

import torch

RECTIFIERS = ("relu", "leaky_relu", "prelu", "rrelu", "rrelu_divisor")
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("nchw", "channels_last")
BOUNDS = {"leaky_relu": (0.01, 0.01), "rrelu": (1 / 8, 1 / 3), "rrelu_divisor": (3.0, 8.0)}


@dataclass(frozen=True)
class Case:
    """One training step's calls: the forward and the backward with all its sums, bias and one slope a channel."""

    target: str  # "sm_90", "gfx942"
    rectifier: str
    dtype: str
    layout: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Launch:
    """One kernel that ``case`` launches, compiled."""

    kernel: Any  # triton's CompiledKernel
    grid: tuple[int, ...]
    constants: dict[str, Any]
    bytes: int  # of its tensor arguments, each read or written once

    @property
    def name(self) -> str:
        return str(self.kernel.name)

    @property
    def threads(self) -> int:
        return int(self.kernel.metadata.num_warps * self.kernel.metadata.target.warp_size)


def gpu_target(name: str) -> Any:
    """Triton's target of "sm_90" or "gfx942". ValueError for anything else."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx") and name[3:].isalnum() and len(name) > 5:
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target must be like sm_90 or gfx942, got {name!r}")


class _Device:
    """As much of a Triton driver as compiling asks for; the device's number keeps the targets' caches apart."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return gpu_target(self.name)


def launches(case: Case) -> list[Launch]:
    """What ``case`` launches, compiled: its forward, its backward and the finishing sums, in that order."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fused_rect.kernels import launch

    noted: list[Launch] = []
    run = JITFunction.run

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        noted.append(Launch(kernel, tuple(grid), options, sum(a.nbytes for a in args if isinstance(a, torch.Tensor))))
        return kernel

    x, bias, weight, seed = _tensors(case)
    lower, upper = BOUNDS.get(case.rectifier, (0.0, 0.0))
    driver.set_active(_Device(case.target))
    with mock.patch.object(JITFunction, "run", note):
        launch.forward(x, bias, weight, seed, case.rectifier, lower, upper, x)
        need_weight = weight is not None
        launch.backward(x, x, bias, weight, seed, case.rectifier, lower, upper, x, True, need_weight)
    return noted


def _tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    dtype = getattr(torch, case.dtype)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = last[len(case.shape)] if case.layout == "channels_last" else torch.contiguous_format
    x = torch.empty(case.shape, dtype=dtype, device="meta", memory_format=memory_format)
    parameter = torch.empty(case.shape[1], dtype=dtype, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if case.rectifier.startswith("rrelu") else None
    return x, parameter, parameter if case.rectifier == "prelu" else None, seed


T = TypeVar("T")


def in_processes(work: Callable[[Case], T], cases: Sequence[Case], processes: int = 2) -> Iterator[tuple[Case, T]]:
    """``work`` of each case, as they come, from processes that compile and do not interpret."""
    context = multiprocessing.get_context("spawn")
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with ProcessPoolExecutor(
        min(processes, len(cases) or 1), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        with mock.patch.dict(os.environ, compiling, clear=True):  # the processes start at the first submission
            futures = {pool.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()
