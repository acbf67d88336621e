"""What one call has to move and compute: the one declaration of bytes and flops that profiles and rooflines read.

Pure Python, no torch, no triton. Bytes are the least any implementation of the call can move: each tensor once. The
Triton kernels attach it to their launches (`launch_metadata`), so that Proton shows achieved bandwidth by kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..rules import RULES

SEED = 8
# Floating-point operations an element beyond the bias's addition: the comparison, and the slope's product. A random
# slope is one fma of its word; the divisor law divides too. Philox is integer work and counts as none.
_RULE_FLOPS = {"relu": 1, "leaky_relu": 2, "prelu": 2, "rrelu": 4, "rrelu_divisor": 5}


@dataclass(frozen=True)
class Traffic:
    """Bytes ``read`` and ``written`` by one call, bytes ``saved`` for its backward, floating-point operations."""

    read: int
    written: int
    saved: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def forward(
    rule: str,
    size: int,
    itemsize: int,
    *,
    bias: int = 0,
    weight: int = 0,
    parameter_itemsize: int = 0,
    lower: float = 0.0,
) -> Traffic:
    """out = rectify(input + bias) of ``size`` elements of ``itemsize`` bytes.

    ``bias`` and ``weight``: lengths of the parameters, 0 where absent; ``parameter_itemsize``: theirs, if another.
    """
    item = parameter_itemsize or itemsize
    seed = SEED if RULES[rule].law else 0
    saved = size * itemsize + seed + weight * item + (bias * item if RULES[rule].slope == "learned" else 0)
    return Traffic(
        read=size * itemsize + (bias + weight) * item + seed,
        written=size * itemsize,
        saved=saved,
        flops=size * (_RULE_FLOPS[rule] + bool(bias)),
    )


def backward(
    rule: str,
    size: int,
    itemsize: int,
    *,
    bias: int = 0,
    weight: int = 0,
    parameter_itemsize: int = 0,
    lower: float = 0.0,
    sum_bias: bool = False,
    sum_weight: bool = False,
) -> Traffic:
    """grad_input and the sums asked for: grad and the saved tensor are read, grad_input and the sums written."""
    item = parameter_itemsize or itemsize
    seed = SEED if RULES[rule].law else 0
    recomputes = bool(bias) and RULES[rule].slope == "learned"
    return Traffic(
        read=2 * size * itemsize + seed + weight * item + (bias * item if recomputes else 0),
        written=size * itemsize + (bias * item if sum_bias else 0) + (weight * item if sum_weight else 0),
        saved=0,
        flops=size * (_RULE_FLOPS[rule] + recomputes + sum_bias + 2 * sum_weight),
    )


def finish(partials: int, channels: int, itemsize: int = 4, out_itemsize: int = 4) -> Traffic:
    """The finishing sum over ``partials`` partial sums."""
    return Traffic(read=partials * itemsize, written=channels * out_itemsize, saved=0, flops=partials)


def launch_metadata(grid: tuple[int, ...], metadata: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """For `triton.jit(launch_metadata=...)`: a readable name, bytes and flops of a forward or backward launch."""
    backwards = "grad" in args
    data = args["grad" if backwards else "input"]
    given = [p for p in (args["bias"], args["weight"]) if p is not None]
    bias, weight = (0 if p is None else p.numel() for p in (args["bias"], args["weight"]))
    size = args["vectors"] * args["V"] + args["tail"]
    parameter_itemsize = given[0].element_size() if given else 0
    if backwards:
        # A bias comes along only where it has to be added again, to the convolution's output: as for a negative slope.
        traffic = backward(
            args["RULE"], size, data.element_size(),
            bias=args["channels"] if args["SUM_BIAS"] else bias, weight=weight, parameter_itemsize=parameter_itemsize,
            lower=-1.0 if bias else 0.0, sum_bias=args["SUM_BIAS"], sum_weight=args["SUM_WEIGHT"],
        )  # fmt: skip
    else:
        traffic = forward(
            args["RULE"], size, data.element_size(), bias=bias, weight=weight, parameter_itemsize=parameter_itemsize
        )
    name = f"fused_rect_{'backward' if backwards else 'forward'}_{args['RULE']}"
    return {"name": name, "bytes": traffic.bytes, f"flops{data.element_size() // 8 * 32 + 32}": traffic.flops}
