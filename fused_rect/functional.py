"""Bias and rectifier in one pass, alone (`bias_*`) or behind a convolution or a linear map (`conv2d_*`, `linear_*`).

Shapes: `input` is (N, C, ...) or (N, C), the channels in dim 1; `bias` (C,) or None; PReLU's `weight` (1,) or (C,).
Dtypes: float16, bfloat16, float32, float64; the arithmetic is float32 (float64 for float64), rounded once at the end.
Under autocast a float32 bias beside a 16-bit input is fine; elsewhere the dtypes must match.
Any dense layout is kept as it lies (channels_last in, channels_last out); other strides are made contiguous once.
All raise RuntimeError, as torch's twins do, for dtypes, devices or lengths that do not fit, before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, rules
from .internals import dispatch_modes, transforms_active
from .rules import PRELU, RELU, Parameters, Rule
from .tracing import leaf

Size = int | tuple[int, ...]

# ---- the epilogue alone ----


@leaf
def bias_relu(input: Tensor, bias: Tensor | None = None) -> Tensor:
    """max(input + bias, 0). NaN stays NaN, -inf gives 0."""
    return ops.run(input, Parameters(bias), RELU)


@leaf
def bias_relu_(input: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`bias_relu` in place on ``input``."""
    return _rectify_(input, Parameters(bias), RELU)


@leaf
def bias_leaky_relu(input: Tensor, bias: Tensor | None = None, negative_slope: float = 0.01) -> Tensor:
    """z where z > 0, else negative_slope * z, with z = input + bias."""
    return ops.run(input, Parameters(bias), rules.leaky_relu(negative_slope))


@leaf
def bias_leaky_relu_(input: Tensor, bias: Tensor | None = None, negative_slope: float = 0.01) -> Tensor:
    """:func:`bias_leaky_relu` in place on ``input``."""
    return _rectify_(input, Parameters(bias), rules.leaky_relu(negative_slope))


