"""`rectify_backward` in place, on a gradient that nobody else reads: one tensor less, as in Inductor's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..rules import Need, Parameters, Rule

_lib = torch.library.Library("fused_rect", "FRAGMENT")
_lib.define(
    "rectify_backward_(Tensor(a!) grad, Tensor kept, Tensor? bias, Tensor? weight, Tensor? seed, str rule, float lower,"
    " float upper, ScalarType? bias_dtype, bool need_weight, SymInt[]? stride=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
rectify_backward_ = torch.ops.fused_rect.rectify_backward_.default


@ops.packed(leading=2, backward=True)
def _run(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, need: Need, stride: ops.Stride = None
) -> tuple[Tensor, Tensor]:
    given, kept = ops.laid_out(grad, kept, parameters, rule, stride)
    _, *sums = ops.backward_into(given, given, kept, parameters, rule, need)
    if given is not grad:
        grad.copy_(given)
    return sums[0], sums[1]


@ops.packed(leading=2, backward=True)
def _fake(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, need: Need, stride: ops.Stride = None
) -> tuple[Tensor, Tensor]:
    return ops.gradients(grad, parameters.weight, need, torch.empty)[1:]


_lib.impl("rectify_backward_", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rect::rectify_backward_", _fake, lib=_lib)
