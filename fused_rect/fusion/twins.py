"""torch's rectifiers in all their spellings, and the call of ours that each means."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, rules
from ..internals import dispatch_modes, forward_ad_active
from ..rules import PRELU, RELU, Parameters, Rule


class Call(NamedTuple):
    """weight: PReLU's."""

    in_place: bool
    input: Tensor
    rule: Rule
    weight: Tensor | None = None


class Twin(NamedTuple):
    """Of one function of torch's; ``call``, with the same arguments, is None where ours would not do the same."""

    name: str
    call: Callable[..., Call | None]


def rectify(call: Call, is_free: bool) -> Tensor:
    """is_free: nobody else reads or keeps the memory of ``call.input``, so where the result lies is ours to say."""
    _, input, rule, weight = call
    in_place = _may_overwrite(call) if is_free and _can_tell_nothing(call) else call.in_place
    if not in_place:
        return ops.run(input, Parameters(weight=weight), rule)
    ops.run_(input, Parameters(weight=weight), rule)
    return input


def _can_tell_nothing(call: Call) -> bool:
    """Whether a new tensor and the input, written over, are alike to autograd and to inference mode."""
    return (
        call.input.requires_grad == _needs_grad(call)
        and call.input._base is None
        and call.input.is_inference() == torch.is_inference_mode_enabled()
        and not forward_ad_active()
    )


def _may_overwrite(call: Call) -> bool:
    """Not where PReLU's backward reads the input, or a selective checkpoint keeps what convolutions return."""
    return dispatch_modes() == 0 and not (call.rule.learned and _needs_grad(call))


def _needs_grad(call: Call) -> bool:
    tensors = call.input, call.weight
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _relu(input: Tensor, inplace: bool = False) -> Call:
    return Call(inplace, input, RELU)


def _leaky_relu(input: Tensor, negative_slope: Any = 0.01, inplace: bool = False) -> Call | None:
    return Call(inplace, input, rules.leaky_relu(negative_slope)) if _are_finite(negative_slope) else None


def _prelu(input: Tensor, weight: Tensor) -> Call | None:
    fits = (
        type(weight) in (Tensor, nn.Parameter)
        and weight.layout is torch.strided
        and (weight.dtype, weight.device, weight.dim()) == (input.dtype, input.device, 1)
        and (weight.numel() == 1 or (input.dim() > 1 and weight.numel() == input.shape[1]))
    )
    return Call(False, input, PRELU, weight) if fits else None


def _rrelu(
    input: Tensor, lower: Any = 1 / 8, upper: Any = 1 / 3, training: bool = False, inplace: bool = False
) -> Call | None:
    fits = _are_finite(lower, upper) and lower <= upper
    return Call(inplace, input, rules.rrelu(lower, upper, "slope", training)) if fits else None


def _are_finite(*numbers: Any) -> bool:
    return all(type(n) in (int, float) and math.isfinite(n) for n in numbers)


def _twins() -> dict[Any, Twin]:
    relu, leaky_relu, prelu, rrelu = (Twin(f.__name__[1:], f) for f in (_relu, _leaky_relu, _prelu, _rrelu))
    twins: dict[Any, Twin] = {
        **dict.fromkeys((F.relu, torch.relu, Tensor.relu), relu),
        **dict.fromkeys((F.leaky_relu, torch._C._nn.leaky_relu), leaky_relu),
        **dict.fromkeys((torch.prelu, Tensor.prelu), prelu),
        **dict.fromkeys((F.rrelu, torch.rrelu), rrelu),
    }
    for name, twin, functions in (
        ("relu", relu, (torch.relu_, Tensor.relu_)),
        ("leaky_relu", leaky_relu, (torch._C._nn.leaky_relu_,)),
        ("rrelu", rrelu, (torch.rrelu_,)),
    ):
        twins.update(dict.fromkeys(functions, Twin(name, functools.partial(twin.call, inplace=True))))
    return twins


TWINS = _twins()
