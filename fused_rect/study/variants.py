"""The five rectifiers that the paper compares, and the layers that carry them: fused, or as plain torch for comparison.

Fused and plain layers have the same state_dict, so both start from the same weights. The paper's text multiplies by `a`
in training and divides by it in evaluation; its authors' code divides in both, which is what "divisor" means here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_rect as fr

from .. import functional, rules
from ..nn import epilogue_arguments
from ..rules import Parameters


@dataclass(frozen=True)
class Variant:
    key: str
    label: str
    rectifier: str  # "relu" | "leaky_relu" | "prelu" | "rrelu"
    negative_slope: float = 0.0


VARIANTS = {
    v.key: v
    for v in (
        Variant("relu", "ReLU", "relu"),
        Variant("leaky100", "Leaky ReLU, a = 100", "leaky_relu", 1 / 100),
        Variant("leaky5.5", "Leaky ReLU, a = 5.5", "leaky_relu", 1 / 5.5),
        Variant("prelu", "PReLU", "prelu"),
        Variant("rrelu", "RReLU, U(3, 8)", "rrelu"),
    )
}


@dataclass(frozen=True)
class Layers:
    """What builds a network's layers: one variant, fused or eager, under one law for RReLU."""

    variant: Variant
    fused: bool = True
    law: str = "divisor"

    def conv(self, inputs: int, outputs: int, kernel: int, padding: int = 0) -> nn.Module:
        if self.fused:
            return self._fused("Conv{}2d")(inputs, outputs, kernel, padding=padding, **self._own(outputs))
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=padding), self.activation(outputs))

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        if self.fused:
            return self._fused("Linear{}")(inputs, outputs, **self._own(outputs))
        return nn.Sequential(nn.Linear(inputs, outputs), self.activation(outputs))

    def conv_norm(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        norm = nn.BatchNorm2d(outputs)
        return (ConvNormRectifier if self.fused else nn.Sequential)(conv, norm, self.activation(outputs))

    def activation(self, channels: int) -> nn.Module:
        """The rectifier alone; one slope a channel for PReLU, which starts at .25 as He et al. have it."""
        if self.variant.rectifier == "rrelu" and not self.fused:
            return nn.RReLU(*rules.RULES["rrelu"].defaults) if self.law == "slope" else DivisorRReLU()
        where = fr.nn if self.variant.rectifier == "rrelu" else nn
        return getattr(where, self._module)(**self._own(channels))  # type: ignore[no-any-return]

    @property
    def _module(self) -> str:
        return rules.RULES[self.variant.rectifier].module

    def _fused(self, name: str) -> Callable[..., nn.Module]:
        return getattr(fr.nn, name.format(self._module))  # type: ignore[no-any-return]

    def _own(self, channels: int) -> dict[str, Any]:
        """The rectifier's own arguments."""
        own: dict[str, dict[str, Any]] = {
            "relu": {},
            "leaky_relu": {"negative_slope": self.variant.negative_slope},
            "prelu": {"num_parameters": channels, "init": 0.25},
            "rrelu": {"law": self.law},
        }
        return own[self.variant.rectifier]


class DivisorRReLU(nn.Module):
    """The paper's RReLU as plain torch operations: z / a, a ~ U(3, 8) in training, z / 5.5 in evaluation."""

    lower, upper = rules.RULES["rrelu_divisor"].defaults

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.leaky_relu(input, 2 / (self.lower + self.upper))
        divisor = torch.empty_like(input).uniform_(self.lower, self.upper)
        return torch.where(input > 0, input, input / divisor)


class ConvNormRectifier(nn.Sequential):
    """Convolution, BatchNorm, rectifier; BatchNorm's shift is the bias that the fused epilogue adds."""

    def forward(self, input: Tensor) -> Tensor:
        conv, norm, activation = self
        assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
        weight, rule = epilogue_arguments(activation)
        if isinstance(norm, nn.SyncBatchNorm):  # it has no form without shift
            return functional.epilogue(norm(conv(input)), 2, Parameters(weight=weight), rule)
        momentum = 0.0 if norm.momentum is None else norm.momentum
        z = F.batch_norm(
            conv(input), norm.running_mean, norm.running_var, norm.weight, None, norm.training, momentum, norm.eps
        )
        return functional.epilogue(z, 2, Parameters(norm.bias, weight), rule)
