"""Bias and rectifier in one pass, alone (`bias_*`) or behind a convolution or a linear map (`conv2d_*`, `linear_*`).

Shapes: `input` is (N, C, ...) or (N, C), the channels in dim 1; `bias` (C,) or None; PReLU's `weight` (1,) or (C,).
Dtypes: float16, bfloat16, float32, float64; the arithmetic is float32 (float64 for float64), rounded once at the end.
Under autocast a float32 bias beside a 16-bit input is fine; elsewhere the dtypes must match.
Any dense layout is kept as it lies (channels_last in, channels_last out); other strides are made contiguous once.
All raise RuntimeError, as torch's twins do, for dtypes, devices or lengths that do not fit, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from . import rules as rectifiers
from .tracing import leaf

_RELU = ("relu", 0.0, 0.0)
_PRELU = ("prelu", 0.0, 0.0)
Rule = tuple[str, float, float]


@leaf
def bias_relu(input: Tensor, bias: Tensor | None = None) -> Tensor:
    """max(input + bias, 0). NaN stays NaN, -inf gives 0."""
    return _rectify(input, bias, None, None, _RELU)


@leaf
def bias_relu_(input: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`bias_relu` in place on ``input``."""
    return _rectify_(input, bias, None, None, _RELU)


@leaf
def bias_leaky_relu(input: Tensor, bias: Tensor | None = None, negative_slope: float = 0.01) -> Tensor:
    """z where z > 0, else negative_slope * z, with z = input + bias.

    Keeps the output for backward where ``negative_slope`` >= 0, else the input.
    """
    return _rectify(input, bias, None, None, _leaky(negative_slope))


@leaf
def bias_leaky_relu_(input: Tensor, bias: Tensor | None = None, negative_slope: float = 0.01) -> Tensor:
    """:func:`bias_leaky_relu` in place on ``input``. With a negative slope, training keeps a copy of the input."""
    return _rectify_(input, bias, None, None, _leaky(negative_slope))


