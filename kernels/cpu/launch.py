"""Host side of the C++ kernels: from tensors to one packed call. Every microsecond here is paid by small tensors too.

Tensors arrive checked and dense, parameters without gaps (`fused_rect.ops`).
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...rules import Need, Norm, Parameters, Rule, numbers
from . import build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _fields() -> dict[str, str]:
    """Name -> format of each field of call.h's struct Call, in order."""
    formats = {"int64_t": "q", "double": "d", "int": "i"}
    declarations = re.search(r"struct Call \{(.*?)\n\};", build.HEADER.read_text(), re.S)
    assert declarations is not None
    found = {}
    for kind, names in re.findall(r"^  (?:const )?(\w+) ([^;]+);", declarations[1], re.M):
        for name in names.split(", "):
            found[name.lstrip("*")] = "P" if name.startswith("*") else formats[kind]
    return found


FIELDS = _fields()
# Packing bytes takes 0.5 us where ctypes takes 3 us to convert as many arguments.
_named = functools.partial(namedtuple, "Call")
_call: Any = _named(FIELDS, defaults=[0] * len(FIELDS))
_pack = struct.Struct("".join(FIELDS.values())).pack


@functools.cache
def _kernel() -> Callable[[bytes], int]:
    function = build.library().fused_rect
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return function


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
    _run(x, x, None, out, bits, parameters, rule, None, None, norm)


def backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, grad_input: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned.

    kept: forward's bits (uint8), or its input.
    """
    value, bits = (None, kept) if kept.dtype == torch.uint8 else (kept, None)
    grad_bias = grad_weight = None
    if need.bias is not None:
        grad_bias = grad.new_empty(grad.shape[1] if grad.dim() > 1 else 1, dtype=need.bias)
    if need.weight:
        grad_weight = torch.empty_like(parameters.weight)
    _run(grad, value, grad, grad_input, bits, parameters, rule, grad_bias, grad_weight)
    return grad_bias, grad_weight


def _run(
    like: Tensor,
    value: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
    bits: Tensor | None,
    parameters: Parameters,
    rule: Rule,
    grad_bias: Tensor | None,
    grad_weight: Tensor | None,
    norm: Norm | None = None,
) -> None:
    bias, weight, seed = parameters
    weights = 0 if weight is None else weight.numel()
    mean, var, norm_weight, eps = norm or (None, None, None, 0.0)
    channels, inner = 1, like.numel()
    if (bias is not None or grad_bias is not None or weights > 1 or norm is not None) and like.dim() > 1:
        channels, inner = like.shape[1], like.stride(1)
    slope, first, second = numbers(rule)
    call = _call(
        value=_pointer(value), grad=_pointer(grad), out=out.data_ptr(), bits=_pointer(bits),
        bias=_pointer(bias), weight=_pointer(weight), seed=_pointer(seed),
        mean=_pointer(mean), var=_pointer(var), norm_weight=_pointer(norm_weight), eps=eps,
        bias_sum=_pointer(grad_bias), weight_sum=_pointer(grad_weight),
        n=like.numel(), channels=channels, inner=inner, weights=weights, first=first, second=second,
        type=TYPES[like.dtype], bias_type=_type(bias), weight_type=_type(weight), bias_sum_type=_type(grad_bias),
        mean_type=_type(mean), var_type=_type(var), norm_weight_type=_type(norm_weight),
        slope=slope, threads=torch.get_num_threads(),
    )  # fmt: skip
    if _kernel()(_pack(*call)):
        raise MemoryError(f"no memory for the sums of a rectifier on a tensor of shape {tuple(like.shape)}")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else TYPES[tensor.dtype]
