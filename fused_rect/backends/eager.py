"""The eager backend: ATen operations in place, for devices without a kernel of ours and CPUs without a compiler.

The same two functions as `fused_rect.kernels.launch`, the same saved tensors, the same random slopes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..rules import saves_output


def forward(
    input: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    op: str,
    lower: float,
    upper: float,
    out: Tensor,
) -> None:
    """out = rectify(input + bias); ``out`` may be ``input``."""
    z = _pre_activation(input, bias, out)
    if op == "relu":
        z.relu_()
    elif op == "leaky_relu":
        F.leaky_relu_(z, lower)
    elif op == "prelu":
        assert weight is not None
        z.copy_(torch.where(z > 0, z, z * reference.along_channels(weight, z)))
    else:
        z.mul_(_positive_to_one(z <= 0, _slopes(seed, z, op, lower, upper)))
    if z is not out:
        out.copy_(z)


def backward(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    op: str,
    lower: float,
    upper: float,
    grad_input: Tensor,
    need_bias: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input is written (it may be ``grad``); the gradients of bias and weight are returned."""
    if op == "relu" or (op == "leaky_relu" and lower >= 0):
        return _from_output(grad, saved, op, lower, grad_input, bias, need_bias)
    z = saved if saves_output(op, lower) else reference.add_bias(saved, bias)
    g = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
    grad_weight = None
    if need_weight:
        assert weight is not None
        # masked_fill, not a product with the mask: 0 * inf would put NaN into the sum.
        grad_weight = _sum_like(torch.mul(g, z).masked_fill_(z > 0, 0), weight.numel()).to(weight.dtype)
        grad_weight = grad_weight.view(weight.shape)
    if op == "leaky_relu":
        g = torch.where(z > 0, g, g * lower)
    elif op == "prelu":
        assert weight is not None
        g = torch.where(z > 0, g, g * reference.along_channels(weight, z))
    else:
        g = g * _positive_to_one(z <= 0, _slopes(seed, z, op, lower, upper))
    grad_input.copy_(g)
    return _bias_gradient(g, grad, bias) if need_bias else None, grad_weight


def _from_output(
    grad: Tensor, out: Tensor, op: str, slope: float, grad_input: Tensor, bias: Tensor | None, need_bias: bool
) -> tuple[Tensor | None, None]:
    """One pass of ATen's own kernel, where masks and products would take three."""
    g = grad_input
    narrow = grad.dtype not in (torch.float32, torch.float64)
    if need_bias and narrow and op != "relu":
        # The bias sums the products before their rounding, so before grad_input, which may be grad, is written.
        g = torch.where(out > 0, grad.float(), grad.float() * slope)
    if op == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad_input)
    else:
        torch.ops.aten.leaky_relu_backward.grad_input(grad, out, slope, True, grad_input=grad_input)
    if not need_bias:
        return None, None
    return _bias_gradient(g.float() if narrow else g, grad, bias), None


def _bias_gradient(g: Tensor, grad: Tensor, bias: Tensor | None) -> Tensor:
    return _sum_like(g, g.shape[1] if g.dim() > 1 else 1).to(grad.dtype if bias is None else bias.dtype)


def _pre_activation(input: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """input + bias, in ``out`` itself unless its dtype would round the sum before the rectifier."""
    if out.dtype not in (torch.float32, torch.float64):
        return reference.add_bias(input, bias)
    if bias is not None:
        return torch.add(input, reference.along_channels(bias, input), out=out)
    return out if out is input else out.copy_(input)


def _slopes(seed: Tensor | None, like: Tensor, op: str, lower: float, upper: float) -> Tensor:
    assert seed is not None
    return reference.slopes(seed, like, lower, upper, "divisor" if op == "rrelu_divisor" else "slope")


def _positive_to_one(negative: Tensor, slopes: Tensor) -> Tensor:
    return slopes.masked_fill_(~negative, 1)


def _sum_like(values: Tensor, channels: int) -> Tensor:
    """The sum over everything but dim 1 (``channels`` of them), or over everything where ``channels`` is 1."""
    if channels == 1 or values.dim() < 2:
        return values.sum().view(1)
    return values.sum([d for d in range(values.dim()) if d != 1])
