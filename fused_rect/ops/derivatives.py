"""Derivatives of the ops beyond the first backward: forward mode, double backward and forward over backward.

With s the slope of each element (1 on the positive side), n its negative-side mask and z = input + bias, the first
backward is linear in grad:

    grad_input = s * grad,   grad_bias = sum(s * grad),   grad_weight = sum(n * z * grad)      (PReLU)

s depends on z by its sign alone, so the only second-order terms besides that linearity are PReLU's, whose slope is an
input. They are written in torch operations and the op itself, so every higher order follows from autograd. What does
not depend on z or a parameter has a gradient of zeros there, as torch's own rectifiers say, and not none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import add_bias, along_channels, is_negative
from ..rules import Need, Parameters, Rule

Maybe = Tensor | None


class Kept(NamedTuple):
    """What forward kept, bits (uint8) or its input, with the parameters that belong to it."""

    kept: Tensor
    parameters: Parameters
    rule: Rule
    stride: Sequence[int] | None  # of the layout that bits follow

    @property
    def is_input(self) -> bool:
        return self.kept.dtype != torch.uint8

    def scaled(self, values: Tensor) -> Tensor:
        """s * values."""
        backward = torch.ops.fused_rect.rectify_backward.default
        scaled: Tensor = backward(values, self.kept, *self.parameters, *self.rule, None, False, self.stride)[0]
        return scaled

    def negative(self) -> Tensor:
        """n, where the input is kept."""
        return is_negative(self.z(), self.rule)

    def z(self) -> Tensor:
        return add_bias(self.kept, self.parameters.bias)

    def negative_part(self) -> Tensor:
        """n * z."""
        z = self.z()
        return torch.where(is_negative(z, self.rule), z, 0)


def forward_jvp(kept: Kept, like: Tensor, input_t: Maybe, bias_t: Maybe, weight_t: Maybe) -> Tensor:
    """Tangent of the output, of the shape, dtype and layout of ``like``: s * (input_t + bias_t) + n * z * weight_t."""
    tangent = kept.scaled(plus_channels(input_t, bias_t, like))
    if weight_t is not None:
        tangent = tangent + (along_channels(weight_t, like) * kept.negative_part()).to(tangent.dtype)
    return tangent


def double_backward(
    kept: Kept,
    grad: Tensor,
    need: Need,
    cotangents: tuple[Maybe, ...],
    needs: tuple[bool, ...],
) -> list[Maybe]:
    """Gradients with respect to grad, kept, bias and weight of <cotangents, (grad_input, grad_bias, grad_weight)>."""
    of_input, of_bias, of_weight = cotangents
    of_bias = None if need.bias is None else of_bias
    of_weight = of_weight if need.weight else None
    outer = None if of_input is None and of_bias is None else plus_channels(of_input, of_bias, grad)
    result: list[Maybe] = [None, None, None, None]
    if needs[0]:
        terms = [] if outer is None else [kept.scaled(outer)]
        if of_weight is not None:
            terms.append((along_channels(of_weight, grad) * kept.negative_part()).to(grad.dtype))
        result[0] = sum(terms[1:], terms[0]) if terms else torch.zeros_like(grad)
    if not kept.is_input:
        return result
    bias, weight, _ = kept.parameters
    negative = kept.negative()
    of_z = torch.zeros_like(grad) if of_weight is None else along_channels(of_weight, grad) * grad * negative
    result[1] = of_z.to(grad.dtype) if needs[1] else None
    result[2] = sum_to(of_z, bias) if needs[2] else None
    if needs[3]:
        result[3] = (
            torch.zeros_like(weight) if outer is None else sum_to(torch.where(negative, outer * grad, 0), weight)
        )
    return result


def backward_jvp(kept: Kept, grad: Tensor, need: Need, tangents: tuple[Maybe, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of (grad_input, grad_bias, grad_weight)."""
    grad_t, input_t, bias_t, weight_t = tangents
    of_input = kept.scaled(torch.zeros_like(grad) if grad_t is None else grad_t)
    if weight_t is not None:
        of_input = of_input + (along_channels(weight_t, grad) * torch.where(kept.negative(), grad, 0)).to(grad.dtype)
    of_bias = of_weight = grad.new_empty(0)
    if need.bias is not None:
        of_bias = sum_to(of_input, torch.empty(grad.shape[1], dtype=need.bias, device=grad.device))
    if need.weight:
        z, negative = kept.z(), kept.negative()
        of_z = grad.new_zeros(()) if input_t is None and bias_t is None else plus_channels(input_t, bias_t, grad)
        weight = kept.parameters.weight
        of_weight = sum_to(torch.where(negative, (0 if grad_t is None else grad_t * z) + grad * of_z, 0), weight)
    return of_input, of_bias, of_weight


def plus_channels(full: Maybe, channels: Maybe, like: Tensor) -> Tensor:
    """full + channels along dim 1, either of them optional, in the shape and dtype of ``like``."""
    if channels is None:
        return torch.zeros_like(like) if full is None else full
    spread = along_channels(channels, like).to(like.dtype)
    return spread.expand(like.shape) if full is None else full + spread


def sum_to(values: Tensor, like: Any) -> Tensor:
    """``values`` summed over all dims but 1, or over all where ``like`` holds one value for every channel."""
    if like.numel() == 1 or values.dim() < 2:
        return values.sum().reshape(like.shape).to(like.dtype)
    return values.sum([d for d in range(values.dim()) if d != 1]).to(like.dtype)
