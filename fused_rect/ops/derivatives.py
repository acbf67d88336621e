"""Derivatives of the ops beyond the first backward: forward mode, double backward and forward over backward.

With s the slope of each element (1 on the positive side), n its negative-side mask and z = input + bias, the first
backward is linear in grad:

    grad_input = s * grad,   grad_bias = sum(s * grad),   grad_weight = sum(n * z * grad)      (PReLU)

s depends on z by its sign alone, so the only second-order terms besides that linearity are PReLU's, whose slope is an
input. They are written in torch operations and the op itself, so every higher order follows from autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import add_bias, along_channels

Maybe = Tensor | None
Saved = tuple[Tensor, Maybe, Maybe, Maybe]
Rule = tuple[str, float, float]


def forward_jvp(
    saved_tensors: Saved, rule: Rule, input_t: Tensor | None, bias_t: Tensor | None, weight_t: Tensor | None
) -> Tensor:
    """Tangent of the output: s * (input_t + bias_t) + n * z * weight_t."""
    saved, bias, _, _ = saved_tensors
    tangent = _scale(_plus_channels(input_t, bias_t, saved), saved_tensors, rule)
    if weight_t is not None:
        tangent = tangent + (along_channels(weight_t, saved) * _negative_part(saved, bias)).to(tangent.dtype)
    return tangent


def double_backward(
    saved_tensors: Any, rule: Rule, need: tuple[bool, bool], cotangents: tuple[Maybe, ...], needs: tuple[bool, ...]
) -> list[Maybe]:
    """Gradients with respect to grad, saved, bias and weight of <cotangents, (grad_input, grad_bias, grad_weight)>."""
    grad, saved, bias, weight, seed = saved_tensors
    of_input, of_bias, of_weight = cotangents
    of_bias = of_bias if need[0] else None
    of_weight = of_weight if need[1] else None
    result: list[Maybe] = [None, None, None, None]
    outer = None if of_input is None and of_bias is None else _plus_channels(of_input, of_bias, saved)
    if needs[0]:
        terms = [] if outer is None else [_scale(outer, (saved, bias, weight, seed), rule)]
        if of_weight is not None:
            terms.append((along_channels(of_weight, saved) * _negative_part(saved, bias)).to(grad.dtype))
        result[0] = sum(terms[1:], terms[0]) if terms else None
    if rule[0] != "prelu":
        return result
    negative = ~(add_bias(saved, bias) > 0)
    if of_weight is not None and (needs[1] or needs[2]):
        of_z = along_channels(of_weight, saved) * grad * negative
        result[1] = of_z.to(saved.dtype) if needs[1] else None
        result[2] = _sum_to(of_z, bias) if needs[2] else None
    if outer is not None and needs[3]:
        result[3] = _sum_to(torch.where(negative, outer * grad, 0), weight)
    return result


def backward_jvp(
    saved_tensors: Any, rule: Rule, need: tuple[bool, bool], tangents: tuple[Maybe, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of (grad_input, grad_bias, grad_weight)."""
    grad, saved, bias, weight, seed = saved_tensors
    grad_t, saved_t, bias_t, weight_t = tangents
    of_input = _scale(torch.zeros_like(saved) if grad_t is None else grad_t, (saved, bias, weight, seed), rule)
    z = add_bias(saved, bias)
    negative = ~(z > 0)
    if weight_t is not None:
        of_input = of_input + (along_channels(weight_t, saved) * torch.where(negative, grad, 0)).to(saved.dtype)
    of_bias = of_weight = grad.new_empty(0)
    if need[0]:
        of_bias = _sum_to(of_input, torch.empty(saved.shape[1], device=saved.device) if bias is None else bias)
    if need[1]:
        of_z = grad.new_zeros(()) if saved_t is None and bias_t is None else _plus_channels(saved_t, bias_t, saved)
        of_weight = _sum_to(torch.where(negative, (0 if grad_t is None else grad_t * z) + grad * of_z, 0), weight)
    return of_input, of_bias, of_weight


def _scale(values: Tensor, saved_tensors: Saved, rule: Rule) -> Tensor:
    """s * values."""
    scaled: Tensor = torch.ops.fused_rect.rectify_backward.default(values, *saved_tensors, *rule, False, False)[0]
    return scaled


def _plus_channels(full: Tensor | None, channels: Tensor | None, like: Tensor) -> Tensor:
    """full + channels along dim 1, either of them optional, in the shape and dtype of ``like``."""
    if channels is None:
        return torch.zeros_like(like) if full is None else full
    spread = along_channels(channels, like).to(like.dtype)
    return spread.expand(like.shape) if full is None else full + spread


def _negative_part(saved: Tensor, bias: Tensor | None) -> Tensor:
    z = add_bias(saved, bias)
    return torch.where(z > 0, 0, z)


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    """``values`` summed over all dims but 1, or over all where ``like`` holds one value for every channel."""
    if like.numel() == 1 or values.dim() < 2:
        return values.sum().reshape(like.shape).to(like.dtype)
    return values.sum([d for d in range(values.dim()) if d != 1]).to(like.dtype)
