"""What the tests of the ops share: the rules, tensors of every layout, and the float64 specification with gradients."""

import copy
import re

import torch

import fused_rect as fr
from fused_rect import backends, reference
from fused_rect.rules import RULES as TABLE
from fused_rect.rules import Parameters, Rule

# Bounds to try beside each rule's own, by its kind of slope: slopes of 0 and of either sign.
EDGES = {"constant": [(0.0, 0.0), (-0.3, -0.3)], "drawn": [(-0.5, 0.25)]}
# name -> rule: every row of the table, and its edges
RULES = {
    **{name: Rule.default(name) for name in TABLE},
    **{
        f"{name}, {lower} to {upper}": Rule(name, lower, upper)
        for name, row in TABLE.items()
        for lower, upper in EDGES.get(row.slope, [])
    },
}
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "a slice": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


def arguments(rule, channels, dtype, bias=True, slopes=0):
    """(bias, weight, seed, *rule), as the ops take them; PReLU's weight holds ``slopes`` values, or one a channel."""
    rule = RULES[rule]
    weight = (torch.rand(slopes or channels) - 0.25).to(dtype) if rule.learned else None
    seed = torch.tensor([123456789123456789]) if rule.random else None
    return (torch.randn(channels).to(dtype) if bias else None), weight, seed, *rule


def dense(tensor):
    """``tensor`` as the op lays its output out, which is where RReLU's positions count."""
    from fused_rect.ops.checks import dense as lay

    return lay(tensor)


def specification(z, bias, weight, seed, name, lower, upper, grad):
    """(output, gradient of input, bias, weight) in float64; the slopes are those of the dtype under test."""
    rule = Rule(name, lower, upper)
    slopes = None if seed is None else reference.slopes(seed, dense(z), rule).double()
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (z, bias, weight)]
    y = reference.rectify(leaves[0], Parameters(*leaves[1:]), rule, slopes)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad.double()))
    return y.detach(), *(None if t is None else next(gradients) for t in leaves)


def _interpreted():
    """Triton's interpreter cuts float32 off to bfloat16; compiled kernels round."""
    import triton

    from fused_rect.kernels import rectify

    return backends.name("cpu") == "triton" and not isinstance(rectify.rectify, triton.JITFunction)


def assert_near(got, exact, dtype, summed=None):
    """Half a unit in the last place of ``dtype`` and a few of float32's (float64's for float64) from the exact value.

    summed: for a sum, that of the magnitudes of its terms, which is what float32's rounding is relative to.
    """
    magnitude = exact.abs() if summed is None else torch.maximum(exact.abs(), summed)
    half = 1.02 if dtype is torch.bfloat16 and _interpreted() else 0.51
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    finest = torch.finfo(dtype).smallest_normal * EPSILON[dtype]
    tolerance = exact.abs() * EPSILON[dtype] * half + magnitude * EPSILON[wide] * 4 + finest
    right = ((got.double() - exact).abs() <= tolerance) | (got.double() == exact) | (got.isnan() & exact.isnan())
    right |= got.isinf() & (exact.abs() >= torch.finfo(dtype).max) & (got.sign() == exact.sign())  # overflow
    assert right.all(), (got[~right][:5], exact[~right][:5])


def of_layer(pair):
    """The fused layer of a (map, rectifier) Sequential's two classes, a copy that shares no tensor with it."""
    linear_map, activation = pair
    name, rank = re.fullmatch(r"(.+?)(\dd)?", type(linear_map).__name__).groups(default="")
    layer_class = getattr(fr.nn, f"{name}{type(activation).__name__}{rank}")
    layer = layer_class.__new__(layer_class)
    torch.nn.Sequential.__init__(layer, *copy.deepcopy(pair))
    return layer.train(activation.training)
