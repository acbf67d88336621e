"""The dispatcher ops, which layers and functionals call and which `torch.compile`, `torch.export` and functorch see.

| op               | what it does                                                                            |
|------------------|-----------------------------------------------------------------------------------------|
| rectify          | the rectified input; its derivatives are in :mod:`.autograd`                            |
| rectify_bits     | the same, and one bit per element: which side. What autograd runs where one is enough    |
| rectify_         | rectify in place                                                                        |
| rectify_bits_    | rectify_bits in place                                                                   |
| rectify_backward | the gradients, from those bits or from the input                                        |

The dispatcher's schema is flat: a call's :class:`Parameters` and :class:`Rule` are unpacked by `flat` and packed again
by `packed`, here and nowhere else. `bias_added` says that the input holds the bias already (it was added by the map
that made the input, before its rounding), so that the bias is there for its gradient alone. `stride` is that of the
dense layout whose memory the bits and a random rule's slopes follow, None for that of the tensor at hand: a compiler
may choose other layouts for backward's tensors than it had for forward's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, internals
from ..random import new_seed
from ..rules import Need, Parameters, Rule
from .checks import check, check_dtypes, check_in_place, check_kept, dense, laid_out_as, one_after_the_other

Gradients = tuple[Tensor, Tensor, Tensor]
Stride = Sequence[int] | None

_PARAMETERS = "Tensor? bias, Tensor? weight, Tensor? seed, str rule, float lower, float upper"
_STRIDE = "SymInt[]? stride=None"
_lib = torch.library.Library("fused_rect", "DEF")
for _schema in (
    f"rectify(Tensor input, {_PARAMETERS}, bool bias_added=False) -> Tensor",
    f"rectify_(Tensor(a!) input, {_PARAMETERS}, bool bias_added=False) -> ()",
    f"rectify_bits(Tensor input, {_PARAMETERS}, bool bias_added=False, {_STRIDE}) -> (Tensor, Tensor)",
    f"rectify_bits_(Tensor(a!) input, {_PARAMETERS}, bool bias_added=False, {_STRIDE}) -> Tensor",
    f"rectify_backward(Tensor grad, Tensor kept, {_PARAMETERS}, ScalarType? bias_dtype, bool need_weight,"
    f" {_STRIDE}) -> (Tensor, Tensor, Tensor)",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

rectify = torch.ops.fused_rect.rectify.default
rectify_ = torch.ops.fused_rect.rectify_.default
rectify_bits = torch.ops.fused_rect.rectify_bits.default
rectify_bits_ = torch.ops.fused_rect.rectify_bits_.default
rectify_backward = torch.ops.fused_rect.rectify_backward.default


def flat(parameters: Parameters, rule: Rule) -> tuple[Any, ...]:
    """As the schemas want them."""
    return (*parameters, *rule)


def packed(leading: int, backward: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of ``leading`` arguments, Parameters, Rule, in backward Need, and the rest as one of a schema's flat
    arguments."""
    rule = leading + len(Parameters._fields)
    need = rule + len(Rule._fields)
    rest = need + len(Need._fields)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return function(*args[:leading], Parameters(*args[leading:rule]), Rule(*args[rule:need]), *args[need:])

        def needed(*args: Any) -> Any:
            parameters, given = Parameters(*args[leading:rule]), Rule(*args[rule:need])
            return function(*args[:leading], parameters, given, Need(*args[need:rest]), *args[rest:])

        return needed if backward else call

    return decorate


# ---- below autograd: what runs, and what the compiler believes runs ----


def _run(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool, bits: Tensor | None, stride: Stride = None
) -> Tensor:
    bias, weight, seed = parameters
    parameters = Parameters(None if bias_added else one_after_the_other(bias), one_after_the_other(weight), seed)
    source = dense(input, stride)
    out = torch.empty_like(source) if source is input else source
    if out.numel():
        backends.resolve(input.device.type).forward(source, parameters, rule, out, bits)
    return out


