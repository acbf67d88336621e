"""What one call has to move and compute: the one declaration of bytes and flops that profiles and rooflines read.

Pure Python, no torch, no triton. Bytes are the least any implementation of the call can move: each tensor once. The
Triton kernel attaches it to its launches (`launch_metadata`), so that Proton shows achieved bandwidth by kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..rules import RULES, Need, Rule

SEED = 8
NONE = Need()


@dataclass(frozen=True)
class Traffic:
    """Bytes ``read`` and ``written`` by one call, and its floating-point operations."""

    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def rectify(
    rule: Rule,
    size: int,
    itemsize: int,
    *,
    backward: bool = False,
    bits: bool = False,
    bias: int = 0,
    weight: int = 0,
    norm: int = 0,
    parameter_itemsize: int = 0,
    need: Need = NONE,
) -> Traffic:
    """out = rectify(input + bias) of ``size`` elements of ``itemsize`` bytes, or its backward with the sums ``need``.

    ``bits``: whether forward makes them, or backward reads them and not the input, so no bias either. ``bias``
    and ``weight``: lengths, 0 where absent; ``norm``: of a BatchNorm's statistics and weight together;
    ``parameter_itemsize``: theirs, if another.
    """
    tensor, sides = size * itemsize, -(-size // 8) if bits else 0
    item = parameter_itemsize or itemsize
    added = 0 if backward and bits else bias
    sum_bias = need.bias is not None
    read = tensor + (added + weight + norm) * item + (SEED if rule.random else 0)
    written = tensor
    flops = rule.flops + bool(added) + bool(norm)
    if backward:
        read += sides or tensor
        written += (bias * sum_bias + weight * need.weight) * item
        flops += sum_bias + 2 * need.weight
    else:
        written += sides
    return Traffic(read, written, size * flops)


def step(
    rule: Rule, size: int, itemsize: int, channels: int, slopes: int, mode: str = "training"
) -> tuple[Traffic, ...]:
    """Forward and, in "training", backward with all sums; "forward" keeps what backward needs, "inference" nothing.

    ``slopes``: the length of a learned rule's weight.
    """
    rule = rule.evaluation() if mode == "inference" else rule
    keeps, need = mode != "inference" and not rule.keeps_input, Need(itemsize, rule.learned)
    given: dict[str, Any] = {"bits": keeps, "bias": channels, "weight": slopes if rule.learned else 0}
    forward = rectify(rule, size, itemsize, **given)
    backward = rectify(rule, size, itemsize, backward=True, need=need, **given)
    return (forward, backward) if mode == "training" else (forward,)


def finish(partials: int, channels: int, itemsize: int = 4, out_itemsize: int = 4) -> Traffic:
    """The finishing sum over ``partials`` partial sums."""
    return Traffic(read=partials * itemsize, written=channels * out_itemsize, flops=partials)


def launch_metadata(grid: tuple[int, ...], metadata: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """For `triton.jit(launch_metadata=...)`: a readable name, bytes and flops of a launch."""
    backward = args["grad"] is not None
    itemsize = args["out"].element_size()
    parameters = [args[name] for name in ("bias", "weight") if args[name] is not None]
    bias, weight = (0 if args[name] is None else args[name].numel() for name in ("bias", "weight"))
    name = next(name for name, row in RULES.items() if row.slope == args["SLOPE"])
    traffic = rectify(
        Rule.default(name),
        args["vectors"] * args["V"] + args["tail"],
        itemsize,
        backward=backward,
        bits=args["bits"] is not None,
        bias=args["channels"] if args["SUM_BIAS"] else bias,
        weight=weight,
        norm=sum(args[name].numel() for name in ("mean", "var", "norm_weight") if args[name] is not None),
        parameter_itemsize=parameters[0].element_size() if parameters else 0,
        need=Need(itemsize if args["SUM_BIAS"] else None, args["SUM_WEIGHT"]),
    )
    direction = "backward" if backward else "forward"
    return {
        "name": f"fused_rect_{direction}_{name}",
        "bytes": traffic.bytes,
        f"flops{itemsize // 8 * 32 + 32}": traffic.flops,
    }
