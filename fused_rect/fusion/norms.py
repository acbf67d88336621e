"""A BatchNorm in evaluation between a map and its rectifier needs no pass: the rectifier's scales and shifts as well.

What it reads, the map's output, is what it returns, and it has not run (:class:`Deferred`). The rectifier that reads it
next, which was certain beforehand (:mod:`.readers`), does both in one pass. Where that pass takes something that our
kernels do not, or an exception comes in between, :func:`fill` does what BatchNorm would have done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..internals import dispatch_modes, forward_ad_active, profiler_enabled
from ..ops.checks import HALF, one_after_the_other
from ..rules import Norm, Parameters, Rule, leaky_relu

_AS_IT_IS = leaky_relu(1.0)
_NAME = "fused_rect::batch_norm_rectify"  # in profiles, which see no op


class Deferred(NamedTuple):
    """A BatchNorm that is yet to run, on the values of the tensor that waits for it."""

    norm: Norm
    bias: Tensor | None


def defer(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Deferred | None:  # fmt: skip
    """`F.batch_norm` of the same arguments, to run later; None where it has to run now."""
    if training or dispatch_modes() or forward_ad_active() or running_mean is None or running_var is None:
        return None
    found = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if not all(_fits(t, input) for t in found):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (input, *found)):
        return None
    return Deferred(Norm(running_mean, running_var, weight, eps), bias)


def _fits(statistic: Any, input: Tensor) -> bool:
    return (
        type(statistic) in (Tensor, nn.Parameter, nn.Buffer)
        and statistic.layout is torch.strided
        and statistic.device == input.device
        and input.dim() > 1
        and statistic.shape == input.shape[1:2]
        and (statistic.dtype == input.dtype or (input.dtype in HALF and statistic.dtype == torch.float32))
    )


def fill(tensor: Tensor, deferred: Deferred, rule: Rule = _AS_IT_IS, weight: Tensor | None = None) -> None:
    """Run the BatchNorm on ``tensor`` in place, and a rectifier behind it.

    rule: not one of random slopes; weight: PReLU's.
    """
    (mean, var, scale, eps), bias = deferred
    mean, var, scale, bias, weight = map(one_after_the_other, (mean, var, scale, bias, weight))
    arguments = tensor, Parameters(bias, weight), rule, tensor, None, Norm(mean, var, scale, eps)
    if not profiler_enabled():
        backends.resolve(tensor.device.type).forward(*arguments)
        return
    with torch.profiler.record_function(_NAME):
        backends.resolve(tensor.device.type).forward(*arguments)
