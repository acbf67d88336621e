"""vmap over the ops: the mapped dim joins the batch or the channels, so one launch still serves all examples.

RReLU's slopes follow the position in memory, so folding would give each example other slopes than it has alone: under
randomness="same" that is wrong. Its examples are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops

Dims = tuple[int | None, ...]


def _rectify(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    rectifier = args[4]
    if rectifier.startswith("rrelu"):
        return _one_by_one(ops.rectify, info, in_dims, args, outputs=1)
    (input,), parameters, unfold, _ = _fold(info.batch_size, (args[0],), in_dims[:1], args[1:3], in_dims[1:3])
    return unfold(ops.rectify(input, *parameters, *args[3:])), 0


def _rectify_in_place(info: Any, in_dims: Dims, input: Tensor, *args: Any) -> tuple[Any, Any]:
    if in_dims[0] is None:
        raise RuntimeError(
            "vmap: an in-place rectifier cannot write a per-example result into an input that is not mapped; "
            "call the function without the trailing underscore"
        )
    out, _ = _rectify(info, in_dims, input, *args)
    input.copy_(out.movedim(0, in_dims[0]))
    return None, None


def _rectify_backward(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    if args[5].startswith("rrelu"):
        return _one_by_one(ops.rectify_backward, info, in_dims, args, outputs=3)
    size = info.batch_size
    tensors, parameters, unfold, channels = _fold(size, args[:2], in_dims[:2], args[2:4], in_dims[2:4])
    grad_input, *sums = ops.rectify_backward(*tensors, *parameters, *args[4:])
    split = [_split(total, size, channels) for total in sums]
    if args[3] is not None and args[-1] and not _per_channel(args[3], in_dims[3]):
        split[1] = split[1].sum(-1).reshape(size, *_unmapped_shape(args[3], in_dims[3]))
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


def _one_by_one(op: Any, info: Any, in_dims: Dims, args: tuple[Any, ...], outputs: int) -> tuple[Any, Any]:
    def example(i: int) -> Any:
        return op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))

    results = [example(i) for i in range(info.batch_size)]
    if outputs == 1:
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results)), (0,) * outputs


def register(lib: torch.library.Library) -> None:
    rules = {"rectify": _rectify, "rectify_": _rectify_in_place, "rectify_backward": _rectify_backward}
    for name, rule in rules.items():
        torch.library.register_vmap(f"fused_rect::{name}", rule, lib=lib)

