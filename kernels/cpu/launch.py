"""Host side of the C++ kernels: from tensors to one packed call. Every microsecond here is paid by small tensors too.

Tensors arrive checked and dense, parameters without gaps (`fused_rect.ops`).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...rules import Need, Parameters, Rule
from . import build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# rectify.cpp's number of the rule, and whether the law draws divisors.
RULES = {"relu": (0, 0), "leaky_relu": (1, 0), "prelu": (2, 0), "rrelu": (3, 0), "rrelu_divisor": (3, 1)}
# struct Call of call.h: packing bytes takes 0.5 us where ctypes takes 3 us to convert 20 arguments.
_pack = struct.Struct("8P4q2d6i").pack


@functools.cache
def _kernel() -> Callable[[bytes], None]:
    function = build.library().fused_rect
    function.argtypes, function.restype = [ctypes.c_char_p], None
    return function


def direct() -> Any:
    """The ops of direct.cpp, or None where they could not be built."""
    try:
        library = build.library(build.DIRECT)
        kernels = build.library()
    except build.BuildError:
        return None
    library.fused_rect_direct(ctypes.cast(kernels.fused_rect, ctypes.c_void_p))
    ops = torch.ops.fused_rect_direct
    def without(op: Any) -> Any:
        def call(input: Any, bias: Any, weight: Any, seed: Any, rule: Any, lower: Any, upper: Any, added: Any) -> Any:
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, bias, weight)):
                return None
            return op(input, None if added else bias, weight, seed, rule, lower, upper)

        return call

    return SimpleNamespace(rectify=without(ops.rectify.default), rectify_=without(ops.rectify_.default))


def forward(x: Tensor, parameters: Parameters, rule: Rule, out: Tensor, bits: Tensor | None) -> None:
    """out = rectify(x + bias), and which elements are negative into ``bits``; ``out`` may be ``x``."""
    if bits is not None:
        bits.copy_(reference.pack_bits(reference.is_negative(reference.add_bias(x, parameters.bias), rule)))
    _run(x, None, out, *parameters, None, None, *rule, parameters.bias is not None)


def backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, grad_input: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned.

    kept: forward's bits (uint8), or its input.
    """
    if kept.dtype == torch.uint8:
        negative = reference.unpack_bits(kept, grad)
        kept = torch.where(negative, grad.new_full((), -1), grad.new_full((), 1))
    grad_bias = grad_weight = None
    if need.bias is not None:
        grad_bias = grad.new_empty(grad.shape[1] if grad.dim() > 1 else 1, dtype=need.bias)
    if need.weight:
        grad_weight = torch.empty_like(parameters.weight)
    _run(kept, grad, grad_input, *parameters, grad_bias, grad_weight, *rule, need.bias is not None)
    return grad_bias, grad_weight


def _run(
    value: Tensor,
    grad: Tensor | None,
    out: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    grad_bias: Tensor | None,
    grad_weight: Tensor | None,
    rule: str,
    lower: float,
    upper: float,
    channelled: bool,
) -> None:
    size, weights = value.numel(), 0
    bias_type = weight_type = dtype = TYPES[value.dtype]
    if bias is not None:
        channelled, bias_type = True, TYPES[bias.dtype]
    elif grad_bias is not None:
        bias_type = TYPES[grad_bias.dtype]
    if weight is not None:
        weights, weight_type = weight.numel(), TYPES[weight.dtype]
    if (channelled or weights > 1) and value.dim() > 1:
        channels, inner = value.shape[1], value.stride(1)
    else:
        channels, inner = 1, size
    number, divisor = RULES[rule]
    _kernel()(
        _pack(
            value.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if seed is None else seed.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
            0 if grad_weight is None else grad_weight.data_ptr(),
            size, channels, inner, weights, lower, upper,
            dtype, bias_type, weight_type, number, divisor, torch.get_num_threads(),
        )
    )  # fmt: skip
