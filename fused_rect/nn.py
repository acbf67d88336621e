"""Fused layers: drop-in replacements of `nn.Sequential(convolution, rectifier)`.

As torch's own `torch.ao.nn.intrinsic.ConvReLU2d`, each is a Sequential of the two modules, so its state_dict is that of
`nn.Sequential(nn.Conv2d(...), nn.PReLU(...))` ("0.weight", "0.bias", "1.weight") and loads either way.

The constructor takes the convolution's arguments as torch's class does, then the rectifier's as keywords:

    ConvReLU2d(in_channels, out_channels, kernel_size, ...)
    ConvLeakyReLU2d(..., negative_slope=0.01)
    ConvPReLU2d(..., num_parameters=1, init=0.25)
    ConvRReLU2d(..., lower=1/8, upper=1/3, law="slope")       law="divisor": bounds 3 and 8, slope = 1 / divisor

for 1d, 2d, 3d, for ConvTranspose*, and Linear* (in_features, out_features, ...).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from . import backends, functional, rules
from .rules import PRELU, RELU, Parameters, Rule
from .tracing import leaf_module


class RReLU(nn.RReLU):
    """`torch.nn.RReLU` on the fused kernels, with the paper's law beside torch's.

    lower, upper: by default (1/8, 1/3) for law="slope" and (3, 8) for law="divisor"; see
    :func:`fused_rect.functional.bias_rrelu`. Keeps one bit per element and a seed for backward, not the noise.
    """

    def __init__(
        self, lower: float | None = None, upper: float | None = None, inplace: bool = False, law: str = "slope"
    ) -> None:
        rule = rules.rrelu(lower, upper, law)
        super().__init__(rule.lower, rule.upper, inplace)
        self.law = law

    def forward(self, input: Tensor) -> Tensor:
        function = functional.bias_rrelu_ if self.inplace else functional.bias_rrelu
        return function(input, None, self.lower, self.upper, self.training, law=self.law)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, law={self.law!r}"


def epilogue_arguments(activation: nn.Module) -> tuple[Tensor | None, Rule]:
    """(weight, rule) of one call of ``activation``. Raises TypeError for a module that is no rectifier."""
    if isinstance(activation, nn.ReLU):
        return None, RELU
    if isinstance(activation, nn.LeakyReLU):
        return None, rules.leaky_relu(activation.negative_slope)
    if isinstance(activation, nn.PReLU):
        return activation.weight, PRELU
    if isinstance(activation, nn.RReLU):
        law = getattr(activation, "law", "slope")
        return None, rules.rrelu(activation.lower, activation.upper, law, activation.training)
    raise TypeError(f"activation must be ReLU, LeakyReLU, PReLU or RReLU, got {type(activation).__name__}")


# Maps that may run with their rectifier in one call of C++ (kernels/direct/), which subclasses may not: whether they
# add their bias to CPU and to CUDA tensors.
_ADDS_BIAS: dict[type[nn.Module], tuple[bool, ...]] = {
    linear_map: tuple(functional.map_adds_bias(rank, torch.device(kind)) for kind in ("cpu", "cuda"))
    for linear_map, rank in (
        (nn.Linear, 0), (nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3),
        (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3),
    )
}  # fmt: skip


class Fused(nn.Sequential):
    """A linear map and a rectifier, run as the map and one epilogue over its output."""

    linear_map: ClassVar[type[nn.Module]]
    rectifier: ClassVar[type[nn.Module]]
    rectifier_arguments: ClassVar[tuple[str, ...]] = ()
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, of: type[nn.Module] | None = None) -> None:
        """Layers ``of`` a linear map. The signature that users see: the map's own, then the rectifier's keywords."""
        super().__init_subclass__()
        if of is not None:
            own = inspect.signature(cls.rectifier).parameters
            keywords = [own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in cls.rectifier_arguments]
            maps = inspect.signature(of)
            cls.linear_map = of
            cls.__signature__ = maps.replace(parameters=[*maps.parameters.values(), *keywords])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in self.rectifier_arguments if name in kwargs}
        if self.rectifier is nn.PReLU:
            own |= {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
        super().__init__(self.linear_map(*args, **kwargs), self.rectifier(**own))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the linear map's forward, rectified; ``output_size`` is for transposed convolutions alone."""
        if isinstance(input, Proxy):
            traced: Tensor = leaf_module(self, input, *(() if output_size is None else (output_size,)))
            return traced
        modules = self._modules
        linear_map, activation = modules["0"], modules["1"]
        assert linear_map is not None and activation is not None
        weight, rule = epilogue_arguments(activation)
        calls, adds_bias = backends.direct(input), _ADDS_BIAS.get(type(linear_map))
        if calls is not None and adds_bias is not None and output_size is None:
            adds = adds_bias[input.is_cuda]
            out: Tensor | None = calls.layer(input, linear_map.__dict__, adds, Parameters(weight=weight), rule)
            if out is not None:
                return out
        return fused(linear_map, input, weight, rule, output_size)


