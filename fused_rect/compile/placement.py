"""Who computes a rectifier of a compiled graph: the one rule, by what each way moves through memory and launches.

| place    | forward            | backward                                                          |
|----------|--------------------|-------------------------------------------------------------------|
| OURS     | the fused op       | the fused op                                                      |
| FORWARD  | the fused op       | inline, from the op's bits                                        |
| BACKWARD | inline             | the fused op, from what the convolution wrote and its bias        |
| INLINE   | inline             | inline, from the same                                             |
| INDUCTOR | as it is written   | Inductor's                                                        |

Inductor cannot look into an op: what it would have fused with the rectifier reads the output again, and a gradient that
it would have computed on the way is written and read. A convolution or matrix product is opaque itself, and reads and
writes memory anyway; so an op between two of them costs nothing, and saves what Inductor keeps for backward. What is
inline costs no fusion.
"""

from __future__ import annotations

from typing import NamedTuple

OURS, FORWARD, BACKWARD = "ours", "forward ours, backward inline", "forward inline, backward ours"
INLINE, INDUCTOR = "inline, from what the convolution wrote", "Inductor's"

# Bytes that a GPU's memory moves while one more kernel starts: 2 microseconds at 2 TB/s.
LAUNCH = 4e6
# Fewer are left to Inductor on CPUs: our two calls take 20 us of a training step, as much as they save of so many.
MIN_ELEMENTS = 2**11


class Around(NamedTuple):
    """What stands around a rectifier in training."""

    rectifier: str
    itemsize: int
    bias: bool  # a bias that the rectifier's pass would add
    opaque: int  # convolutions and matrix products that read the output
    fusing: int  # other readers
    ready: bool  # the output's gradient lies in memory whoever needs it
    made: bool  # so does the input: a convolution or matrix product wrote it
    summed: bool  # whether the map has a bias, whose gradient is a sum
    stages: int = 0  # kernels that Inductor launches for that sum beside the gradient's own: 2 read the gradient again
    elements: int | None = None  # None where the shape is dynamic
    reader: str = "operation"  # name of the first of the other readers
    inline: bool = True  # whether Inductor's code is as good as ours: for GPUs, where memory decides

    @property
    def places(self) -> tuple[str, ...]:
        """Where it may go, beside Inductor. Random slopes are too long for code inline: four share a counter."""
        if not self.inline or self.rectifier == "rrelu":
            return (OURS,)
        return (INLINE, BACKWARD) if self.rectifier == "prelu" else (FORWARD, OURS)


class Placed(NamedTuple):
    """Where a rectifier went, with what its backward may rely on."""

    place: str  # one of the above
    fresh: bool  # nobody else will read the output's gradient
    along: bool  # which is made in the order of the output


class Choice(NamedTuple):
    place: str
    reason: str
    ours: float | None = None  # bytes that an element of the site moves in a training step with an op of ours ...
    inductor: float | None = None  # ... and under plain Inductor


def traffic(a: Around, place: str) -> float:
    """Bytes an element in forward and backward.

    As counted from Inductor's kernels (torch 2.13). Beside the output it keeps a bool of ReLU and Leaky ReLU, and of
    RReLU the noise and a bool; ReLU's side it takes from an output that a convolution keeps. For PReLU and RReLU
    behind a convolution it writes z with its bias, and PReLU's bias gradient is a pass of its own; ours take z as the
    convolution wrote it.
    """
    s, learned = a.itemsize, a.rectifier == "prelu"
    inline = s * a.made + s * (a.opaque > 0 or not a.fusing)
    gradients = s * (a.opaque + a.fusing)  # of the readers
    again = s * (a.stages == 2)
    if place == INDUCTOR:
        from_output = a.rectifier == "relu" and a.opaque > 0  # which is there anyway, for the gradient of a weight
        kept = {"rrelu": s + 1.0, "prelu": 0.0}.get(a.rectifier, s / 2 if from_output else 1.0)  # in each direction
        biased = 2 * s if a.bias and a.rectifier in ("prelu", "rrelu") else 0
        return inline + kept + biased + gradients + kept + s + (s if learned else again)
    kept = s if learned else 1 / 8
    # An op's input is written for it where nobody wrote it, and what it writes is read again by what would have fused.
    forward = inline if learned else s + s * (not a.made) + s + s * a.fusing + kept
    if place in (FORWARD, INLINE):
        return forward + gradients + kept + s + again * (1 + learned)
    return forward + gradients + (0 if a.ready else 2 * s) + kept + s + s * (not a.made)


def launches(a: Around, place: str) -> int:
    """Kernels in forward and backward."""
    if place == INDUCTOR:
        return 2 + a.stages + (a.bias and a.rectifier in ("prelu", "rrelu"))
    forward = 1 + (place in (OURS, FORWARD) and a.fusing > 0)
    inline = 1 + a.stages + (a.rectifier == "prelu")
    return forward + (inline if place in (FORWARD, INLINE) else 1 + a.summed + (not a.ready))


def in_training(a: Around) -> Choice:
    """Where a rectifier of a training graph goes: where it moves the fewest bytes, launches beyond Inductor's counted.

    Of equals the first of its places: what is inline fuses with more than is known here.
    """
    plain = traffic(a, INDUCTOR)
    place = min(a.places, key=lambda place: traffic(a, place))
    ours = traffic(a, place)
    if ours >= plain:
        return Choice(INDUCTOR, _why(a), ours, plain)
    more = launches(a, place) - launches(a, INDUCTOR)
    if more > 0 and a.inline and (a.elements or 0) * (plain - ours) < more * LAUNCH:
        return Choice(INDUCTOR, f"it is too small for {more} kernel{'s' * (more > 1)} more", ours, plain)
    return Choice(place, "between opaque operations" if a.ready else "Inductor keeps more", ours, plain)


def _why(a: Around) -> str:
    if not a.made:
        return "Inductor fuses it with what comes before it"
    if a.fusing:
        return f"Inductor fuses it with the {a.reader} that reads its output"
    return "it moves as little"
