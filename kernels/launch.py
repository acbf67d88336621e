"""Host side of the Triton kernels: from tensors to a plan to a launch.

Tensors arrive checked and dense (`fused_rect.ops`). Nothing here asks for a CUDA tensor: CPU tensors go to whatever
Triton driver or interpreter is active. What depends on shapes alone is worked out once per shape (`rectify_call`,
`finish_call`), and what Triton compiled for it is kept there (`compiled.py`), so that a launch costs look-ups.
"""

from __future__ import annotations

import functools
import math
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from ..reference import computed_in
from ..rules import Need, Norm, Parameters, Rule, signs
from . import reduce
from .compiled import Launchable, launchable
from .plan import THREADS, VECTOR, Plan, channel_layout, plan
from .rectify import rectify

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """One launch but for its tensors, the kernel's first arguments: ``kernel[grid](*tensors, *rest, **options)``."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    plan: Plan
    compiled: dict[Any, Launchable] = field(default_factory=dict)

    @functools.cached_property
    def rest(self) -> tuple[Any, ...]:
        return (*self.numbers.values(), *self.constants.values())

    def launchable(self, tensors: tuple[Any, ...]) -> Launchable | None:
        """What Triton compiles for such tensors, if it may be launched from here."""
        return launchable(self.kernel, self.grid, tensors, self.rest, self.options, self.compiled)

    def __call__(self, *tensors: Tensor | None) -> None:
        found = self.launchable(tensors)
        if found is None:
            self.kernel[self.grid](*tensors, *self.rest, **self.options)
        else:
            found(tensors)


def forward(
    x: Tensor,
    parameters: Parameters,
    rule: Rule,
    out: Tensor,
    bits: Tensor | None,
    norm: Norm | None = None,
) -> None:
    """out = rectify(x + bias), and which elements are negative into ``bits``; ``out`` may be ``x``.

    norm: a BatchNorm between x and the bias, which is its own; without bits, and not beside a slope that is drawn.
    """
    call = _rectify_call(x, parameters, rule, Need(), norm)
    with _device_of(x):
        call(x, None, out, bits, *parameters, None, *_statistics(norm))


def backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, grad_input: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned.

    kept: forward's bits (uint8), or its input.
    """
    call = _rectify_call(grad, parameters, rule, need)
    x, bits = (None, kept) if kept.dtype == torch.uint8 else (kept, None)
    compute, summed = computed_in(grad.dtype), outputs(grad.dtype, need)
    with _device_of(grad):
        partials = grad.new_empty((len(summed), call.numbers["stride"]), dtype=compute) if summed else None
        call(x, grad, grad_input, bits, *parameters, partials, *_statistics(None))
        sums = [grad.new_empty((call.plan.channels,), dtype=dtype) for dtype in summed]
        if sums:
            finish = finish_call(call.plan, len(sums), compute)
            finish(partials, sums[0], sums[1] if len(sums) == 2 else None)
    grad_bias = None if need.bias is None else sums[0]
    return grad_bias, _as_weight(sums[-1], parameters.weight) if need.weight else None


