"""The kernels as compiler input, for any target and without a GPU: what static inspection and its tests compile.

    from fused_rect.kernels.variants import backward, forward
    variant = forward("prelu", torch.bfloat16, (32, 64, 56, 56), "channels_last")
    compiled = triton.compile(variant.source(), target=GPUTarget("cuda", 90, 32), options=variant.options)

The signature is the one Triton itself would specialize a launch on: 16-byte-aligned pointers, counts that are multiples
of 16, counts that are 1. TRITON_INTERPRET must not be set: it replaces the kernels by the interpreter's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from ..rules import RULES
from .launch import Call, backward_call, finish_call, forward_call
from .plan import Plan

_POINTER = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
# A typical rule of each kind; whether the bounds are negative decides what backward reads.
_BOUNDS = {"relu": (0.0, 0.0), "leaky_relu": (0.01, 0.01), "prelu": (0.0, 0.0), "rrelu": (1 / 8, 1 / 3)}
_DIVISOR_BOUNDS = (3.0, 8.0)


@dataclass(frozen=True)
class Specialization:
    """One kernel as `triton.compile` takes it."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    plan: Plan
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """The argument of `triton.compile`. RuntimeError under TRITON_INTERPRET."""
        if not isinstance(self.kernel, triton.JITFunction):
            raise RuntimeError("nothing to compile: TRITON_INTERPRET is set; unset it before fused_rect is imported")
        return ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)


def forward(
    rule: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    *,
    bias: bool = True,
    weight: int | None = None,
    bounds: tuple[float, float] | None = None,
) -> Specialization:
    """The forward kernel for a (N, C, ...) tensor; ``layout``: "contiguous" or "channels_last".

    ``bias``: whether there is one, of C elements; ``weight``: length of PReLU's (default C); ``bounds``: the rule's.
    """
    lengths = _lengths(rule, shape, bias, weight)
    call = forward_call(shape, _strides(shape, layout), dtype, rule, *_bounds(rule, bounds), *lengths)
    pointers = [dtype, dtype, dtype if bias else None, dtype if lengths[1] else None, _seed(rule)]
    return _variant(f"forward_{rule}", call, pointers)


def backward(
    rule: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    *,
    bias: bool = True,
    weight: int | None = None,
    bounds: tuple[float, float] | None = None,
    need_bias: bool = True,
    need_weight: bool | None = None,
) -> list[Specialization]:
    """The backward kernel and, where anything is summed, the finishing sum; arguments as `forward`."""
    lengths = _lengths(rule, shape, bias, weight)
    need_weight = rule == "prelu" if need_weight is None else need_weight
    lower, upper = _bounds(rule, bounds)
    call = backward_call(shape, _strides(shape, layout), dtype, rule, lower, upper, *lengths, need_bias, need_weight)
    p, sums = call.plan, need_bias + need_weight
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    partials, tails = (compute if sums else None), (compute if sums and p.tail else None)
    added = dtype if bias else None
    pointers = [dtype, dtype, dtype, added, dtype if lengths[1] else None, _seed(rule), partials, tails]
    variants = [_variant(f"backward_{rule}", call, pointers)]
    if sums:
        outputs = [dtype] * need_bias + [compute] * need_weight
        pointers = [partials, tails, outputs[0], outputs[1] if sums == 2 else None]
        variants.append(_variant("finish", finish_call(p, sums, compute), pointers))
    return variants


def _variant(name: str, call: Call, pointers: list[torch.dtype | None]) -> Specialization:
    """Types and attributes of each argument as Triton's launcher finds them, the pointers aligned."""
    names = call.kernel.arg_names
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (argument, value) in enumerate(zip(names, [*pointers, *call.numbers])):
        bits = argument in ("lower", "upper")
        if value is None or (value == 1 and not bits and argument != "tail_at"):
            signature[argument], constexprs[argument] = "constexpr", value
            continue
        if isinstance(value, torch.dtype):
            signature[argument] = _POINTER[value]
        else:
            signature[argument] = "i64" if bits or value >= 2**31 else "i32"
        if isinstance(value, torch.dtype) or (value % 16 == 0 and not bits and argument != "tail_at"):
            attrs[(place,)] = [["tt.divisibility", 16]]
    options = {key: call.constants[key] for key in ("num_warps", "enable_fp_fusion")}
    for argument in names[len(signature) :]:
        signature[argument], constexprs[argument] = "constexpr", call.constants[argument]
    return Specialization(name, call.kernel, call.grid, call.plan, signature, constexprs, attrs, options)


def _lengths(rule: str, shape: tuple[int, ...], bias: bool, weight: int | None) -> tuple[int, int]:
    channels = shape[1] if len(shape) > 1 else 1
    return channels if bias else 0, (channels if weight is None else weight) if rule == "prelu" else 0


def _bounds(rule: str, bounds: tuple[float, float] | None) -> tuple[float, float]:
    return bounds or _BOUNDS.get(rule, _DIVISOR_BOUNDS)


def _seed(rule: str) -> torch.dtype | None:
    return torch.int64 if RULES[rule].law else None


def _strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Strides of a dense tensor: dim 1 the fastest in channels_last."""
    order = list(range(len(shape)))
    if layout == "channels_last":
        order.append(order.pop(1))
    elif layout != "contiguous":
        raise ValueError(f"layout must be 'contiguous' or 'channels_last', got {layout!r}")
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)
