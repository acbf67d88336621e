"""What rewritten graphs call: a map and a rectifier, or a rectifier alone, with our backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, ops, rules
from ..ops.checks import dense_stride
from ..rules import Need, Parameters, Rule
from . import inline
from .in_place import rectify_backward_
from .placement import FORWARD, INLINE, OURS, Placed
from .sites import RANKS

FUNCTIONS = {name: getattr(F, name) for name in RANKS}


def rule(rectifier: str, arguments: dict[str, Any]) -> Rule:
    """The rule of a site as its arguments are in this call."""
    if rectifier == "leaky_relu":
        return rules.leaky_relu(arguments["negative_slope"])
    if rectifier == "rrelu":
        return rules.rrelu(arguments["lower"], arguments["upper"], "slope")
    return Rule.default(rectifier)


def behind_map(
    linear_map: str,
    arguments: Sequence[Any],
    named: dict[str, Any],
    rectifier: str,
    own: dict[str, Any],
    seed: Tensor | None,
    placed: Placed,
    channels_last: bool,
) -> Tensor:
    """`linear_map(*arguments, **named)`, rectified. own: the rectifier's arguments.

    channels_last: the map's output will lie so in memory, whatever it looks like while it is traced.
    """
    rank = RANKS[linear_map]
    z, bias, added = _mapped(linear_map, rank, *arguments, **named)
    lying = functional.channels_second(z, rank)
    parameters = Parameters(bias, own.get("weight"), seed)
    last = channels_last and lying.dim() == 4
    out = _rectified(lying, parameters, rule(rectifier, own), added, placed, in_place=True, channels_last=last)
    return out if lying is z else out.view(z.shape)


def _mapped(
    linear_map: str, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor | None, bool]:
    shared = functional.share_bias(bias, rank, input.device)
    return FUNCTIONS[linear_map](input, weight, shared.map, *rest, **named), shared.epilogue, shared.added


def bare(
    input: Tensor, rectifier: str, own: dict[str, Any], seed: Tensor | None, placed: Placed, in_place: bool
) -> Tensor:
    """`input`, rectified."""
    parameters = Parameters(None, own.get("weight"), seed)
    return _rectified(input, parameters, rule(rectifier, own), False, placed, in_place, channels_last=False)


def _rectified(
    z: Tensor, parameters: Parameters, rule: Rule, bias_added: bool, placed: Placed, in_place: bool, channels_last: bool
) -> Tensor:
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, *parameters))):
        if not in_place:
            return ops.rectify(z, *ops.flat(parameters, rule), bias_added)  # type: ignore[no-any-return]
        ops.rectify_(z, *ops.flat(parameters, rule), bias_added)
        return z
    stride = _channels_last(z.shape) if channels_last else None
    apply: Any = _Rectify.apply
    out: Tensor = apply(z, *parameters, rule, bias_added, placed, in_place, stride)
    return out


def _channels_last(shape: Sequence[Any]) -> tuple[Any, ...]:
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


class _Rectify(torch.autograd.Function):
    """The op for compiled graphs: first derivatives, of tensors of the compiler's own.

    Beside that of :mod:`fused_rect.ops`, each direction may be inline, and ``stride`` is the layout that the compiler
    will have chosen, while tensors that are traced still have the one that they have in eager mode.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        seed: Tensor | None,
        rule: Rule,
        bias_added: bool,
        placed: Placed,
        in_place: bool,
        stride: Sequence[int] | None,
    ) -> Tensor:
        ctx.rule, ctx.bias_dtype, ctx.placed = rule, None if bias is None else bias.dtype, placed
        given = ops.flat(Parameters(bias, weight, seed), rule)
        if rule.keeps_input:
            ctx.stride = None
            to_add = None if bias_added else bias
            ctx.save_for_backward(z, to_add, weight, seed)
            return ops.rectify(z, *given, bias_added) if placed.place == OURS else inline.forward(z, to_add, weight)
        ctx.stride = stride or dense_stride(z)
        if in_place:
            bits = ops.rectify_bits_(z, *given, bias_added, ctx.stride)
            ctx.mark_dirty(z)
        else:
            z, bits = ops.rectify_bits(z, *given, bias_added, ctx.stride)
        ctx.save_for_backward(bits, None, None, seed)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, bias, weight, seed = ctx.saved_tensors
        _, need_bias, need_weight = ctx.needs_input_grad[:3]
        parameters, need = Parameters(bias, weight, seed), Need(ctx.bias_dtype if need_bias else None, need_weight)
        place, fresh, along = ctx.placed
        if place in (FORWARD, INLINE):
            return *inline.backward(grad, kept, parameters, ctx.rule, need, ctx.stride, along), *[None] * 6
        wanted = *ops.flat(parameters, ctx.rule), *need, ctx.stride
        if fresh:
            of_bias, of_weight = rectify_backward_(grad, kept, *wanted)
        else:
            grad, of_bias, of_weight = ops.rectify_backward(grad, kept, *wanted)
        return grad, of_bias if need_bias else None, of_weight if need_weight else None, *[None] * 6


_lib = torch.library.Library("fused_rect", "FRAGMENT")
_lib.define("seeds(int count, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _seeds(count: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count, 2), dtype=torch.int64, device=device)


def _fake_seeds(count: int, device: torch.device) -> Tensor:
    return torch.empty((count, 2), dtype=torch.int64, device=device)


_lib.impl("seeds", _seeds, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rect::seeds", _fake_seeds, lib=_lib)


def new_seeds(count: int, device: torch.device) -> Tensor:
    """``count`` seeds as one draw, 16 bytes apart: kernels are compiled anew for a pointer of another alignment.

    An op, so that it is one launch: what Inductor makes of `randint` draws a seed, and then from that.
    """
    seeds: Tensor = torch.ops.fused_rect.seeds(count, device=device)
    return seeds


def seed_of(seeds: Tensor, index: int) -> Tensor:
    return seeds[index, :1]
