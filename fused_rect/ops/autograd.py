"""The ops at the dispatcher's Autograd key: Functions whose forward re-enters the op below autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import internals, ops
from ..internals import SingleLevelFunction, transforms_active
from ..rules import Need, Parameters, Rule
from .checks import check, check_in_place, dense_stride
from .derivatives import Kept, backward_jvp, double_backward, forward_jvp, plus_channels, sum_to

Maybe = Tensor | None


class Layout(NamedTuple):
    """Of a dense tensor that is not kept."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def new(self, like: Tensor) -> Tensor:
        return like.new_empty_strided(self.shape, self.stride, dtype=self.dtype)


def _no_derivative_wanted(*tensors: Maybe) -> bool:
    """Neither reverse mode, nor forward mode, nor a functorch transform will ask for derivatives of this call."""
    if internals.forward_ad_active() or transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def _keeps_input(input: Tensor, rule: Rule) -> bool:
    """Bits follow a tensor's own memory: an example of a vmap and a tensor made of others have none to follow."""
    return rule.keeps_input or transforms_active() or internals.is_wrapper(input)


def _below(op: Any, *args: Any) -> Any:
    if not transforms_active():
        return ops.below_autograd(op, *args)
    # Outer functorch levels must see a differentiable call: without these, grad(grad(f)) is silently wrong.
    with torch.enable_grad(), internals.forward_ad_enabled(True), internals.below_autograd():
        return op(*args)


def _apply(function: Any, *args: Any) -> Any:
    if not transforms_active():
        return function.apply(*args)
    with internals.single_level():
        return function.apply(*args)


class _Rectify(SingleLevelFunction):
    """Outputs: the rectified input, the bits (empty where the input is kept), and z for second derivatives.

    z joins a second derivative to this node, by which it reaches ``input`` and ``bias``. Beside bits it is empty, and
    brings the zeros that torch's own rectifiers give where only the side depends on z. Where the input is kept and
    holds the bias, it is that input: its gradient is the bias's too.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, rule: Rule, bias_added: bool, in_place: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = input, *ops.flat(Parameters(bias, weight, seed), rule), bias_added
        ctx.layout = Layout(input.shape, dense_stride(input), input.dtype)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.rule, ctx.in_place = rule, in_place
        ctx.bias_added = bias_added and bias is not None
        ctx.set_materialize_grads(False)
        saved: tuple[Maybe, ...]
        if _keeps_input(input, rule):
            out = _below(ops.rectify, *arguments)
            bits = input.new_empty(0, dtype=torch.uint8)
            if ctx.bias_added:
                z = torch.ops.aten._unsafe_view(input, input.shape)
                saved = (z, None, weight, seed, None)
            else:
                z = input.new_empty(0)
                saved = (input, bias, weight, seed, None)
        else:
            z = input.new_empty(0)
            if in_place:
                out, bits = input, _below(ops.rectify_bits_, *arguments, ctx.layout.stride)
                ctx.mark_dirty(input)
            else:
                out, bits = _below(ops.rectify_bits, *arguments, ctx.layout.stride)
            saved = (bits, None, None, seed, z)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.mark_non_differentiable(bits)
        return out, bits, z

    @staticmethod
    def backward(ctx: Any, grad: Maybe, _: None, of_z: Maybe) -> tuple[Maybe, ...]:
        kept, bias, weight, seed, anchor = ctx.saved_tensors
        need_input, need_bias, need_weight = ctx.needs_input_grad[:3]
        if grad is None:
            grad = ctx.layout.new(kept).zero_()
        bias_dtype = ctx.bias[1] if need_bias else None
        parameters = ops.flat(Parameters(bias, weight, seed), ctx.rule)
        stride = ctx.layout.stride if kept.dtype == torch.uint8 else None
        # A trip through the dispatcher would end in the same function, 10 us later.
        backward = ops.rectify_backward if ops.somebody_listens() else _rectify_backward
        gradients = backward(grad, kept, *parameters, bias_dtype, need_weight, stride)
        if anchor is not None and torch.is_grad_enabled() and anchor.requires_grad:
            gradients = _apply(_Anchored, anchor, *gradients)
        of_input, of_bias, of_weight = gradients
        if of_z is not None and of_z.numel():
            of_input = of_input + of_z
            of_bias = of_bias + sum_to(of_z, of_bias) if need_bias else None
        wanted = zip((of_input, of_bias, of_weight), (need_input, need_bias, need_weight))
        return (*(g if needed else None for g, needed in wanted), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, input_t: Maybe, bias_t: Maybe, weight_t: Maybe, *_: None) -> tuple[Maybe, ...]:
        kept, bias, weight, seed, _ = ctx.saved_tensors
        stride = None if kept.dtype != torch.uint8 else ctx.layout.stride
        saved = Kept(kept, Parameters(bias, weight, seed), ctx.rule, stride)
        like = kept if saved.is_input else ctx.layout.new(kept)
        tangent = forward_jvp(saved, like, input_t, bias_t, weight_t)
        if ctx.in_place and input_t is not None:
            tangent = input_t.copy_(tangent)
        if saved.is_input and ctx.bias_added:
            return tangent, None, plus_channels(input_t, bias_t, like)
        return tangent, None, tangent.new_zeros(0)


class _Anchored(SingleLevelFunction):
    """Gradients as they are, joined to the anchor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(anchor)
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Maybe) -> tuple[Maybe, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), *gradients

    @staticmethod
    def jvp(ctx: Any, _: Maybe, *tangents: Maybe) -> tuple[Maybe, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tangents)