@leaf
def bias_prelu(input: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """z where z > 0, else weight * z, with z = input + bias. He et al. 2015, arXiv 1502.01852.

    weight: (1,) for one slope, (C,) for one a channel. Keeps the input for backward.
    """
    return ops.run(input, Parameters(bias, slope_tensor(weight)), PRELU)


@leaf
def bias_prelu_(input: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """:func:`bias_prelu` in place on ``input``. Training keeps a copy of the input, so it saves no memory there."""
    return _rectify_(input, Parameters(bias, slope_tensor(weight)), PRELU)


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
    slopes on every device and path. Nothing but one bit per element and the seed is kept for backward.
    Raises RuntimeError for lower > upper or bounds that are not finite, ValueError for "divisor" with lower <= 0 or
    bounds outside [2**-126, 2**126], where float32 has a normal inverse.
    """
    return ops.run(input, Parameters(bias, seed=seed if training else None), rules.rrelu(lower, upper, law, training))


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
    return _rectify_(input, Parameters(bias, seed=seed if training else None), rules.rrelu(lower, upper, law, training))


def _rectify_(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> Tensor:
    ops.run_(input, parameters, rule, bias_added)
    return input


def slope_tensor(weight: Tensor) -> Tensor:
    """PReLU's slopes. Raises TypeError for what is no tensor."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor of shape (1,) or (C,), got {type(weight).__name__}")
    return weight


# ---- behind a map: a convolution, a transposed convolution or a linear map ----


def map_adds_bias(rank: int, device: torch.device) -> bool:
    """Whether the map's own kernel adds the bias before it rounds; if not, the epilogue does.

    Linear's matrix products do on every device, and so do the CPU's convolutions. cuDNN's leave the bias to a pass of
    its own over their rounded output, which is what the epilogue saves. ``rank``: spatial dims, 0 for a linear map.
    """
    return rank == 0 or device.type == "cpu"


class Shared(NamedTuple):
    """A bias, shared out: what the map adds, what the epilogue gets, and whether the latter is added already."""

    map: Tensor | None
    epilogue: Tensor | None
    added: bool


def share_bias(bias: Tensor | None, rank: int, device: torch.device) -> Shared:
    """Who gets the bias of a map; `map_adds_bias` says who adds it.

    In training the map gets it without history: the gradient is summed in the rectifier's pass over the output's. But a
    function transform may differentiate again, by a history that each of its levels has to see: there it is the map's.
    """
    if bias is None or not map_adds_bias(rank, device):
        return Shared(None, bias, False)
    if not (torch.is_grad_enabled() and bias.requires_grad):
        return Shared(bias, None, False)
    if transforms_active() or torch.compiler.is_exporting():
        return Shared(bias, None, False)
    return Shared(bias.detach(), bias, True)


def epilogue(z: Tensor, rank: int, parameters: Parameters, rule: Rule, bias_added: bool = False) -> Tensor:
    """Rectify a map's output that nobody else holds, with its channels in dim -1 of a linear map, else dim -1 - rank.

    rank: spatial dims, 0 for a linear map. bias_added: ``z`` holds the bias already; see :mod:`fused_rect.ops`.
    Raises what the functions above raise.
    """
    lying = channels_second(z, rank)
    run = _rectify_ if _may_overwrite(lying, parameters, rule) else ops.run
    out = run(lying, parameters, rule, bias_added)
    return out if lying is z else out.view(z.shape)


def channels_second(z: Tensor, rank: int) -> Tensor:
    """A map's output with its channels in dim 1: itself, or what autograd takes for no view, of which in-place calls
    would make copies."""
    shape = (-1, z.shape[-1]) if rank == 0 else (1, *z.shape) if z.dim() == rank + 1 else z.shape
    if len(shape) == z.dim():
        return z
    lying: Tensor = torch.ops.aten._unsafe_view(z.contiguous() if rank == 0 else z, shape)
    return lying


def _may_overwrite(z: Tensor, parameters: Parameters, rule: Rule) -> bool:
    """Unless backward reads the output of the map, or somebody else may.

    Exported programs and DTensors get the op without mutation: a clean node there, a sharding rule here. Under function
    transforms the input is kept. A dispatch mode may be a selective checkpoint, which keeps what convolutions returned.
    """
    if (
        rule.keeps_input
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (z, *parameters))
    ):
        return False
    return not (
        torch.compiler.is_exporting()
        or transforms_active()
        or hasattr(z, "device_mesh")
        or (not torch.compiler.is_compiling() and dispatch_modes() > 0)
    )


def _fused(
    function: Callable[..., Tensor],
    rank: int,
    input: Tensor,
    weight: Tensor,
    arguments: tuple[Any, ...],
    parameters: Parameters,
    rule: Rule,
) -> Tensor:
    bias = share_bias(parameters.bias, rank, input.device)
    z = function(input, weight, bias.map, *arguments)
    return epilogue(z, rank, parameters._replace(bias=bias.epilogue), rule, bias.added)


# The maps' own arguments behind (input, weight, bias), as torch has them; the rectifiers' keywords and what they mean.
_LINEAR = ""
_CONVOLUTION = "stride: Size = 1, padding: Size | str = 0, dilation: Size = 1, groups: int = 1"
_TRANSPOSED = "stride: Size = 1, padding: Size = 0, output_padding: Size = 0, groups: int = 1, dilation: Size = 1"
_RECTIFIERS = {
    "relu": ("", "Parameters(bias), RELU"),
    "leaky_relu": ("negative_slope: float = 0.01", "Parameters(bias), rules.leaky_relu(negative_slope)"),
    "prelu": ("slope: Tensor", "Parameters(bias, slope_tensor(slope)), PRELU"),
    "rrelu": (
        "lower: float | None = None, upper: float | None = None, training: bool = False, law: str = 'slope', "
        "seed: Tensor | None = None",
        "Parameters(bias, seed=seed if training else None), rules.rrelu(lower, upper, law, training)",
    ),
}


def _behind(function: Callable[..., Tensor], rank: int, own: str) -> tuple[Callable[..., Tensor], ...]:
    """The four fused functions behind a map. Compiled from their signatures, as dataclasses' are: 28 functions show
    their real arguments, and no call binds them."""
    arguments = re.findall(r"(\w+):", own)
    made = []
    for rectifier, (keywords, meaning) in _RECTIFIERS.items():
        name = f"{function.__name__}_{rectifier}"
        signature = ", ".join(
            filter(None, ["input: Tensor, weight: Tensor, bias: Tensor | None = None", own, keywords and "*", keywords])
        )
        passed = "".join(f"{argument}, " for argument in arguments)
        source = (
            "def make(function, rank):\n"
            f"    def {name}({signature}) -> Tensor:\n"
            f"        return _fused(function, rank, input, weight, ({passed}), {meaning})\n"
            f"    return {name}\n"
        )
        scope: dict[str, Any] = {}
        exec(source, globals(), scope)
        fused = scope["make"](function, rank)
        fused.__qualname__ = name
        fused.__doc__ = (
            f"`torch.nn.functional.{function.__name__}`, then :func:`bias_{rectifier}`, its arguments as keywords.\n\n"
            "PReLU's tensor is `slope`. What is kept for backward: see :mod:`fused_rect.rules`."
        )
        made.append(leaf(fused))
    return tuple(made)


linear_relu, linear_leaky_relu, linear_prelu, linear_rrelu = _behind(F.linear, 0, _LINEAR)
conv1d_relu, conv1d_leaky_relu, conv1d_prelu, conv1d_rrelu = _behind(F.conv1d, 1, _CONVOLUTION)
conv2d_relu, conv2d_leaky_relu, conv2d_prelu, conv2d_rrelu = _behind(F.conv2d, 2, _CONVOLUTION)
conv3d_relu, conv3d_leaky_relu, conv3d_prelu, conv3d_rrelu = _behind(F.conv3d, 3, _CONVOLUTION)
conv_transpose1d_relu, conv_transpose1d_leaky_relu, conv_transpose1d_prelu, conv_transpose1d_rrelu = _behind(
    F.conv_transpose1d, 1, _TRANSPOSED
)
conv_transpose2d_relu, conv_transpose2d_leaky_relu, conv_transpose2d_prelu, conv_transpose2d_rrelu = _behind(
    F.conv_transpose2d, 2, _TRANSPOSED
)
conv_transpose3d_relu, conv_transpose3d_leaky_relu, conv_transpose3d_prelu, conv_transpose3d_rrelu = _behind(
    F.conv_transpose3d, 3, _TRANSPOSED
)
