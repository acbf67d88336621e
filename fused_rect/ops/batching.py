"""vmap over the ops: the mapped dim joins the channels, so one launch still serves all examples.

RReLU's slopes follow the position in memory, and so do the bits, so folding would give each example other ones than it
has alone. Such calls are run example by example; autograd keeps the input, not bits, under a function transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..rules import Need, Parameters, Rule

Dims = tuple[int | None, ...]


@ops.packed(leading=3)
def _rectify(
    info: Any, in_dims: Dims, input: Tensor, parameters: Parameters, rule: Rule, bias_added: bool = False
) -> tuple[Any, Any]:
    if rule.random:
        return _one_by_one(ops.rectify, info, in_dims, (input, *ops.flat(parameters, rule), bias_added))
    bias, weight, seed = parameters
    (input,), (bias, weight), unfold, _ = _fold(info.batch_size, (input,), in_dims[:1], (bias, weight), in_dims[1:3])
    return unfold(ops.rectify(input, *ops.flat(Parameters(bias, weight, seed), rule), bias_added)), 0


def _rectify_in_place(info: Any, in_dims: Dims, input: Tensor, *args: Any) -> tuple[Any, Any]:
    _check_mapped(in_dims)
    out, _ = _rectify(info, in_dims, input.clone(), *args)  # autograd may keep what it is given
    input.copy_(out.movedim(0, in_dims[0]))
    return None, None


def _rectify_bits(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    return _one_by_one(ops.rectify_bits, info, in_dims, args)


def _rectify_bits_in_place(info: Any, in_dims: Dims, input: Tensor, *args: Any) -> tuple[Any, Any]:
    _check_mapped(in_dims)
    (out, bits), _ = _one_by_one(ops.rectify_bits, info, in_dims, (input, *args))
    input.copy_(out.movedim(0, in_dims[0]))
    return bits, 0


def _check_mapped(in_dims: Dims) -> None:
    if in_dims[0] is None:
        raise RuntimeError(
            "vmap: an in-place rectifier cannot write a per-example result into an input that is not mapped; "
            "call the function without the trailing underscore"
        )


@ops.packed(leading=4, backward=True)
def _rectify_backward(
    info: Any,
    in_dims: Dims,
    grad: Tensor,
    kept: Tensor,
    parameters: Parameters,
    rule: Rule,
    need: Need,
    stride: ops.Stride = None,
) -> tuple[Any, Any]:
    if kept.dtype == torch.uint8 or rule.random:
        arguments = grad, kept, *ops.flat(parameters, rule), *need, stride
        return _one_by_one(ops.rectify_backward, info, in_dims, arguments)
    size, (bias, weight, seed) = info.batch_size, parameters
    tensors, folded, unfold, channels = _fold(size, (grad, kept), in_dims[:2], (bias, weight), in_dims[2:4])
    parameters = Parameters(folded[0], folded[1], seed)
    grad_input, *sums = ops.rectify_backward(*tensors, *ops.flat(parameters, rule), *need)
    split = [_split(total, size, channels) for total in sums]
    if weight is not None and split[1].numel() and not _per_channel(weight, in_dims[3]):
        split[1] = split[1].sum(-1).reshape(size, *_unmapped_shape(weight, in_dims[3]))
    return (unfold(grad_input), *split), (0, 0, 0)


def _split(total: Tensor, size: int, channels: int) -> Tensor:
    """(size * channels,) as (size, channels); an absent gradient (no elements) stays absent for each example."""
    return total.reshape(size, channels) if total.numel() else total.new_empty(size, 0)


def _unmapped_shape(tensor: Tensor, dim: int | None) -> tuple[int, ...]:
    return tuple(s for d, s in enumerate(tensor.shape) if dim is None or d != dim)


def _per_channel(weight: Tensor, dim: int | None) -> bool:
    return weight.numel() // (1 if dim is None else weight.shape[dim]) > 1


def _fold(
    size: int, tensors: tuple[Tensor, ...], dims: Dims, parameters: tuple[Tensor | None, ...], parameter_dims: Dims
) -> tuple[list[Tensor], list[Tensor | None], Callable[[Tensor], Tensor], int]:
    """Examples as extra channels: (B, N, C, ...) -> (N, B * C, ...), parameters (B, C) -> (B * C,)."""
    mapped = [t.movedim(d, 0) if d is not None else t.expand(size, *t.shape) for t, d in zip(tensors, dims)]
    shape = mapped[0].shape[1:]
    channels = shape[1] if len(shape) > 1 else 1
    if len(shape) < 2:
        mapped = [t.reshape(size, -1, 1) for t in mapped]
    folded = [t.transpose(0, 1).flatten(1, 2) for t in mapped]

    def spread(parameter: Tensor | None, dim: int | None) -> Tensor | None:
        if parameter is None:
            return None
        rows = parameter.expand(size, *parameter.shape) if dim is None else parameter.movedim(dim, 0)
        return rows.reshape(size, -1).expand(size, channels).reshape(-1)

    def unfold(out: Tensor) -> Tensor:
        return out.view(out.shape[0], size, channels, *out.shape[2:]).transpose(0, 1).reshape(size, *shape)

    return folded, [spread(p, d) for p, d in zip(parameters, parameter_dims)], unfold, channels


def _one_by_one(op: Any, info: Any, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Any, Any]:
    def example(i: int) -> Any:
        return op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))

    results = [example(i) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results)), (0,) * len(results[0])


VMAP: dict[Any, Callable[..., Any]] = {
    ops.rectify: _rectify,
    ops.rectify_: _rectify_in_place,
    ops.rectify_bits: _rectify_bits,
    ops.rectify_bits_: _rectify_bits_in_place,
    ops.rectify_backward: _rectify_backward,
}