@leaf
def bias_prelu(input: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """z where z > 0, else weight * z, with z = input + bias. He et al. 2015, arXiv 1502.01852.

    weight: (1,) for one slope, (C,) for one a channel. Keeps the input for backward.
    """
    return _rectify(input, bias, _slope_tensor(weight), None, _PRELU)


@leaf
def bias_prelu_(input: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """:func:`bias_prelu` in place on ``input``. Training keeps a copy of the input, so it saves no memory there."""
    return _rectify_(input, bias, _slope_tensor(weight), None, _PRELU)


@leaf
def bias_rrelu(
    input: Tensor,
    bias: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    training: bool = False,
    *,
    law: str = "slope",
    seed: Tensor | None = None,
) -> Tensor:
    """Randomized leaky ReLU of z = input + bias. Xu et al. 2015, arXiv 1505.00853.

    training=True: each element's negative slope is drawn anew. law="slope" (PyTorch's): slope ~ U(lower, upper), by
    default (1/8, 1/3); law="divisor" (the paper's code): slope = 1 / U(lower, upper), by default (3, 8).
    training=False: the fixed slope (lower + upper) / 2, for "divisor" its inverse.
    seed: int64 tensor (1,) as :func:`fused_rect.random.new_seed` draws it (the default): the same seed gives the same
    slopes on every device and path. Nothing but the output and the seed is kept for backward where the slopes are >= 0.
    Raises RuntimeError for lower > upper or bounds that are not finite, ValueError for "divisor" with lower <= 0 or
    bounds outside [2**-126, 2**126], where float32 has a normal inverse.
    """
    return _rectify(input, bias, None, seed if training else None, random_rule(lower, upper, training, law))


@leaf
def bias_rrelu_(
    input: Tensor,
    bias: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
    training: bool = False,
    *,
    law: str = "slope",
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`bias_rrelu` in place on ``input``."""
    return _rectify_(input, bias, None, seed if training else None, random_rule(lower, upper, training, law))


def epilogue(z: Tensor, bias: Tensor | None, weight: Tensor | None, rule: Rule, seed: Tensor | None = None) -> Tensor:
    """Rectify a convolution output that nobody else holds: over it, unless backward will read it (PReLU).

    Exported programs and DTensors get the op without mutation: a clean node there, a sharding rule here.
    """
    in_place = rectifiers.saves_output(rule[0], rule[1]) or not _needs_grad(z, bias, weight)
    if in_place and not torch.compiler.is_exporting() and not hasattr(z, "device_mesh"):
        return _rectify_(z, bias, weight, seed, rule)
    return _rectify(z, bias, weight, seed, rule)


def random_rule(lower: float | None, upper: float | None, training: bool, law: str) -> Rule:
    """RReLU's rule: random in training, in evaluation the Leaky ReLU at the midpoint."""
    rrelu = rectifiers.rrelu(lower, upper, law)
    return (rrelu.op, rrelu.lower, rrelu.upper) if training else _leaky(rrelu.evaluation().negative_slope)


def _leaky(negative_slope: float) -> Rule:
    return "leaky_relu", negative_slope, negative_slope


def _rectify(input: Tensor, bias: Tensor | None, weight: Tensor | None, seed: Tensor | None, rule: Rule) -> Tensor:
    _check_dtypes(input, bias, weight)
    return ops.run(input, bias, weight, seed, *rule)


def _rectify_(input: Tensor, bias: Tensor | None, weight: Tensor | None, seed: Tensor | None, rule: Rule) -> Tensor:
    _check_dtypes(input, bias, weight)
    ops.run_(input, bias, weight, seed, *rule)
    return input


def _check_dtypes(input: Tensor, bias: Tensor | None, weight: Tensor | None) -> None:
    """The ops take float32 parameters beside 16-bit inputs; outside autocast that mix is somebody's mistake."""
    for name, parameter in (("bias", bias), ("weight", weight)):
        if parameter is None or parameter.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
            continue
        raise RuntimeError(
            f"{name} must have the dtype of input ({input.dtype}), got {parameter.dtype}; "
            f"convert it with {name}.to(input.dtype), or run under torch.autocast"
        )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _slope_tensor(weight: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor of shape (1,) or (C,), got {type(weight).__name__}")
    return weight


# ---- behind a convolution, a transposed convolution or a linear map ----


def behind(linear_map: Callable[..., Tensor], name: str) -> tuple[Callable[..., Tensor], ...]:
    """The four fused functions behind ``linear_map``; its arguments are its own, the rectifier's are keywords.

    ``linear_map(input, weight, None, *args, **kwargs)`` computes the map without bias. The epilogue overwrites its
    output in place, unless backward will read it (PReLU).
    """

    def relu(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return linear_map(input, weight, None, *args, **kwargs, then=lambda z: epilogue(z, bias, None, _RELU))

    def leaky_relu(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> Tensor:
        rule = _leaky(negative_slope)
        return linear_map(input, weight, None, *args, **kwargs, then=lambda z: epilogue(z, bias, None, rule))

    def prelu(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, slope: Tensor, **kwargs: Any
    ) -> Tensor:
        slope = _slope_tensor(slope)
        return linear_map(input, weight, None, *args, **kwargs, then=lambda z: epilogue(z, bias, slope, _PRELU))

    def rrelu(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        lower: float | None = None,
        upper: float | None = None,
        training: bool = False,
        law: str = "slope",
        seed: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        rule, seed = random_rule(lower, upper, training, law), seed if training else None
        return linear_map(input, weight, None, *args, **kwargs, then=lambda z: epilogue(z, bias, None, rule, seed))

    functions = (relu, leaky_relu, prelu, rrelu)
    for function in functions:
        rectifier = function.__name__
        function.__name__ = function.__qualname__ = f"{name}_{rectifier}"
        function.__module__ = __name__
        function.__doc__ = (
            f"`torch.nn.functional.{name}`, whose arguments these are, then :func:`bias_{rectifier}`, whose arguments\n"
            "are keywords (PReLU's tensor is `slope`). What is kept for backward: see :mod:`fused_rect.rules`."
        )
    return tuple(leaf(function) for function in functions)


def convolution(function: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """``function`` with a step ``then`` on its batched output; an unbatched input gets a batch of one in between."""

    def convolve(input: Tensor, *args: Any, then: Callable[[Tensor], Tensor], **kwargs: Any) -> Tensor:
        if input.dim() == rank + 1:
            return then(function(input.unsqueeze(0), *args, **kwargs)).squeeze(0)
        return then(function(input, *args, **kwargs))

    return convolve


def linear(input: Tensor, weight: Tensor, bias: None = None, *, then: Callable[[Tensor], Tensor]) -> Tensor:
    """`F.linear` with a step ``then`` on its output as (rows, features), so that the features lie in dim 1."""
    rows = F.linear(input.reshape(-1, input.shape[-1]), weight, bias)
    return then(rows).view(*input.shape[:-1], weight.shape[0])


linear_relu, linear_leaky_relu, linear_prelu, linear_rrelu = behind(linear, "linear")

conv1d_relu, conv1d_leaky_relu, conv1d_prelu, conv1d_rrelu = behind(convolution(F.conv1d, 1), "conv1d")
conv2d_relu, conv2d_leaky_relu, conv2d_prelu, conv2d_rrelu = behind(convolution(F.conv2d, 2), "conv2d")
conv3d_relu, conv3d_leaky_relu, conv3d_prelu, conv3d_rrelu = behind(convolution(F.conv3d, 3), "conv3d")

(conv_transpose1d_relu, conv_transpose1d_leaky_relu, conv_transpose1d_prelu, conv_transpose1d_rrelu) = behind(
    convolution(F.conv_transpose1d, 1), "conv_transpose1d"
)
(conv_transpose2d_relu, conv_transpose2d_leaky_relu, conv_transpose2d_prelu, conv_transpose2d_rrelu) = behind(
    convolution(F.conv_transpose2d, 2), "conv_transpose2d"
)
(conv_transpose3d_relu, conv_transpose3d_leaky_relu, conv_transpose3d_prelu, conv_transpose3d_rrelu) = behind(
    convolution(F.conv_transpose3d, 3), "conv_transpose3d"
)
