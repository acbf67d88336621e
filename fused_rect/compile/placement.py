"""Who computes a rectifier of a compiled graph: the one rule, by the bytes that each way moves through memory.

| place    | forward                              | backward                                                   |
|----------|--------------------------------------|------------------------------------------------------------|
| OURS     | the fused op                         | the fused op                                               |
| BACKWARD | inline, fused with what follows      | the fused op, from what the convolution wrote and its bias |
| INDUCTOR | as it is written                     | Inductor's                                                 |

Inductor cannot look into an op: what it would have fused with the rectifier reads the output again, and a gradient that
it would have computed on the way is written and read. A convolution or matrix product is opaque itself, and reads and
writes memory anyway; so an op between two of them costs nothing, and saves what Inductor keeps for backward.
"""

from __future__ import annotations

from typing import NamedTuple

OURS, BACKWARD, INDUCTOR = "ours", "forward inline, backward ours", "Inductor's"

SMALL = 2048  # bytes that the sums of a bias's gradient move themselves, whatever the size


class Around(NamedTuple):
    """What stands around a rectifier in training."""

    rectifier: str
    itemsize: int
    bias: bool  # a bias that the rectifier's pass would add
    opaque: int  # convolutions and matrix products that read the output
    fusing: int  # other readers
    ready: bool  # the output's gradient lies in memory whoever needs it
    made: bool  # so does the input: a convolution or matrix product wrote it
    elements: int | None = None  # None where the shape is dynamic
    reader: str = "operation"  # name of the first of the other readers


class Choice(NamedTuple):
    place: str
    reason: str
    ours: float | None = None  # bytes that an element of the site moves in a training step with an op of ours ...
    inductor: float | None = None  # ... and under plain Inductor


def traffic(a: Around) -> tuple[float, float]:
    """Bytes an element in forward and backward: with an op of ours in it, and Inductor's alone.

    As counted from Inductor's kernels (torch 2.13). Beside the output it keeps a bool of ReLU and Leaky ReLU, and of
    RReLU the noise and a bool; ReLU's side it takes from an output that a convolution keeps. For PReLU and RReLU
    behind a convolution it writes z with its bias, and PReLU's bias gradient is a pass of its own; ours take z as the
    convolution wrote it.
    """
    s, learned = a.itemsize, a.rectifier == "prelu"
    from_output = a.rectifier == "relu" and a.opaque > 0  # which is there anyway, for the gradient of a weight
    kept = {"rrelu": s + 1.0, "prelu": 0.0}.get(a.rectifier, s / 2 if from_output else 1.0)  # in each direction
    written = s * (a.opaque > 0 or not a.fusing)
    read_again = s * (a.opaque + a.fusing)  # gradients of the readers
    biased = 2 * s if a.bias and a.rectifier in ("prelu", "rrelu") else 0
    inductor = s * a.made + written + kept + biased + read_again + kept + s * learned + s
    bits = 0 if learned else 1 / 8
    forward = s + (written if learned else s + s * a.fusing) + bits
    backward = read_again + (0 if a.ready else 2 * s) + (s if learned else bits) + s
    given = 0 if a.made else 2 * s  # written for us, and our gradient read again
    return forward + backward + given, inductor


def in_training(a: Around) -> Choice:
    """Where a rectifier of a GPU's training graph goes."""
    ours, inductor = traffic(a)
    place = BACKWARD if a.rectifier == "prelu" else OURS
    if ours >= inductor:
        return Choice(INDUCTOR, _why(a), ours, inductor)
    if a.elements is not None and a.elements * (inductor - ours) < SMALL:
        return Choice(INDUCTOR, "it is too small for an op's own sums", ours, inductor)
    return Choice(place, "between opaque operations" if a.ready else "Inductor keeps more", ours, inductor)


def _why(a: Around) -> str:
    if not a.made:
        return "Inductor fuses it with what comes before it"
    if a.fusing:
        return f"Inductor fuses it with the {a.reader} that reads its output"
    if a.opaque > 1:
        return "Inductor adds the gradients of its readers on the way"
    return "an op of ours would move as much"
