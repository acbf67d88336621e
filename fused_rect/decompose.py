"""The ops as standard torch operations, for consumers that know no others: ONNX, other compilers.

program = torch.export.export(model.eval(), (x,)).run_decompositions(fused_rect.decompose.table())
torch.onnx.export(program, f="model.onnx")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .reference import add_bias, along_channels


def table() -> dict[Any, Callable[..., Any]]:
    """Torch's own decompositions and ours."""
    return {**torch.export.default_decompositions(), ops.rectify: rectify}


def rectify(
    input: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    rectifier: str,
    lower: float,
    upper: float,
) -> Tensor:
    """`torch.ops.fused_rect.rectify` in torch's operations. RReLU's random slopes have none: RuntimeError."""
    z = add_bias(input, bias)
    if rectifier == "relu":
        out = F.relu(z)
    elif rectifier == "leaky_relu":
        out = F.leaky_relu(z, lower)
    elif rectifier == "prelu":
        assert weight is not None
        out = torch.where(z > 0, z, z * along_channels(weight, z))
    else:
        raise RuntimeError("RReLU in training has no standard operation; export the model in evaluation, model.eval()")
    return out.to(input.dtype)