def fused(
    linear_map: Any, input: Tensor, weight: Tensor | None, rule: Rule, output_size: list[int] | None = None
) -> Tensor:
    """The rectified output of the module ``linear_map``; ``weight`` and ``rule`` as `epilogue_arguments` has them."""
    rank = len(getattr(linear_map, "kernel_size", ()))
    bias, of_epilogue, added = functional.share_bias(_parameter(linear_map, "bias"), rank, input.device)
    if not rank:
        z = F.linear(input, _parameter(linear_map, "weight"), bias)
    elif linear_map.transposed:
        z = _transposed(linear_map, rank, input, bias, output_size)
    else:
        z = linear_map._conv_forward(input, _parameter(linear_map, "weight"), bias)
    return functional.epilogue(z, rank, Parameters(of_epilogue, weight), rule, added)


def _parameter(module: nn.Module, name: str) -> Any:
    """``module.name``; torch's own way there takes 1 us, as much as a hundredth of a small layer's step."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _transposed(m: Any, rank: int, input: Tensor, bias: Tensor | None, output_size: list[int] | None) -> Tensor:
    if m.padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros' for {type(m).__name__}, got {m.padding_mode!r}")
    output_padding = m._output_padding(
        input, output_size, list(m.stride), list(m.padding), list(m.kernel_size), rank, list(m.dilation)
    )
    return _TRANSPOSED[rank](input, m.weight, bias, m.stride, m.padding, output_padding, m.groups, m.dilation)


class _ReLU(Fused):
    rectifier = nn.ReLU


class _LeakyReLU(Fused):
    rectifier = nn.LeakyReLU
    rectifier_arguments = ("negative_slope",)


class _PReLU(Fused):
    rectifier = nn.PReLU
    rectifier_arguments = ("num_parameters", "init")


class _RReLU(Fused):
    rectifier = RReLU
    rectifier_arguments = ("lower", "upper", "law")


# fmt: off
class ConvReLU1d(_ReLU, of=nn.Conv1d): ...
class ConvLeakyReLU1d(_LeakyReLU, of=nn.Conv1d): ...
class ConvPReLU1d(_PReLU, of=nn.Conv1d): ...
class ConvRReLU1d(_RReLU, of=nn.Conv1d): ...
class ConvReLU2d(_ReLU, of=nn.Conv2d): ...
class ConvLeakyReLU2d(_LeakyReLU, of=nn.Conv2d): ...
class ConvPReLU2d(_PReLU, of=nn.Conv2d): ...
class ConvRReLU2d(_RReLU, of=nn.Conv2d): ...
class ConvReLU3d(_ReLU, of=nn.Conv3d): ...
class ConvLeakyReLU3d(_LeakyReLU, of=nn.Conv3d): ...
class ConvPReLU3d(_PReLU, of=nn.Conv3d): ...
class ConvRReLU3d(_RReLU, of=nn.Conv3d): ...
class ConvTransposeReLU1d(_ReLU, of=nn.ConvTranspose1d): ...
class ConvTransposeLeakyReLU1d(_LeakyReLU, of=nn.ConvTranspose1d): ...
class ConvTransposePReLU1d(_PReLU, of=nn.ConvTranspose1d): ...
class ConvTransposeRReLU1d(_RReLU, of=nn.ConvTranspose1d): ...
class ConvTransposeReLU2d(_ReLU, of=nn.ConvTranspose2d): ...
class ConvTransposeLeakyReLU2d(_LeakyReLU, of=nn.ConvTranspose2d): ...
class ConvTransposePReLU2d(_PReLU, of=nn.ConvTranspose2d): ...
class ConvTransposeRReLU2d(_RReLU, of=nn.ConvTranspose2d): ...
class ConvTransposeReLU3d(_ReLU, of=nn.ConvTranspose3d): ...
class ConvTransposeLeakyReLU3d(_LeakyReLU, of=nn.ConvTranspose3d): ...
class ConvTransposePReLU3d(_PReLU, of=nn.ConvTranspose3d): ...
class ConvTransposeRReLU3d(_RReLU, of=nn.ConvTranspose3d): ...
class LinearReLU(_ReLU, of=nn.Linear): ...
class LinearLeakyReLU(_LeakyReLU, of=nn.Linear): ...
class LinearPReLU(_PReLU, of=nn.Linear): ...
class LinearRReLU(_RReLU, of=nn.Linear): ...
