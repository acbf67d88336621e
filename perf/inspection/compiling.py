"""Compiles the kernels of a training step for any target, on any machine, GPU or not.

Triton's disk cache keeps what has been compiled before. TRITON_INTERPRET has to be unset before a kernel is decorated.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fused_rect.rules import RULES, Rule

RECTIFIERS = tuple(RULES)
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
        return str(self.variant.name)

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
    from fused_rect.kernels.plan import THREADS

    dtype, target = getattr(torch, step.dtype), gpu_target(step.target)
    found = variants.training_step(Rule.default(step.rectifier), dtype, step.shape, NAMES[step.layout])
    warps = {"num_warps": THREADS // target.warp_size}
    return [
        Launch(v, triton.compile(v.source(), target=target, options={**v.options, **warps}), moved)
        for v, moved in zip(found, _bytes(step, found[1].plan, dtype.itemsize), strict=True)
    ]


def _bytes(step: Step, plan: Any, itemsize: int) -> tuple[int, int, int]:
    """What forward, backward and finishing sum move: the least that the call needs, and the partial sums."""
    from fused_rect.kernels import traffic

    rule, channels = Rule.default(step.rectifier), step.shape[1]
    sums = 1 + rule.learned
    finish = traffic.finish(sums * plan.partials, sums * channels, out_itemsize=itemsize)
    forward, backward = traffic.step(rule, step.size, itemsize, channels, channels)
    return forward.bytes, backward.bytes + finish.read, finish.bytes
