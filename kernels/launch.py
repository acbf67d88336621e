"""Host side of the Triton kernels: from tensors to a plan to a launch.

Tensors arrive checked and dense (`fused_rect.ops`). Nothing here asks for a CUDA tensor: CPU tensors go to whatever
Triton driver or interpreter is active.
"""

from __future__ import annotations

import struct
from typing import Any

import torch

import triton.language as tl
from torch import Tensor

from . import rectify, reduce
from .plan import Plan, channel_layout, plan

FINISH_BLOCK = 1024


def forward(
    input: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    rule: str,
    lower: float,
    upper: float,
    out: Tensor,
) -> None:
    """out = rectify(input + bias); ``out`` may be ``input``."""
    p = _plan(input, bias, weight, False)
    with _on(input):
        rectify.forward[(p.programs,)](
            input, out, bias, weight, seed, *_scalars(rule, lower, upper), *_shape(p),
            BIAS=_lookup(bias, p), **_options(p, rule, weight, input.dtype),
        )  # fmt: skip


def backward(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    rule: str,
    lower: float,
    upper: float,
    grad_input: Tensor,
    need_bias: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned."""
    p = _plan(saved, bias, weight, need_bias)
    compute = torch.float64 if saved.dtype == torch.float64 else torch.float32
    sums = need_bias + need_weight
    partials = saved.new_empty((sums, p.chunks, p.entries), dtype=compute) if sums else None
    tails = saved.new_empty((sums, p.vector), dtype=compute) if p.tail and sums else None
    added = None if _sign_of_output_decides(rule, lower) else bias
    grad_bias = saved.new_empty((p.channels,), dtype=grad.dtype if bias is None else bias.dtype) if need_bias else None
    grad_weight = saved.new_empty((p.channels,), dtype=compute) if need_weight else None
    with _on(saved):
        rectify.backward[(p.programs,)](
            grad, saved, grad_input, added, weight, seed, partials, tails, *_scalars(rule, lower, upper),
            *_shape(p), p.entries, p.chunks * p.entries,
            BIAS=_lookup(added, p), SUM_BIAS=need_bias, SUM_WEIGHT=need_weight, LOOKUP=p.lookup, SEGMENT=p.segment,
            **_options(p, rule, weight, saved.dtype),
        )  # fmt: skip
        if sums:
            first, second = (grad_bias, grad_weight) if need_bias else (grad_weight, None)
            _finish(partials, tails, first, second, p)
    return grad_bias, None if grad_weight is None else _as_weight(grad_weight, weight)


def _finish(partials: Tensor, tails: Tensor | None, first: Tensor, second: Tensor | None, p: Plan) -> None:
    unit = p.segment * p.vector or 1
    segments = -(-p.inner // unit) + 1
    small = p.chunks * p.copies * segments <= 2048
    reduce.finish[(p.channels, partials.shape[0])](
        partials, tails, first, second, p.channels, p.inner, p.copies, p.chunks, p.entries, p.chunks * p.entries, segments,
        p.vectors * p.vector, p.tail,
        UNIT=unit, STEP=2 if p.segment else 1, TAIL=tails is not None, V=p.vector, BLOCK=128 if small else FINISH_BLOCK, WIDE=p.wide, SUMS=partials.shape[0],
        COMPUTE=tl.float64 if partials.dtype == torch.float64 else tl.float32, num_warps=1 if small else 4, enable_fp_fusion=False,
    )  # fmt: skip


def _as_weight(per_channel: Tensor, weight: Tensor | None) -> Tensor:
    assert weight is not None
    total = per_channel if weight.numel() == per_channel.numel() else per_channel.sum()
    return total.to(weight.dtype).view(weight.shape)


def _sign_of_output_decides(rule: str, lower: float) -> bool:
    return rule in ("relu", "rrelu_divisor") or (rule != "prelu" and lower >= 0)


def _plan(input: Tensor, bias: Tensor | None, weight: Tensor | None, need_bias: bool) -> Plan:
    channels, inner = 1, input.numel()
    if bias is not None or need_bias or (weight is not None and weight.numel() > 1):
        channels, inner = channel_layout(input.shape, input.stride())
    return plan(input.numel(), channels, inner, input.element_size())


def _scalars(rule: str, lower: float, upper: float) -> tuple[int, int]:
    """(scale, middle) of the random rules, the slope of the others, each as the bits of a float64."""
    if rule in ("rrelu", "rrelu_divisor"):
        lower, upper = (upper - lower) * 2.0**-32, (upper + lower) / 2
    return struct.unpack("2q", struct.pack("2d", lower, upper))


def _shape(p: Plan) -> tuple[int, ...]:
    return p.channels, p.inner, p.row, p.columns, p.vectors, p.tail, p.vectors % p.row * p.vector


def _lookup(parameter: Tensor | None, p: Plan) -> str:
    if parameter is None:
        return ""
    return "one" if parameter.numel() == 1 else p.lookup


def _options(p: Plan, rule: str, weight: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "RULE": rule,
        "WEIGHT": _lookup(weight, p),
        "TAIL": p.tail > 0,
        "WIDE": p.wide,
        "V": p.vector,
        "DEPTH": p.depth,
        "DOWN": p.lanes_down,
        "ACROSS": p.across,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else _NOTHING


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()
__all__ = ["backward", "forward"]
