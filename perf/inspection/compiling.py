"""Compiles the kernels of a training step for any target, on any machine, GPU or not.

Compiling happens in processes of its own (`in_processes`), because TRITON_INTERPRET has to be unset before a kernel is
decorated, and because two of them are faster. Triton's disk cache keeps what has been compiled before.
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
NAMES = {"nchw": "contiguous", "channels_last": "channels_last"}


@dataclass(frozen=True)
class Step:
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
    """One kernel that a step launches, compiled."""

    variant: Any  # kernels/variants.py's
    kernel: Any  # triton's CompiledKernel
    bytes: int  # that it reads and writes, its partial sums included

    @property
    def name(self) -> str:
        """ "forward", "backward" or "finish"."""
        return str(self.kernel.name)

    @property
    def programs(self) -> int:
        return prod(self.variant.grid)

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


def launches(step: Step) -> list[Launch]:
    """What ``step`` launches, compiled: its forward, its backward and the finishing sum, in that order."""
    import triton

    from fused_rect.kernels import variants

    dtype, target = getattr(torch, step.dtype), gpu_target(step.target)
    arguments = step.rectifier, dtype, step.shape, NAMES[step.layout]
    found = [variants.forward(*arguments), *variants.backward(*arguments)]
    return [
        Launch(v, triton.compile(v.source(), target=target, options=v.options), moved)
        for v, moved in zip(found, _bytes(step, found[1].plan, dtype.itemsize))
    ]


def _bytes(step: Step, plan: Any, itemsize: int) -> tuple[int, int, int]:
    """What forward, backward and finishing sum move: the least that the call needs, and the partial sums."""
    from fused_rect.kernels import traffic

    learned = step.rectifier == "prelu"
    channels = step.shape[1]
    call = step.rectifier, step.size, itemsize
    weight = channels if learned else 0
    sums = 1 + learned
    finish = traffic.finish(sums * plan.chunks * plan.entries, sums * channels, out_itemsize=itemsize)
    backward = traffic.backward(*call, bias=channels, weight=weight, sum_bias=True, sum_weight=learned)
    return traffic.forward(*call, bias=channels, weight=weight).bytes, backward.bytes + finish.read, finish.bytes


T = TypeVar("T")


def in_processes(work: Callable[[Step], T], steps: Sequence[Step], processes: int = 2) -> Iterator[tuple[Step, T]]:
    """``work`` of each step, as they come, from processes that compile and do not interpret."""
    context = multiprocessing.get_context("spawn")
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with ProcessPoolExecutor(
        min(processes, len(steps) or 1), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        with mock.patch.dict(os.environ, compiling, clear=True):  # the processes start at the first submission
            futures = {pool.submit(work, step): step for step in steps}
        for future in as_completed(futures):
            yield futures[future], future.result()
