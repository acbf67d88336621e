"""The table that everything else reads: a rectifier is a rule for the slope of the negative side.

y = z where z > 0, else slope * z, with z = convolution output + bias.

| rectifier | slope                   | evaluation | kept for backward                                    |
|-----------|-------------------------|------------|------------------------------------------------------|
| ReLU      | 0                       | same       | one bit per element: which side                      |
| LeakyReLU | a constant, of any sign | same       | one bit per element                                  |
| PReLU     | learned                 | same       | the conv output (z is recomputed), bias and weight   |
| RReLU     | random per element      | a constant | one bit per element and an 8-byte seed               |

Source: Xu et al. 2015, arXiv 1505.00853; PReLU: He et al. 2015, arXiv 1502.01852.

Pure Python, neither torch nor triton: everything may import it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# Where a negative side's slope comes from; the one thing that device code branches on. Its index is the number in
# C++ (kernels/cpu/call.h). Eager's choice for NaN goes with it: threshold and rrelu test z <= 0, the others z > 0.
SLOPES = ("zero", "constant", "learned", "drawn", "drawn divisor")
DIVISORS = (2.0**-126, 2.0**126)  # numbers whose inverse is normal in float32


@dataclass(frozen=True)
class Row:
    """What one rectifier is, whatever its bounds."""

    slope: str  # one of SLOPES
    module: str  # its class in torch.nn
    flops: int  # per element beyond the bias's addition: comparison, product; a drawn slope's fma; a division
    defaults: tuple[float, float]  # (lower, upper)
    law: str = ""  # of the random ones: what is uniform between the bounds
    constant: Callable[[float], float] = float  # the slope that `lower` stands for, of a constant one


# Philox is integer work and counts as no floating-point operation. PyTorch's RReLU bounds are slopes, those of the
# paper's code divisors: the same support, other laws (means .2292 and .1962).
RULES: dict[str, Row] = {
    "relu": Row("zero", "ReLU", 1, (0.0, 0.0)),
    "leaky_relu": Row("constant", "LeakyReLU", 2, (0.01, 0.01)),
    "prelu": Row("learned", "PReLU", 2, (0.0, 0.0)),
    "rrelu": Row("drawn", "RReLU", 4, (1 / 8, 1 / 3), law="slope"),
    "rrelu_divisor": Row("drawn divisor", "RReLU", 5, (3.0, 8.0), law="divisor"),
}
LAWS: dict[str, str] = {row.law: name for name, row in RULES.items() if row.law}  # law -> name of the rule


class Rule(NamedTuple):
    """A rectifier with its bounds; both are the slope of a constant one, and mean nothing for ReLU and PReLU."""

    name: str
    lower: float
    upper: float

    @classmethod
    def default(cls, name: str) -> Rule:
        return cls(name, *RULES[name].defaults)

    @property
    def row(self) -> Row:
        """Raises ValueError for a name that is none of RULES."""
        row = RULES.get(self.name)
        if row is None:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.name!r}")
        return row

    @property
    def slope(self) -> str:
        return self.row.slope

    @property
    def random(self) -> bool:
        """Whether each element's slope is drawn, from a seed."""
        return bool(self.row.law)

    @property
    def learned(self) -> bool:
        """Whether the slope is a tensor, ``weight``."""
        return self.slope == "learned"

    @property
    def keeps_input(self) -> bool:
        """Whether backward reads the conv output (a learned slope's gradient needs z), and not one bit per element."""
        return self.learned

    @property
    def nan_is_negative(self) -> bool:
        """Which side eager sends the gradient of a NaN to."""
        return self.slope in ("constant", "learned")

    @property
    def flops(self) -> int:
        return self.row.flops

    @property
    def number(self) -> int:
        """Of its kind of slope in C++."""
        return SLOPES.index(self.slope)

    @property
    def constants(self) -> tuple[float, float]:
        """What kernels compute with: (slope, 0) of a fixed one, (scale, middle) of a random one's signed word."""
        if self.random:
            return (self.upper - self.lower) * 2.0**-32, (self.upper + self.lower) / 2
        return self.row.constant(self.lower), 0.0

    def evaluation(self) -> Rule:
        """The rule outside training: a random one's slope is fixed, at the middle of the bounds."""
        if not self.random:
            return self
        middle = (self.lower + self.upper) / 2
        return leaky_relu(middle if self.slope == "drawn" else 1 / middle)


class Parameters(NamedTuple):
    """Tensors beside the input, or None: bias (C,), PReLU's weight (1,) or (C,), a random rule's seed int64 (1,)."""

    bias: Any = None
    weight: Any = None
    seed: Any = None


class Norm(NamedTuple):
    """A BatchNorm in evaluation but for its bias: running statistics (C,), its weight (C,) or None, and eps."""

    mean: Any
    var: Any
    weight: Any
    eps: float


class Need(NamedTuple):
    """Which sums backward is to make: ``bias`` is the dtype of the bias's gradient, or None for none."""

    bias: Any = None
    weight: bool = False


def numbers(rule: Rule) -> tuple[int, float, float]:
    """What C++ knows a rule by, its number and constants: a call's, in 0.2 us."""
    return _numbers(rule, signs(rule))


@functools.lru_cache(1024)
def _numbers(rule: Rule, signs: tuple[float, float]) -> tuple[int, float, float]:
    return rule.number, *rule.constants


def signs(rule: Rule) -> tuple[float, float]:
    """Of the bounds, for keys that a rule is part of: 0 and -0 are equal there, and give zeros of other signs."""
    return math.copysign(1.0, rule.lower), math.copysign(1.0, rule.upper)


RELU = Rule.default("relu")
PRELU = Rule.default("prelu")


def leaky_relu(negative_slope: float) -> Rule:
    return Rule("leaky_relu", negative_slope, negative_slope)


def rrelu(lower: float | None, upper: float | None, law: str, training: bool = True) -> Rule:
    """A checked RReLU, in evaluation the Leaky ReLU at its middle. ``None`` bounds are the law's own (`Row.defaults`).

    Raises ValueError for an unknown law and RuntimeError, as torch, for bounds that are not finite or out of order.
    """
    name = LAWS.get(law)
    if name is None:
        raise ValueError(f"law must be one of {', '.join(map(repr, LAWS))}, got {law!r}")
    least, most = RULES[name].defaults
    rule = Rule(name, least if lower is None else lower, most if upper is None else upper)
    _check_bounds(rule)
    return rule if training else rule.evaluation()


def _check_bounds(rule: Rule) -> None:
    _, lower, upper = rule
    divides = rule.slope == "drawn divisor"
    if -math.inf < lower <= upper < math.inf and (not divides or DIVISORS[0] <= lower <= upper <= DIVISORS[1]):
        return  # before a message is made, which takes longer than all else here
    got = f"got lower={lower}, upper={upper}"
    if not (math.isfinite(lower) and math.isfinite(upper)):
        raise RuntimeError(f"rrelu: lower and upper must be finite, {got}")
    if lower > upper:
        raise RuntimeError(f"Lower bound should be less than or equal to the upper bound, {got}")
    if lower <= 0:
        raise ValueError(
            f"law='divisor' draws the divisor of the negative side, so lower must be > 0, {got}; "
            "use law='slope' for slopes that may be 0 or negative"
        )
    raise ValueError(
        "the bounds of law='divisor' must lie in [2**-126, 2**126], where float32 has a normal inverse, " + got
    )
