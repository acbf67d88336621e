"""A linear map module and a rectifier module, called together: fused where exact, one after the other elsewhere.

The decision is taken at each call (hooks may come and go), so a call here always means `activation(linear_map(input))`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import functional
from ..nn import RReLU, epilogue_arguments, fused
from ..ops.checks import FLOATING
from ..rules import RELU, Parameters, Rule, leaky_relu

_LINEAR_MAPS: dict[Any, str] = {
    nn.Linear.forward: "linear",
    nn.Conv1d.forward: "conv1d",
    nn.Conv2d.forward: "conv2d",
    nn.Conv3d.forward: "conv3d",
    nn.ConvTranspose1d.forward: "conv_transpose1d",
    nn.ConvTranspose2d.forward: "conv_transpose2d",
    nn.ConvTranspose3d.forward: "conv_transpose3d",
}
_RECTIFIERS: dict[Any, str] = {
    nn.ReLU.forward: "relu",
    nn.LeakyReLU.forward: "leaky_relu",
    nn.PReLU.forward: "prelu",
    nn.RReLU.forward: "rrelu",
    RReLU.forward: "rrelu",
}
METHODS = ("relu", "relu_")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONV_FORWARDS = tuple(c._conv_forward for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d))
# Hooks that compute the weight and look at nothing else; they are run before the fused call.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm)


def linear_map_name(module: Any) -> str | None:
    return _LINEAR_MAPS.get(getattr(type(module), "forward", None))


def rectifier_name(module: Any) -> str | None:
    return _RECTIFIERS.get(getattr(type(module), "forward", None))


def is_norm(module: Any) -> bool:
    return isinstance(module, _NORMS) and type(module).forward is nn.BatchNorm2d.forward


def obstacle(activation: nn.Module, linear_map: Any) -> str | None:
    """Why the two cannot be called as one without somebody noticing, or None."""
    if linear_map_name(linear_map) is None:
        return f"{type(linear_map).__name__} is not a convolution or linear map with torch's own forward"
    if rectifier_name(activation) is None:
        return f"{type(activation).__name__} is not a rectifier with torch's own forward"
    if "forward" in linear_map.__dict__ or "forward" in activation.__dict__:
        return "forward was replaced on the instance"
    if hasattr(linear_map, "_conv_forward") and type(linear_map)._conv_forward not in _CONV_FORWARDS:
        return f"{type(linear_map).__name__} overrides _conv_forward"
    if is_watched(activation):
        return "the rectifier has hooks"
    if _hooked(linear_map) or not all(isinstance(h, _WEIGHT_HOOKS) for h in linear_map._forward_pre_hooks.values()):
        return "the convolution has hooks"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook of ``module`` would notice that its call is left out."""
    return _hooked(module) or bool(module._forward_pre_hooks)


def globally_hooked() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def call_pair(activation: Any, linear_map: Any, *args: Any, **kwargs: Any) -> Any:
    """activation(linear_map(*args, **kwargs)), in one pass where the two are a fusable pair."""
    size: Any = kwargs.get("output_size")
    if (
        len(args) != 1
        or (kwargs and not (kwargs.keys() == {"output_size"} and getattr(linear_map, "transposed", False)))
        or not isinstance(args[0], Tensor)
        or args[0].dtype not in FLOATING
        or not isinstance(activation, nn.Module)
        or not isinstance(linear_map, nn.Module)
        or obstacle(activation, linear_map) is not None
        or globally_hooked()
        or _slopes_elsewhere(activation, linear_map, args[0])
    ):
        return activation(linear_map(*args, **kwargs))
    input = args[0]
    for hook in linear_map._forward_pre_hooks.values():
        hook(linear_map, args)
    return fused(linear_map, input, *epilogue_arguments(activation), size)


def _slopes_elsewhere(activation: nn.Module, linear_map: Any, input: Tensor) -> bool:
    """PReLU's slopes go along dim 1: not the channels of an unbatched input or of a Linear's (N, T, features)."""
    rank = 2 if isinstance(linear_map, nn.Linear) else len(linear_map.kernel_size) + 2
    return isinstance(activation, nn.PReLU) and activation.weight.numel() > 1 and input.dim() != rank


def call_function_pair(
    function: Any, rest: tuple[Any, ...], options: dict[str, Any], linear_map: Any, *args: Any, **kwargs: Any
) -> Any:
    """function(linear_map(*args, **kwargs), *rest, **options); fused where ``function`` is a functional rectifier.

    A name in ``METHODS`` is that method of the linear map's output.
    """
    rectifier = _functional_rule(function, rest, options)
    if (
        rectifier is None
        or len(args) != 1
        or kwargs
        or not isinstance(args[0], Tensor)
        or args[0].dtype not in FLOATING
        or not isinstance(linear_map, nn.Module)
        or obstacle(_PROBE, linear_map) is not None
        or globally_hooked()
    ):
        out = linear_map(*args, **kwargs)
        return getattr(out, function)() if isinstance(function, str) else function(out, *rest, **options)
    for hook in linear_map._forward_pre_hooks.values():
        hook(linear_map, args)
    return fused(linear_map, args[0], None, rectifier)


_PROBE = nn.ReLU()  # a rectifier without hooks: leaves the linear map's own obstacles


def _functional_rule(function: Any, rest: tuple[Any, ...], options: dict[str, Any]) -> Rule | None:
    """The rule of F.relu or F.leaky_relu as called; others (random or with a tensor of slopes) are left as written."""
    if function in (nn.functional.relu, nn.functional.relu_, torch.relu, torch.relu_, *METHODS):
        return RELU
    if function in (nn.functional.leaky_relu, nn.functional.leaky_relu_):
        slope = rest[0] if rest else options.get("negative_slope", 0.01)
        return leaky_relu(slope)
    return None


def call_normalized(activation: nn.Module, norm: Any, linear_map: Any, input: Any) -> Any:
    """activation(norm(linear_map(input))); an evaluating BatchNorm is folded into the convolution, anew at each call.

    The fold is computed, never stored: parameters, statistics and gradients stay those of the three modules.
    """
    if (
        norm.training
        or norm.running_mean is None
        or not isinstance(input, Tensor)
        or input.dtype not in FLOATING
        or is_watched(norm)
        or obstacle(activation, linear_map) is not None
        or linear_map_name(linear_map) not in ("conv1d", "conv2d", "conv3d")
        or torch.is_autocast_enabled(input.device.type)
        or globally_hooked()
        or input.dim() != len(linear_map.kernel_size) + 2
    ):
        return activation(norm(linear_map(input)))
    for hook in linear_map._forward_pre_hooks.values():
        hook(linear_map, (input,))
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean * scale if linear_map.bias is None else (linear_map.bias - norm.running_mean) * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    kernel = linear_map.weight * scale.view(-1, *[1] * (linear_map.weight.dim() - 1))
    slope, rule = epilogue_arguments(activation)
    rank = len(linear_map.kernel_size)
    of_map, of_epilogue, added = functional.share_bias(bias, rank, input.device)
    z = linear_map._conv_forward(input, kernel, of_map)
    return functional.epilogue(z, rank, Parameters(of_epilogue, slope), rule, added)
