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

from . import ops, reference
from .reference import add_bias
from .rules import Parameters, Rule


def table() -> dict[Any, Callable[..., Any]]:
    """Torch's own decompositions and ours."""
    return {**torch.export.default_decompositions(), ops.rectify: ops.packed(leading=1)(rectify)}


def rectify(input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False) -> Tensor:
    """`torch.ops.fused_rect.rectify` in torch's operations. RReLU's random slopes have none: RuntimeError."""
    if rule.random:
        raise RuntimeError("RReLU in training has no standard operation; export the model in evaluation, model.eval()")
    z = add_bias(input, None if bias_added else parameters.bias)
    if rule.slope == "constant":
        return F.leaky_relu(z, rule.constants[0]).to(input.dtype)
    return reference.rectify(z, parameters._replace(bias=None), rule).to(input.dtype)
