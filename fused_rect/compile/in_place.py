"""`rectify_backward` in place, on a gradient that nobody else reads: one tensor less, as in Inductor's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, ops
from ..ops.checks import check_kept, dense, laid_out_as, one_after_the_other
from ..rules import Need, Parameters, Rule

_lib = torch.library.Library("fused_rect", "FRAGMENT")
_lib.define(
    "rectify_backward_(Tensor(a!) grad, Tensor kept, Tensor? bias, Tensor? weight, Tensor? seed, str rule, float lower,"
    " float upper, ScalarType? bias_dtype, bool need_weight, SymInt[]? stride=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
rectify_backward_ = torch.ops.fused_rect.rectify_backward_.default


@ops.packed(leading=2)
def _run(
    grad: Tensor,
    kept: Tensor,
    parameters: Parameters,
    rule: Rule,
    bias_dtype: torch.dtype | None,
    need_weight: bool,
    stride: ops.Stride = None,
) -> tuple[Tensor, Tensor]:
    check_kept(grad, kept, parameters, rule)
    given = grad if stride is None else laid_out_as(grad, stride)
    if kept.dtype != torch.uint8:
        kept = dense(kept, stride)
        given = laid_out_as(grad, kept.stride())
    bias, weight, seed = parameters
    if not grad.numel():
        return _sums(grad, weight, bias_dtype, need_weight, torch.zeros)
    dense_parameters = Parameters(one_after_the_other(bias), one_after_the_other(weight), seed)
    sums = backends.resolve(grad.device.type).backward(
        given, kept, dense_parameters, rule, given, Need(bias_dtype, need_weight)
    )
    if given is not grad:
        grad.copy_(given)
    of_bias, of_weight = (grad.new_empty(0) if s is None else s for s in sums)
    return of_bias, of_weight


@ops.packed(leading=2)
def _fake(
    grad: Tensor,
    kept: Tensor,
    parameters: Parameters,
    rule: Rule,
    bias_dtype: torch.dtype | None,
    need_weight: bool,
    stride: ops.Stride = None,
) -> tuple[Tensor, Tensor]:
    return _sums(grad, parameters.weight, bias_dtype, need_weight, torch.empty)


def _sums(
    grad: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None, need_weight: bool, new: Any
) -> tuple[Tensor, Tensor]:
    channels = grad.shape[1] if grad.dim() > 1 else 1
    of_bias = grad.new_empty(0) if bias_dtype is None else new((channels,), dtype=bias_dtype, device=grad.device)
    if weight is None or not need_weight:
        return of_bias, grad.new_empty(0)
    return of_bias, new(weight.shape, dtype=weight.dtype, device=grad.device)


_lib.impl("rectify_backward_", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rect::rectify_backward_", _fake, lib=_lib)