def _statistics(norm: Norm | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if norm is None else norm[:3]


def outputs(dtype: torch.dtype, need: Need) -> list[torch.dtype]:
    """Of each sum that is needed: the bias's in the dtype wanted, PReLU's to be summed on, or rounded."""
    return [output for output in (need.bias, computed_in(dtype) if need.weight else None) if output is not None]


def _as_weight(per_channel: Tensor, weight: Tensor) -> Tensor:
    total = per_channel if weight.numel() == per_channel.numel() else per_channel.sum()
    return total.to(weight.dtype).view(weight.shape)


# ---- what depends on shapes alone ----


def _rectify_call(like: Tensor, parameters: Parameters, rule: Rule, need: Need, norm: Norm | None = None) -> Call:
    weight = 0 if parameters.weight is None else parameters.weight.numel()
    by_channel, eps = parameters.bias is not None or norm is not None, None if norm is None else norm.eps
    return rectify_call(like.shape, like.stride(), like.dtype, rule, by_channel, weight, need, eps)


def rectify_call(
    shape: Shape,
    stride: Shape,
    dtype: torch.dtype,
    rule: Rule,
    bias: bool,
    weight: int,
    need: Need,
    eps: float | None = None,
) -> Call:
    """The launch of forward or, if it is given a ``grad``, backward for dense tensors.

    ``bias``: whether there is one, or a norm, of which ``eps`` is; ``weight``: its length, 0 if there is none.
    """
    return _known_call(shape, stride, dtype, rule, signs(rule), bias, weight, need, eps)


@functools.lru_cache(maxsize=4096)
def _known_call(
    shape: Shape,
    stride: Shape,
    dtype: torch.dtype,
    rule: Rule,
    signs: Any,
    bias: bool,
    weight: int,
    need: Need,
    eps: float | None,
) -> Call:
    sums_bias = need.bias is not None
    by_channel = bias or sums_bias or weight > 1
    channels, inner = channel_layout(shape, stride) if by_channel else (1, math.prod(shape))
    p = plan(math.prod(shape), channels, inner, dtype.itemsize)
    summed = sums_bias or need.weight
    scale, middle = struct.unpack("2q", struct.pack("2d", *rule.constants))
    numbers = {
        "scale": scale,
        "middle": middle,
        "eps": None if eps is None else struct.unpack("q", struct.pack("d", eps))[0],
        "channels": p.channels,
        "inner": p.inner,
        "row": p.row,
        "columns": p.columns,
        "vectors": p.vectors,
        "tail": p.tail,
        "tail_at": p.tail_at,
        "entries": p.entries if summed else None,
        "stride": p.partials if summed else None,
    }
    constants = {
        "SLOPE": rule.slope,
        "LOOKUP": p.lookup,
        "WEIGHT": "one" if weight == 1 else p.lookup,
        "SUM_BIAS": sums_bias,
        "SUM_WEIGHT": need.weight,
        "TAIL": p.tail > 0,
        "INDEX_64": p.index_64,
        "COUNTER_64": p.counter_64 and rule.random,
        "V": VECTOR,
        "DEPTH": p.depth,
        "BESIDE": p.beside,
        "DOWN": p.down,
        "ACROSS": p.across,
        "SEGMENT": p.segment if summed else 0,
        "COMPUTE": _triton_type(computed_in(dtype)),
    }
    return Call(rectify, (p.programs,), numbers, constants, _options(), p)


@functools.lru_cache(maxsize=4096)
def finish_call(p: Plan, sums: int, compute: torch.dtype) -> Call:
    """The finishing sum."""
    slots, block = p.finish
    numbers = {
        "channels": p.channels,
        "inner": p.inner,
        "copies": p.copies,
        "chunks": p.chunks,
        "entries": p.entries,
        "stride": p.partials,
        "touched": p.touched,
        "tail": p.tail,
        "tail_at": p.tail_at,
    }
    constants = {
        "UNIT": p.unit,
        "STEP": 2 if p.segment else 1,
        "TAIL": p.tail > 0,
        "V": VECTOR,
        "SLOTS": slots,
        "BLOCK": block,
        "INDEX_64": p.index_64,
        "SUMS": sums,
        "COMPUTE": _triton_type(compute),
    }
    return Call(reduce.finish, (-(-p.channels // block), sums), numbers, constants, _options(), p)


@functools.cache
def _options() -> dict[str, Any]:
    wavefront = torch.cuda.get_device_properties().warp_size if torch.version.hip else 32
    # Contracted products would no longer equal eager's bit for bit.
    return {"num_warps": THREADS // wavefront, "enable_fp_fusion": False}


def _triton_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


# ---- where it runs ----


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make that the tensor's."""
    if tensor.device.type == "cpu":
        _require_a_driver_for_cpu_tensors()
        return nullcontext()
    module = torch.get_device_module(tensor.device)
    if module.current_device() == tensor.get_device():
        return nullcontext()
    guard: AbstractContextManager[Any] = module.device_of(tensor)
    return guard


def _require_a_driver_for_cpu_tensors() -> None:
    """RuntimeError unless Triton's interpreter, or a driver that is none of Triton's own GPU ones, is active."""
    if not isinstance(rectify, triton.JITFunction):
        return
    try:
        active: Any = driver.active
        reads_cpu = not type(active._obj if hasattr(active, "_obj") else active).__module__.startswith("triton.")
    except RuntimeError:  # "0 active drivers"
        reads_cpu = False
    if not reads_cpu:
        raise RuntimeError(
            "backend 'triton' is forced on CPU tensors, which no active Triton driver reads: set TRITON_INTERPRET=1 "
            "before fused_rect is imported, or choose backend 'native' or 'eager'"
        )


__all__ = ["backward", "forward"]
