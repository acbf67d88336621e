"""The dispatcher ops, the single source of truth: rectify, rectify_ (in place) and rectify_backward.

Layers and functionals call the ops; `torch.compile`, `torch.export` and functorch see one opaque node each. Autograd
is attached at the dispatcher's Autograd key by a Function whose forward re-enters the op below autograd.

`rectifier` is "relu", "leaky_relu", "prelu", "rrelu" or "rrelu_divisor"; `lower` and `upper` are its bounds (both are
the slope for "leaky_relu"). `seed` is an int64 tensor (1,) for the random ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from .. import backends
from ..random import new_seed
from ..rules import RANDOM, saves_output
from .checks import check, check_grad, check_in_place, dense, laid_out_as, packed
from .derivatives import backward_jvp, double_backward, forward_jvp

Maybe = Tensor | None
Gradients = tuple[Tensor, Tensor, Tensor]

_RULE = "str rectifier, float lower, float upper"
_PARAMETERS = f"Tensor? bias, Tensor? weight, Tensor? seed, {_RULE}"
_lib = torch.library.Library("fused_rect", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define(f"rectify(Tensor input, {_PARAMETERS}) -> Tensor", tags=_tags)
_lib.define(f"rectify_(Tensor(a!) input, {_PARAMETERS}) -> ()", tags=_tags)
_lib.define(
    f"rectify_backward(Tensor grad, Tensor saved, {_PARAMETERS}, bool need_bias, bool need_weight)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)

rectify = torch.ops.fused_rect.rectify.default
rectify_ = torch.ops.fused_rect.rectify_.default
rectify_backward = torch.ops.fused_rect.rectify_backward.default


# ---- below autograd: what runs, and what the compiler believes runs ----


def _rectify(
    input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, rectifier: str, lower: float, upper: float
) -> Tensor:
    check(input, bias, weight, seed, rectifier)
    bias, weight = packed(bias), packed(weight)
    source = dense(input)
    out = torch.empty_like(source) if source is input else source
    if out.numel():
        backends.resolve(input.device.type).forward(source, bias, weight, seed, rectifier, lower, upper, out)
    return out


def _rectify_fake(
    input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, rectifier: str, lower: float, upper: float
) -> Tensor:
    check(input, bias, weight, seed, rectifier)
    return torch.empty_like(dense(input))


def _rectify_in_place(
    input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, rectifier: str, lower: float, upper: float
) -> None:
    check(input, bias, weight, seed, rectifier)
    check_in_place(input)
    bias, weight = _apart(bias, input), _apart(weight, input)
    if input.numel():
        out = dense(input)
        backends.resolve(input.device.type).forward(out, bias, weight, seed, rectifier, lower, upper, out)
        if out is not input:
            input.copy_(out)
    torch.autograd.graph.increment_version(input)


def _apart(parameter: Maybe, input: Tensor) -> Maybe:
    """``parameter`` packed; a copy where it is a view of ``input``, since it would change while it is read."""
    if parameter is not None and torch._C._overlaps(parameter, input):
        return parameter.clone(memory_format=torch.contiguous_format)
    return packed(parameter)


def _rectify_in_place_fake(
    input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, rectifier: str, lower: float, upper: float
) -> None:
    check(input, bias, weight, seed, rectifier)


def _rectify_backward(
    grad: Tensor, saved: Tensor, bias: Maybe, weight: Maybe, seed: Maybe,
    rectifier: str, lower: float, upper: float, need_bias: bool, need_weight: bool,
) -> Gradients:  # fmt: skip
    check(saved, bias, weight, seed, rectifier)
    check_grad(grad, saved)
    bias, weight = packed(bias), packed(weight)
    saved = dense(saved)
    grad = laid_out_as(grad, saved)
    grad_input = torch.empty_like(saved)
    if not grad_input.numel():
        return _gradients_fake(grad_input, bias, weight, need_bias, need_weight, torch.zeros)
    grad_bias, grad_weight = backends.resolve(saved.device.type).backward(
        grad, saved, bias, weight, seed, rectifier, lower, upper, grad_input, need_bias, need_weight
    )
    return (
        grad_input,
        grad.new_empty(0) if grad_bias is None else grad_bias,
        grad.new_empty(0) if grad_weight is None else grad_weight,
    )


def _rectify_backward_fake(
    grad: Tensor, saved: Tensor, bias: Maybe, weight: Maybe, seed: Maybe,
    rectifier: str, lower: float, upper: float, need_bias: bool, need_weight: bool,
) -> Gradients:  # fmt: skip
    return _gradients_fake(torch.empty_like(dense(saved)), bias, weight, need_bias, need_weight, torch.empty)


def _gradients_fake(
    grad_input: Tensor, bias: Maybe, weight: Maybe, need_bias: bool, need_weight: bool, new: Callable[..., Tensor]
) -> Gradients:
    """Gradients of the right shapes; an absent one is an empty tensor, since an op cannot return None."""
    channels = tuple(bias.shape) if bias is not None else (grad_input.shape[1] if grad_input.dim() > 1 else 1,)
    bias_dtype = grad_input.dtype if bias is None else bias.dtype
    device = grad_input.device
    return (
        grad_input,
        new(channels, dtype=bias_dtype, device=device) if need_bias else grad_input.new_empty(0),
        new(weight.shape, dtype=weight.dtype, device=device)
        if need_weight and weight is not None
        else grad_input.new_empty(0),
    )


# ---- autograd ----


def _no_derivative_wanted(*tensors: Tensor | None) -> bool:
    """Neither reverse mode, nor forward mode, nor a functorch transform will ask for derivatives of this call."""
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


# The dispatch keys of an ordinary CPU tensor: no subclass, no fake, functional, negated or zero tensor.
_ORDINARY = torch._C._dispatch_keys(torch.empty(0))


def _below_autograd(op: Any, *args: Any) -> Any:
    """``op`` from its own autograd kernel; for ordinary CPU tensors its kernel as a plain call.

    A second trip through the dispatcher would find that kernel, and cost as much as a small rectifier itself (6 us).
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            tensors = (t for t in args if isinstance(t, Tensor))
            if torch._C._len_torch_dispatch_stack() == 0 and all(
                torch._C._dispatch_keys(t) == _ORDINARY for t in tensors
            ):
                return _KERNELS[op](*args)
            return op(*args)
    # Outer functorch levels must see a differentiable call: without these, grad(grad(f)) is silently wrong.
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _apply(function: Any, *args: Any) -> Any:
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


