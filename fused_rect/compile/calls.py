"""What rewritten graphs call: a map and a rectifier, or a rectifier alone, with our backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, ops, rules
from ..ops.checks import dense_stride
from ..rules import Parameters, Rule
from .in_place import rectify_backward_
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
    inline: bool,
    fresh: bool,
    channels_last: bool,
) -> Tensor:
    """`linear_map(*arguments, **named)`, rectified. own: the rectifier's arguments.

    inline: forward in torch's operations. fresh: nobody else will read the output's gradient.
    channels_last: the map's output will lie so in memory, whatever it looks like while it is traced.
    """
    rank = RANKS[linear_map]
    z, bias, added = _mapped(linear_map, rank, *arguments, **named)
    shape = z.shape
    batched = (-1, shape[-1]) if rank == 0 else (1, *shape) if z.dim() == rank + 1 else shape
    if len(batched) != len(shape):
        z = torch.ops.aten._unsafe_view(z.contiguous() if rank == 0 else z, batched)
    parameters = Parameters(bias, own.get("weight"), seed)
    last = channels_last and z.dim() == 4
    out = _rectified(z, parameters, rule(rectifier, own), added, inline, fresh, in_place=True, channels_last=last)
    return out if len(batched) == len(shape) else out.view(shape)


def _mapped(
    linear_map: str, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor | None, bool]:
    shared = functional.share_bias(bias, rank, input.device)
    return FUNCTIONS[linear_map](input, weight, shared.map, *rest, **named), shared.epilogue, shared.added


def bare(
    input: Tensor,
    rectifier: str,
    own: dict[str, Any],
    seed: Tensor | None,
    inline: bool,
    fresh: bool,
    in_place: bool,
) -> Tensor:
    """`input`, rectified."""
    parameters = Parameters(None, own.get("weight"), seed)
    return _rectified(
        input, parameters, rule(rectifier, own), False, inline, fresh, in_place=in_place, channels_last=False
    )


def _rectified(
    z: Tensor,
    parameters: Parameters,
    rule: Rule,
    bias_added: bool,
    inline: bool,
    fresh: bool,
    in_place: bool,
    channels_last: bool,
) -> Tensor:
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, *parameters))):
        if not in_place:
            return ops.rectify(z, *ops.flat(parameters, rule), bias_added)  # type: ignore[no-any-return]
        ops.rectify_(z, *ops.flat(parameters, rule), bias_added)
        return z
    stride = _channels_last(z.shape) if channels_last else None
    apply: Any = _Rectify.apply
    out: Tensor = apply(z, *parameters, rule, bias_added, inline, fresh, in_place, stride)
    return out


def _channels_last(shape: Sequence[Any]) -> tuple[Any, ...]:
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


class _Rectify(torch.autograd.Function):
    """The op for compiled graphs: first derivatives, of tensors of the compiler's own.

    Beside that of :mod:`fused_rect.ops`, forward may be inline, and ``stride`` is the layout that the compiler will
    have chosen, while tensors that are traced still have the one that they have in eager mode.
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
        inline: bool,
        fresh: bool,
        in_place: bool,
        stride: Sequence[int] | None,
    ) -> Tensor:
        ctx.rule, ctx.bias_dtype, ctx.fresh = rule, None if bias is None else bias.dtype, fresh
        given = ops.flat(Parameters(bias, weight, seed), rule)
        if rule.keeps_input:
            ctx.stride = None
            ctx.save_for_backward(z, None if bias_added else bias, weight, seed)
            return _inline(z, None if bias_added else bias, weight) if inline else ops.rectify(z, *given, bias_added)
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
        given = ops.flat(Parameters(bias, weight, seed), ctx.rule)
        wanted = ctx.bias_dtype if need_bias else None, need_weight, ctx.stride
        if ctx.fresh:
            of_bias, of_weight = rectify_backward_(grad, kept, *given, *wanted)
        else:
            grad, of_bias, of_weight = ops.rectify_backward(grad, kept, *given, *wanted)
        return grad, of_bias if need_bias else None, of_weight if need_weight else None, *[None] * 7


def _inline(z: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
    """PReLU in torch's operations, in the precision in which the op computes it."""
    assert weight is not None
    along = (-1, *[1] * (z.dim() - 2)) if z.dim() > 1 else (-1,)
    y = z if bias is None else z + bias.view(along)
    return torch.where(y > 0, y, y * weight.view(along)).to(z.dtype)


def new_seeds(count: int, device: torch.device) -> Tensor:
    """``count`` seeds as one draw, 16 bytes apart: kernels are compiled anew for a pointer of another alignment."""
    return torch.randint(-(2**63), 2**63 - 1, (count, 2), dtype=torch.int64, device=device)


def seed_of(seeds: Tensor, index: int) -> Tensor:
    return seeds[index, :1]
