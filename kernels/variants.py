"""The kernels as compiler input, for any target and without a GPU: what static inspection and its tests compile.

    from fused_rect.kernels.variants import training_step
    forward, backward, finish = training_step(rules.PRELU, torch.bfloat16, (32, 64, 56, 56), "channels_last")
    compiled = triton.compile(forward.source(), target=GPUTarget("cuda", 90, 32), options=forward.options)

The signature is the one Triton itself would specialize a launch on: 16-byte-aligned pointers, counts that are multiples
of 16, counts that are 1. TRITON_INTERPRET must not be set: it replaces the kernels by the interpreter's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from ..reference import computed_in
from ..rules import Need, Rule
from .launch import Call, finish_call, outputs, rectify_call
from .plan import Plan
from .rectify import rectify

_POINTER = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


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
        """The argument of `triton.compile`."""
        return ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)


def training_step(
    rule: Rule, dtype: torch.dtype, shape: tuple[int, ...], layout: str = "contiguous"
) -> list[Specialization]:
    """Forward, backward with all its sums, and the finishing sum, for a (N, C, ...) tensor, a bias and C slopes.

    ``layout``: "contiguous" or "channels_last". RuntimeError under TRITON_INTERPRET.
    """
    if not isinstance(rectify, triton.JITFunction):
        raise RuntimeError("nothing to compile: TRITON_INTERPRET is set; unset it before fused_rect is imported")
    bits, weights, need = not rule.keeps_input, shape[1] if rule.learned else 0, Need(dtype, rule.learned)
    compute, summed = computed_in(dtype), outputs(dtype, need)
    given: dict[str, torch.dtype | None] = {
        "out": dtype,
        "bits": torch.uint8 if bits else None,
        "weight": dtype if weights else None,
        "seed": torch.int64 if rule.random else None,
        **dict.fromkeys(("mean", "var", "norm_weight")),
    }
    read = None if bits else dtype  # by backward, to make z again
    forward = {**given, "x": dtype, "grad": None, "bias": dtype, "partials": None}
    backward = {**given, "x": read, "grad": dtype, "bias": read, "partials": compute}
    finish = {"partials": compute, "first": summed[0], "second": summed[1] if len(summed) == 2 else None}
    like = shape, _strides(shape, layout), dtype
    call = rectify_call(*like, rule, not bits, weights, need)
    return [
        _variant("forward", rectify_call(*like, rule, True, weights, Need()), forward),
        _variant("backward", call, backward),
        _variant("finish", finish_call(call.plan, len(summed), compute), finish),
    ]


def _variant(name: str, call: Call, pointers: dict[str, torch.dtype | None]) -> Specialization:
    """Types and attributes of each argument as Triton's launcher finds them, the pointers aligned."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(call.kernel.params):
        argument, aligned = parameter.name, not parameter.do_not_specialize_on_alignment
        if parameter.is_constexpr:
            signature[argument], constexprs[argument] = "constexpr", call.constants[argument]
            continue
        value = pointers[argument] if argument in pointers else call.numbers[argument]
        specialized = not parameter.do_not_specialize
        if value is None or (value == 1 and specialized):
            signature[argument], constexprs[argument] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[argument] = _POINTER[value]
            if aligned:
                attrs[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = parameter.annotation_type or ("i64" if value >= 2**31 else "i32")
            if specialized and value % 16 == 0:
                attrs[(place,)] = [["tt.divisibility", 16]]
    return Specialization(name, call.kernel, call.grid, call.plan, signature, constexprs, attrs, call.options)


def _strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Strides of a dense tensor: dim 1 the fastest in channels_last."""
    if layout == "contiguous":
        return torch.empty(shape, device="meta").stride()
    if layout != "channels_last":
        raise ValueError(f"layout must be 'contiguous' or 'channels_last', got {layout!r}")
    return torch.empty((shape[0], *shape[2:], shape[1]), device="meta").movedim(-1, 1).stride()
