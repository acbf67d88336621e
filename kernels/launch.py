"""Host side of the Triton kernels: from tensors to a plan to a launch.

Tensors arrive checked and dense (`fused_rect.ops`). Nothing here asks for a CUDA tensor: CPU tensors go to whatever
Triton driver or interpreter is active. What depends on shapes alone is worked out once per shape (`forward_call`,
`backward_call`, `finish_call`), so that a launch costs a look-up more than Triton's own.
"""

from __future__ import annotations

import functools
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from .. import reference
from ..rules import RULES, Need, Parameters, Rule
from . import rectify, reduce
from .plan import Plan, channel_layout, plan

Shape = tuple[int, ...]


class Call(NamedTuple):
    """One launch but for its pointers, which come first: ``kernel[grid](*pointers, *numbers, **constants)``."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    plan: Plan

    def __call__(self, *pointers: Tensor | None) -> None:
        self.kernel[self.grid](*pointers, *self.numbers, **self.constants)


def forward(x: Tensor, parameters: Parameters, rule: Rule, out: Tensor, bits: Tensor | None) -> None:
    """out = rectify(x + bias), and which elements are negative into ``bits``; ``out`` may be ``x``."""
    if bits is not None:
        bits.copy_(reference.pack_bits(reference.is_negative(reference.add_bias(x, parameters.bias), rule)))
    lengths = _length(parameters.bias), _length(parameters.weight)
    call = forward_call(x.shape, x.stride(), x.dtype, *rule, *lengths)
    with _device_of(x):
        call(x, out, *parameters)


def backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, grad_input: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned.

    kept: forward's bits (uint8), or its input.
    """
    bias, weight, seed = parameters
    if kept.dtype == torch.uint8:
        negative = reference.unpack_bits(kept, grad)
        kept = torch.where(negative, grad.new_full((), -1), grad.new_full((), 1))
    lengths = _length(bias), _length(weight)
    need_bias = need.bias is not None
    call = backward_call(kept.shape, kept.stride(), kept.dtype, *rule, *lengths, need_bias, need.weight)
    p = call.plan
    sums = need_bias + need.weight
    with _device_of(kept):
        if not sums:
            call(grad, kept, grad_input, bias, weight, seed, None, None)
            return None, None
        compute = _compute(kept.dtype)
        partials = kept.new_empty((sums, p.chunks, p.entries), dtype=compute)
        tails = kept.new_empty((p.vector, sums), dtype=compute) if p.tail else None
        call(grad, kept, grad_input, bias, weight, seed, partials, tails)
        outputs = [
            kept.new_empty((p.channels,), dtype=dtype)
            for wanted, dtype in ((need_bias, need.bias), (need.weight, compute))
            if wanted
        ]
        finish_call(p, sums, compute)(partials, tails, outputs[0], outputs[1] if sums == 2 else None)
    grad_bias = outputs[0] if need_bias else None
    return grad_bias, _as_weight(outputs[-1], weight) if need.weight else None


def _as_weight(per_channel: Tensor, weight: Tensor) -> Tensor:
    total = per_channel if weight.numel() == per_channel.numel() else per_channel.sum()
    return total.to(weight.dtype).view(weight.shape)


# ---- what depends on shapes alone ----


@functools.lru_cache(maxsize=4096)
def forward_call(
    shape: Shape, stride: Shape, dtype: torch.dtype, rule: str, lower: float, upper: float, bias: int, weight: int
) -> Call:
    """The forward launch for a dense input; ``bias`` and ``weight`` are lengths, 0 where absent.

    Pointers: input, out, bias, weight, seed.
    """
    p = _plan(shape, stride, dtype, bias > 0 or weight > 1)
    constants = {"BIAS": _lookup(bias, p), **_constants(p, rule, weight, dtype)}
    return Call(rectify.forward, (p.programs,), _numbers(p, rule, lower, upper), constants, p)


@functools.lru_cache(maxsize=4096)
def backward_call(
    shape: Shape,
    stride: Shape,
    dtype: torch.dtype,
    rule: str,
    lower: float,
    upper: float,
    bias: int,
    weight: int,
    need_bias: bool,
    need_weight: bool,
) -> Call:
    """The backward launch; pointers: grad, saved, grad_input, bias, weight, seed, partials, tails.

    The bias is None where the output was saved; partials and tails are None where nothing is summed.
    """
    p = _plan(shape, stride, dtype, bias > 0 or need_bias or weight > 1)
    constants = {
        "BIAS": _lookup(bias, p),
        "SUM_BIAS": need_bias,
        "SUM_WEIGHT": need_weight,
        "LOOKUP": p.lookup,
        "SEGMENT": p.segment,
        **_constants(p, rule, weight, dtype),
    }
    numbers = (*_numbers(p, rule, lower, upper), p.entries, p.chunks * p.entries)
    return Call(rectify.backward, (p.programs,), numbers, constants, p)


@functools.lru_cache(maxsize=4096)
def finish_call(p: Plan, sums: int, compute: torch.dtype) -> Call:
    """The finishing sum; pointers: partials, tails, and one output or two (else None)."""
    slots, block = p.finish
    constants = {
        "UNIT": p.unit,
        "STEP": 2 if p.segment else 1,
        "TAIL": p.tail > 0,
        "SUMS": sums,
        "V": p.vector,
        "WIDE": p.wide,
        "SLOTS": slots,
        "BLOCK": block,
        "COMPUTE": _triton_type(compute),
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    numbers = (
        p.channels, p.inner, p.copies, p.chunks, p.entries, p.chunks * p.entries, p.touched, p.tail, p.tail_at
    )  # fmt: skip
    return Call(reduce.finish, (-(-p.channels // block), sums), numbers, constants, p)


def _plan(shape: Shape, stride: Shape, dtype: torch.dtype, by_channel: bool) -> Plan:
    size = 1
    for extent in shape:
        size *= extent
    channels, inner = channel_layout(shape, stride) if by_channel else (1, size)
    return plan(size, channels, inner, dtype.itemsize)


def _numbers(p: Plan, rule: str, lower: float, upper: float) -> tuple[int, ...]:
    """The slope of the fixed rules, or scale and middle of the random ones, as bits of float64; then the shape."""
    if RULES[rule].law:
        lower, upper = (upper - lower) * 2.0**-32, (upper + lower) / 2
    bits = struct.unpack("2q", struct.pack("2d", lower, upper))
    return *bits, p.channels, p.inner, p.row, p.columns, p.vectors, p.tail, p.tail_at


def _constants(p: Plan, rule: str, weight: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "RULE": rule,
        "WEIGHT": _lookup(weight, p),
        "TAIL": p.tail > 0,
        "WIDE": p.wide,
        "FAR": p.far,
        "V": p.vector,
        "DEPTH": p.depth,
        "DOWN": p.lanes_down,
        "ACROSS": p.across,
        "COMPUTE": _triton_type(_compute(dtype)),
        "num_warps": 4,
        "enable_fp_fusion": False,  # contracted products would no longer equal eager's bit for bit
    }


def _lookup(length: int, p: Plan) -> str:
    return "" if not length else "one" if length == 1 else p.lookup


def _length(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.numel()


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _triton_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


# ---- where it runs ----


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make that the tensor's."""
    if tensor.device.type == "cpu":
        _require_a_driver_for_cpu_tensors()
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device_of(tensor)
    return guard


def _require_a_driver_for_cpu_tensors() -> None:
    """RuntimeError unless Triton's interpreter, or a driver that is none of Triton's own GPU ones, is active."""
    if not isinstance(rectify.forward, triton.JITFunction):
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
