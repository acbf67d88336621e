"""The table that everything else reads: a rectifier is a rule for the slope of the negative side.

y = z where z > 0, else slope * z, with z = convolution output + bias.

| rectifier | slope                    | evaluation | backward needs                                   |
|-----------|--------------------------|------------|--------------------------------------------------|
| ReLU      | 0                        | same       | the output                                       |
| LeakyReLU | a constant               | same       | the output (slope >= 0), else the conv output    |
| PReLU     | learned                  | same       | the conv output, the bias and the weight         |
| RReLU     | random, one per element  | a constant | the output and an 8-byte seed (lower >= 0), else the conv output |

Source: Xu et al. 2015, arXiv 1505.00853; PReLU: He et al. 2015, arXiv 1502.01852.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Union

Law = Literal["slope", "divisor"]

# PyTorch's bounds, as a slope, and the paper's, as a divisor: the same support, different laws (means .2292 and .1962).
DEFAULT_BOUNDS: dict[str, tuple[float, float]] = {"slope": (1 / 8, 1 / 3), "divisor": (3.0, 8.0)}
DIVISORS = (2.0**-126, 2.0**126)  # numbers whose inverse is normal in float32

RANDOM = ("rrelu", "rrelu_divisor")


@dataclass(frozen=True)
class ReLU:
    op: str = "relu"
    lower: float = 0.0
    upper: float = 0.0


@dataclass(frozen=True)
class LeakyReLU:
    negative_slope: float = 0.01
    op: str = "leaky_relu"

    @property
    def lower(self) -> float:
        return self.negative_slope

    upper = lower


@dataclass(frozen=True)
class PReLU:
    """The slope is the tensor ``weight``; nothing else to hold."""

    op: str = "prelu"
    lower: float = 0.0
    upper: float = 0.0


@dataclass(frozen=True)
class RReLU:
    """``law="slope"``: slope ~ U(lower, upper). ``law="divisor"``: slope = 1 / U(lower, upper), as the paper's code."""

    lower: float
    upper: float
    law: Law = "slope"

    @property
    def op(self) -> str:
        return "rrelu" if self.law == "slope" else "rrelu_divisor"

    def evaluation(self) -> LeakyReLU:
        midpoint = (self.lower + self.upper) / 2
        return LeakyReLU(midpoint if self.law == "slope" else 1 / midpoint)


Rectifier = Union[ReLU, LeakyReLU, PReLU, RReLU]


def saves_output(op: str, lower: float) -> bool:
    """Whether backward reads the output: true where sign(output) = sign(z), so the conv output may be overwritten."""
    return op in ("relu", "rrelu_divisor") or (op in ("leaky_relu", "rrelu") and lower >= 0)


def rrelu(lower: float | None, upper: float | None, law: str) -> RReLU:
    """A checked RReLU. ``None`` bounds mean the law's own (:data:`DEFAULT_BOUNDS`).

    Raises ValueError for an unknown law and RuntimeError, as torch, for bounds that are not finite or out of order.
    """
    if law not in ("slope", "divisor"):
        raise ValueError(f"law must be 'slope' or 'divisor', got {law!r}")
    defaults = DEFAULT_BOUNDS[law]
    lower = defaults[0] if lower is None else lower
    upper = defaults[1] if upper is None else upper
    if not (math.isfinite(lower) and math.isfinite(upper)):
        raise RuntimeError(f"rrelu: lower and upper must be finite, got lower={lower}, upper={upper}")
    if lower > upper:
        raise RuntimeError(
            f"Lower bound should be less than or equal to the upper bound, got lower={lower}, upper={upper}"
        )
    if law == "divisor" and lower <= 0:
        raise ValueError(
            f"law='divisor' draws the divisor of the negative side, so lower must be > 0, got lower={lower}; "
            "use law='slope' for slopes that may be 0 or negative"
        )
    if law == "divisor" and not DIVISORS[0] <= lower <= upper <= DIVISORS[1]:
        raise ValueError(
            f"the bounds of law='divisor' must lie in [2**-126, 2**126], where float32 has a normal inverse, "
            f"got lower={lower}, upper={upper}"
        )
    return RReLU(lower, upper, "slope" if law == "slope" else "divisor")
