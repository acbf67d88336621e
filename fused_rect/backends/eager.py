"""The eager backend: ATen operations, for devices without a kernel of ours and CPUs without a compiler.

The same two functions as `fused_rect.kernels.launch`, the same kept tensors, the same random slopes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..rules import Need, Norm, Parameters, Rule


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
    z = _pre_activation(x, parameters.bias, out) if norm is None else reference.normalize(x, norm, parameters.bias)
    if bits is not None:
        bits.copy_(reference.pack_bits(reference.is_negative(z, rule)))
    if rule.slope == "zero":
        z.relu_()
    elif rule.slope == "constant":
        F.leaky_relu_(z, rule.constants[0])
    else:
        z.copy_(torch.where(reference.is_negative(z, rule), z * reference.slope(z, parameters, rule), z))
    if z is not out:
        out.copy_(z)


def backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, grad_input: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned.

    kept: forward's bits (uint8), or its input.
    """
    g = grad.to(reference.computed_in(grad.dtype))
    grad_weight = None
    if kept.dtype == torch.uint8:
        negative = reference.unpack_bits(kept, grad)
    else:
        z = reference.add_bias(kept, parameters.bias)
        negative = reference.is_negative(z, rule)
        if need.weight:
            weight = parameters.weight
            # masked_fill, not a product with the mask: 0 * inf would put NaN into the sum.
            grad_weight = _sum_like(torch.mul(g, z).masked_fill_(~negative, 0), weight.numel()).to(weight.dtype)
            grad_weight = grad_weight.view(weight.shape)
    if rule.slope == "zero":
        g = g.masked_fill(negative, 0)
    else:
        g = torch.where(negative, g * reference.slope(g, parameters, rule), g)
    grad_input.copy_(g)
    # The sum is that of the products before their rounding.
    grad_bias = None if need.bias is None else _sum_like(g, g.shape[1] if g.dim() > 1 else 1).to(need.bias)
    return grad_bias, grad_weight


def _pre_activation(x: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x + bias, in ``out`` itself unless its dtype would round the sum before the rectifier."""
    if out.dtype != reference.computed_in(out.dtype):
        return reference.add_bias(x, bias)
    if bias is not None:
        return torch.add(x, reference.along_channels(bias, x), out=out)
    return out if out is x else out.copy_(x)


def _sum_like(values: Tensor, channels: int) -> Tensor:
    """The sum over everything but dim 1 (``channels`` of them), or over everything where ``channels`` is 1."""
    if channels == 1 or values.dim() < 2:
        return values.sum().view(1)
    return values.sum([d for d in range(values.dim()) if d != 1])
