"""Rectifiers of compiled graphs in torch's operations, which Inductor fuses with whatever stands around them.

What is kept for backward is what the op keeps: bits, or what the convolution wrote, whose bias is added again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import internals
from ..reference import add_bias, along_channels, computed_in
from ..rules import Need, Parameters, Rule

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def forward(z: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
    """PReLU."""
    assert weight is not None
    y = add_bias(z, bias)
    return torch.where(y > 0, y, y * along_channels(weight, y)).to(z.dtype)


def backward(
    grad: Tensor,
    kept: Tensor,
    parameters: Parameters,
    rule: Rule,
    need: Need,
    stride: Sequence[Any] | None,
    along: bool,
) -> Gradients:
    """The gradients of input, bias and weight.

    stride: of the memory that bits count through. along: what ``grad`` is made of lies in memory as it does.
    """
    if kept.dtype == torch.uint8:
        assert stride is not None
        return _from_bits(grad, kept, rule, need, stride)
    return _from_input(grad, kept, parameters, need, along)


def _from_bits(grad: Tensor, bits: Tensor, rule: Rule, need: Need, stride: Sequence[Any]) -> Gradients:
    """ReLU and Leaky ReLU."""
    negative = unpacked(bits, grad, stride)
    own = torch.where(negative, 0.0 if rule.slope == "zero" else grad * rule.lower, grad)
    if need.bias is None:
        return own, None, None
    own = _written(own, stride)
    return own, _per_channel(own).to(need.bias), None


def _from_input(grad: Tensor, z: Tensor, parameters: Parameters, need: Need, along: bool) -> Gradients:
    """PReLU. A single slope's gradient is summed along with the bias's, channel by channel, in one pass.

    But not of a gradient that is gathered from elsewhere: Inductor would sum it in passes of its own.
    """
    bias, weight, _ = parameters
    assert weight is not None
    y, g = add_bias(z, bias), grad.to(computed_in(grad.dtype))
    positive = y > 0
    own = torch.where(positive, g, g * along_channels(weight, y)).to(grad.dtype)
    of_weight = None
    if need.weight:
        of_weight = torch.where(positive, 0.0, g * y)
        of_weight = _per_channel(of_weight) if along or weight.numel() > 1 else of_weight
        of_weight = (of_weight if weight.numel() > 1 else of_weight.sum()).view(weight.shape).to(weight.dtype)
    if need.bias is None:
        return own, None, of_weight
    own = _written(own, z.stride())
    return own, _per_channel(own).to(need.bias), of_weight


def _written(own: Tensor, stride: Sequence[Any]) -> Tensor:
    """A gradient that the map's backward reads from memory anyway, in memory before it is summed.

    Inductor plans a sum of what it has not written yet by the strides of all that it is made of. Those of bits are no
    element's, those of a gradient that is gathered are another's: it would sum in passes of its own.
    """
    return internals.in_memory(own, stride)


def unpacked(bits: Tensor, like: Tensor, stride: Sequence[Any]) -> Tensor:
    """Bits as booleans of the shape of ``like``, whose memory they count through as if it lay by ``stride``."""
    sides = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1) != 0
    order = sorted(range(like.dim()), key=lambda dim: stride[dim], reverse=True)  # outermost in memory first
    lying = sides.view(-1)[: like.numel()].view([like.shape[dim] for dim in order])
    return lying.permute([order.index(dim) for dim in range(like.dim())])


def _per_channel(t: Tensor) -> Tensor:
    return t.to(computed_in(t.dtype)).sum([dim for dim in range(t.dim()) if dim != 1])