def _run_in_place(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool, bits: Tensor | None, stride: Stride = None
) -> None:
    bias = None if bias_added else _apart(parameters.bias, input)
    parameters = Parameters(bias, _apart(parameters.weight, input), parameters.seed)
    if input.numel():
        out = dense(input, stride)
        backends.resolve(input.device.type).forward(out, parameters, rule, out, bits)
        if out is not input:
            input.copy_(out)
    torch.autograd.graph.increment_version(input)


def _apart(parameter: Tensor | None, input: Tensor) -> Tensor | None:
    """``parameter`` without gaps; a copy where it is a view of ``input``, since it would change while it is read."""
    if parameter is not None and internals.overlaps(parameter, input):
        return parameter.clone(memory_format=torch.contiguous_format)
    return one_after_the_other(parameter)


def _new_bits(input: Tensor) -> Tensor:
    return input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)


@packed(leading=1)
def _rectify(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> Tensor:
    check(input, parameters, rule)
    return _run(input, parameters, rule, bias_added, None)


@packed(leading=1)
def _rectify_bits(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False, stride: Stride = None
) -> tuple[Tensor, Tensor]:
    check(input, parameters, rule)
    bits = _new_bits(input)
    return _run(input, parameters, rule, bias_added, bits, stride), bits


@packed(leading=1)
def _rectify_in_place(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> None:
    check(input, parameters, rule)
    check_in_place(input)
    _run_in_place(input, parameters, rule, bias_added, None)


@packed(leading=1)
def _rectify_bits_in_place(
    input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False, stride: Stride = None
) -> Tensor:
    check(input, parameters, rule)
    check_in_place(input)
    bits = _new_bits(input)
    _run_in_place(input, parameters, rule, bias_added, bits, stride)
    return bits


def _fake(returned: Callable[[Tensor, Stride], Any]) -> Callable[..., Any]:
    @packed(leading=1)
    def fake(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False, stride: Stride = None) -> Any:
        check(input, parameters, rule)
        return returned(input, stride)

    return fake


def _empty(input: Tensor, stride: Stride) -> Tensor:
    return torch.empty_like(dense(input, stride))


@packed(leading=2, backward=True)
def _rectify_backward(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, need: Need, stride: Stride = None
) -> Gradients:
    grad, kept = laid_out(grad, kept, parameters, rule, stride)
    return backward_into(torch.empty_like(grad), grad, kept, parameters, rule, need)


def backward_into(
    grad_input: Tensor, grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, need: Need
) -> Gradients:
    """The backend's gradients of dense tensors in one order; ``grad_input`` is written, and may be ``grad``."""
    bias, weight, seed = parameters
    if not grad_input.numel():
        return gradients(grad_input, weight, need, torch.zeros)
    parameters = Parameters(one_after_the_other(bias), one_after_the_other(weight), seed)
    backend = backends.resolve(grad.device.type)
    grad_bias, grad_weight = backend.backward(grad, kept, parameters, rule, grad_input, need)
    # An op cannot return None: an absent gradient is an empty tensor.
    grad_bias, grad_weight = (grad.new_empty(0) if g is None else g for g in (grad_bias, grad_weight))
    return grad_input, grad_bias, grad_weight


@packed(leading=2, backward=True)
def _rectify_backward_fake(
    grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, need: Need, stride: Stride = None
) -> Gradients:
    grad, _ = laid_out(grad, kept, parameters, rule, stride)
    return gradients(torch.empty_like(grad), parameters.weight, need, torch.empty)


def laid_out(grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule, stride: Stride) -> tuple[Tensor, Tensor]:
    """Both dense and in the same order. Bits have no strides: they follow ``stride``, or the gradient as it comes."""
    grad = grad if stride is None else laid_out_as(grad, stride)
    check_kept(grad, kept, parameters, rule)
    if kept.dtype == torch.uint8:
        return grad, kept
    kept = dense(kept, stride)
    return laid_out_as(grad, kept.stride()), kept


def gradients(grad_input: Tensor, weight: Tensor | None, need: Need, new: Callable[..., Tensor]) -> Gradients:
    """``grad_input`` and sums that ``new`` makes, empty where they are not wanted."""
    of_bias, of_weight = (grad_input.new_empty(0) for _ in range(2))  # the outputs of an op are no aliases
    if need.bias is not None:
        channels = grad_input.shape[1] if grad_input.dim() > 1 else 1
        of_bias = new((channels,), dtype=need.bias, device=grad_input.device)
    if need.weight and weight is not None:
        of_weight = new(weight.shape, dtype=weight.dtype, device=grad_input.device)
    return grad_input, of_bias, of_weight


@functools.cache
def _ordinary(device_type: str) -> Any:
    """The dispatch keys of an ordinary tensor: no subclass, no fake, functional, negated or zero tensor."""
    if device_type == "cuda" and not torch.cuda.is_available():  # fake ones are there all the same
        return None
    return internals.dispatch_keys(torch.empty(0, device=device_type))


def below_autograd(op: Any, *args: Any) -> Any:
    """``op`` from its own autograd kernel; for ordinary CPU and CUDA tensors its kernel as a plain call.

    A second trip through the dispatcher would find that kernel, and cost as much as a small rectifier itself (6 us).
    """
    with internals.below_autograd():
        tensors = [t for t in args if isinstance(t, Tensor)]
        if internals.dispatch_modes() == 0 and (tensors[0].is_cpu or tensors[0].is_cuda):
            ordinary = _ordinary("cpu" if tensors[0].is_cpu else "cuda")
            if all(internals.dispatch_keys(t) == ordinary for t in tensors):
                return KERNELS[op][0](*args)
        return op(*args)


KERNELS: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {  # op -> what runs, its fake
    rectify: (_rectify, _fake(_empty)),
    rectify_: (_rectify_in_place, _fake(lambda *_: None)),
    rectify_bits: (_rectify_bits, _fake(lambda input, stride: (_empty(input, stride), _new_bits(input)))),
    rectify_bits_: (_rectify_bits_in_place, _fake(lambda input, _: _new_bits(input))),
    rectify_backward: (_rectify_backward, _rectify_backward_fake),
}


def _register() -> None:
    from . import autograd, batching  # they call the ops above

    for op, (kernel, fake) in KERNELS.items():
        name = op._schema.name
        _lib.impl(name, kernel, "CompositeExplicitAutograd")
        _lib.impl(name, autograd.KERNELS[op], "Autograd")
        torch.library.register_fake(name, fake, lib=_lib)
        torch.library.register_vmap(name, batching.VMAP[op], lib=_lib)


_register()


# ---- what layers and functionals call ----


def somebody_listens() -> bool:
    """The compiler, forward-mode AD, function transforms, modes, the tracer or the profiler: they see the ops above."""
    return bool(
        torch.compiler.is_compiling()
        or internals.forward_ad_active()
        or internals.transforms_active()
        or internals.dispatch_modes()
        or internals.function_modes()
        or internals.jit_tracing()
        or internals.profiler_enabled()
    )


def run(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> Tensor:
    """The op `rectify`, by the shortest way there is, with a seed drawn where a random rule comes without.

    In C++ (kernels/direct/) but where somebody listens (function transforms, modes, the tracer, profilers) or the
    tensors are unusual: a dispatch to the op costs a small rectifier several times its work.
    Raises RuntimeError where the dtype of bias or weight is not the input's, unless autocast is on.
    """
    calls = backends.direct(input)
    out: Tensor | None = None if calls is None else calls.rectify(input, parameters, rule, bias_added)
    if out is None:
        check_dtypes(input, parameters)
        out = rectify(input, *flat(_seeded(parameters, input, rule), rule), bias_added)
    return out


def run_(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> None:
    """The same for `rectify_`."""
    calls = backends.direct(input)
    if calls is None or not calls.rectify_(input, parameters, rule, bias_added):
        check_dtypes(input, parameters)
        rectify_(input, *flat(_seeded(parameters, input, rule), rule), bias_added)


def _seeded(parameters: Parameters, input: Tensor, rule: Rule) -> Parameters:
    if rule.random and parameters.seed is None:
        return parameters._replace(seed=new_seed(input.device))
    return parameters


__all__ = ["rectify", "rectify_", "rectify_backward", "rectify_bits", "rectify_bits_", "run", "run_"]