class _Rectify(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, *rule: Any) -> Tensor:
        out = _below_autograd(rectify, input, bias, weight, seed, *rule)
        _save(ctx, out if saves_output(*rule[:2]) else input, bias, weight, seed, *rule)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
        return _backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, input_t: Maybe, bias_t: Maybe, weight_t: Maybe, *_: None) -> Tensor:
        return forward_jvp(ctx.saved_tensors, ctx.rule, input_t, bias_t, weight_t)


class _RectifyInPlace(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, *rule: Any) -> Tensor:
        _below_autograd(rectify_, input, bias, weight, seed, *rule)
        ctx.mark_dirty(input)
        _save(ctx, input, bias, weight, seed, *rule)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
        return _backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, input_t: Maybe, bias_t: Maybe, weight_t: Maybe, *_: None) -> Tensor:
        tangent = forward_jvp(ctx.saved_tensors, ctx.rule, input_t, bias_t, weight_t)
        return tangent if input_t is None else input_t.copy_(tangent)


def _save(ctx: Any, saved: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, *rule: Any) -> None:
    tensors = (saved, bias, weight, seed)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.rule = rule


def _backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
    need_input, need_bias, need_weight = ctx.needs_input_grad[:3]
    grad_input, grad_bias, grad_weight = rectify_backward(grad, *ctx.saved_tensors, *ctx.rule, need_bias, need_weight)
    return (
        grad_input if need_input else None,
        grad_bias if need_bias else None,
        grad_weight if need_weight else None,
        None,
        None,
        None,
        None,
    )