class _RectifyBackward(SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        kept: Tensor,
        bias: Maybe,
        weight: Maybe,
        seed: Maybe,
        rule: Rule,
        need: Need,
        stride: ops.Stride,
    ) -> ops.Gradients:
        out: ops.Gradients = _below(
            ops.rectify_backward, grad, kept, *ops.flat(Parameters(bias, weight, seed), rule), *need, stride
        )
        ctx.rule, ctx.need, ctx.stride = rule, need, stride
        ctx.save_for_backward(grad, kept, bias, weight, seed)
        ctx.save_for_forward(grad, kept, bias, weight, seed)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Maybe) -> tuple[Maybe, ...]:
        grad, kept, *parameters = ctx.saved_tensors
        saved = Kept(kept, Parameters(*parameters), ctx.rule, ctx.stride)
        return (*double_backward(saved, grad, ctx.need, cotangents, ctx.needs_input_grad), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Maybe) -> ops.Gradients:
        grad, kept, *parameters = ctx.saved_tensors
        return backward_jvp(Kept(kept, Parameters(*parameters), ctx.rule, ctx.stride), grad, ctx.need, tangents[:4])


def _differentiated(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    bias, weight, seed = parameters
    if bias is not None and not bias_added and _keeps_input(input, rule):
        # z is made again in backward: from the bias as it is now, whatever an optimizer does to it in between.
        bias = bias.clone()
    out, bits, _ = _apply(_Rectify, input, bias, weight, seed, rule, bias_added, in_place)
    return out, bits


@ops.packed(leading=1)
def _rectify(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> Any:
    if _no_derivative_wanted(input, *parameters[:2]):
        return _below(ops.rectify, input, *ops.flat(parameters, rule), bias_added)
    return _differentiated(input, parameters, rule, bias_added)[0]


@ops.packed(leading=1)
def _rectify_bits(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False, stride: ops.Stride = None
) -> Any:
    out, bits = _below(ops.rectify_bits, input.detach(), *ops.flat(parameters, rule), bias_added, stride)
    if not _no_derivative_wanted(input, *parameters[:2]):
        out, _ = _differentiated(input, parameters, rule, bias_added)
    return out, bits


@ops.packed(leading=1)
def _rectify_in_place(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> None:
    if _no_derivative_wanted(input, *parameters[:2]):
        _below(ops.rectify_, input, *ops.flat(parameters, rule), bias_added)
        return
    _check_not_a_leaf(input)
    check(input, parameters, rule)
    check_in_place(input)
    if _keeps_input(input, rule) or input._is_view():
        # Backward reads what is overwritten, and double backward differentiates it: a copy that autograd knows. So is
        # what is written into a view: autograd rebases its base's history for Functions of one output alone.
        input.copy_(ops.rectify(input.clone(), *ops.flat(parameters, rule), bias_added))
    else:
        _differentiated(input, parameters, rule, bias_added, in_place=True)


@ops.packed(leading=1)
def _rectify_bits_in_place(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False, stride: ops.Stride = None
) -> Any:
    if _no_derivative_wanted(input, *parameters[:2]):
        return _below(ops.rectify_bits_, input, *ops.flat(parameters, rule), bias_added, stride)
    _check_not_a_leaf(input)
    check(input, parameters, rule)
    check_in_place(input)
    out, bits = ops.rectify_bits(input.clone(), *ops.flat(parameters, rule), bias_added, stride)
    input.copy_(out)
    return bits


def _check_not_a_leaf(input: Tensor) -> None:
    base = input._base if input._is_view() else input
    if torch.is_grad_enabled() and base is not None and base.is_leaf and base.requires_grad:
        what = "a leaf Variable" if base is input else "a view of a leaf Variable"
        raise RuntimeError(
            f"input: {what} that requires grad is being used in an in-place operation; "
            "call the function without the trailing underscore, or pass input.clone()"
        )


@ops.packed(leading=2, backward=True)
def _rectify_backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, need: Need, stride: ops.Stride = None
) -> Any:
    if _no_derivative_wanted(grad, kept, *parameters[:2]):
        return _below(ops.rectify_backward, grad, kept, *ops.flat(parameters, rule), *need, stride)
    if stride is None and kept.dtype == torch.uint8:
        stride = grad.stride()
    return _apply(_RectifyBackward, grad, kept, *parameters, rule, need, stride)


KERNELS: dict[Any, Callable[..., Any]] = {
    ops.rectify: _rectify,
    ops.rectify_: _rectify_in_place,
    ops.rectify_bits: _rectify_bits,
    ops.rectify_bits_: _rectify_bits_in_place,
    ops.rectify_backward: _rectify_backward,
}