class _RectifyBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Gradients:
        out: Gradients = _below_autograd(rectify_backward, *args)
        tensors, ctx.rule, ctx.need = args[:5], args[5:8], args[8:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Maybe) -> tuple[Maybe, ...]:
        gradients = double_backward(ctx.saved_tensors, ctx.rule, ctx.need, cotangents, ctx.needs_input_grad)
        return (*gradients, None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Maybe) -> Gradients:
        return backward_jvp(ctx.saved_tensors, ctx.rule, ctx.need, tangents[:4])


def _rectify_autograd(input: Tensor, bias: Maybe, weight: Maybe, *rest: Any) -> Any:
    if _no_derivative_wanted(input, bias, weight):
        return _below_autograd(rectify, input, bias, weight, *rest)
    return _apply(_Rectify, input, bias, weight, *rest)


def _rectify_in_place_autograd(
    input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, rectifier: str, lower: float, upper: float
) -> None:
    if _no_derivative_wanted(input, bias, weight):
        _below_autograd(rectify_, input, bias, weight, seed, rectifier, lower, upper)
        return
    base = input._base if input._is_view() else input
    if torch.is_grad_enabled() and base is not None and base.is_leaf and base.requires_grad:
        what = "a leaf Variable" if base is input else "a view of a leaf Variable"
        raise RuntimeError(
            f"input: {what} that requires grad is being used in an in-place operation; "
            "call the function without the trailing underscore, or pass input.clone()"
        )
    check(input, bias, weight, seed, rectifier)
    check_in_place(input)
    if saves_output(rectifier, lower):
        _apply(_RectifyInPlace, input, bias, weight, seed, rectifier, lower, upper)
    else:
        # Backward reads what is overwritten, and double backward differentiates it: a copy that autograd knows.
        input.copy_(rectify(input.clone(), bias, weight, seed, rectifier, lower, upper))


def _rectify_backward_autograd(grad: Tensor, saved: Tensor, bias: Maybe, weight: Maybe, *rest: Any) -> Any:
    if _no_derivative_wanted(grad, saved, bias, weight):
        return _below_autograd(rectify_backward, grad, saved, bias, weight, *rest)
    return _apply(_RectifyBackward, grad, saved, bias, weight, *rest)


# ---- what layers and functionals call ----

_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def _direct(*tensors: Maybe) -> Any:
    """The ops in C++ (kernels/cpu/direct.cpp) for tensors of no subclass where nothing listens, else None.

    Who listens: the compiler, forward-mode AD, function transforms, modes, the tracer and the profiler. They see the
    ops above; a dispatch to those costs a small rectifier several times its work.
    """
    if (
        torch.compiler.is_compiling()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    ):
        return None
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return None
    return backends.direct()


def run(input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, *rule: Any) -> Tensor:
    """The op `rectify`, by the shortest way there is, with a seed drawn where a random rule comes without."""
    direct = _direct(input, bias, weight, seed) if input.is_cpu else None
    out: Maybe = None if direct is None else direct.rectify(input, bias, weight, seed, *rule)
    return rectify(input, bias, weight, _drawn(seed, input, rule), *rule) if out is None else out


def run_(input: Tensor, bias: Maybe, weight: Maybe, seed: Maybe, *rule: Any) -> None:
    """The same for `rectify_`."""
    direct = _direct(input, bias, weight, seed) if input.is_cpu else None
    if direct is None or not direct.rectify_(input, bias, weight, seed, *rule):
        rectify_(input, bias, weight, _drawn(seed, input, rule), *rule)


def _drawn(seed: Maybe, input: Tensor, rule: tuple[Any, ...]) -> Maybe:
    return new_seed(input.device) if seed is None and rule[0] in RANDOM else seed


_KERNELS: dict[Any, Callable[..., Any]] = {
    rectify: _rectify,
    rectify_: _rectify_in_place,
    rectify_backward: _rectify_backward,
}

for _name, _kernel, _fake, _autograd in (
    ("rectify", _rectify, _rectify_fake, _rectify_autograd),
    ("rectify_", _rectify_in_place, _rectify_in_place_fake, _rectify_in_place_autograd),
    ("rectify_backward", _rectify_backward, _rectify_backward_fake, _rectify_backward_autograd),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    _lib.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"fused_rect::{_name}", _fake, lib=_lib)
