"""DTensor sharding rules of the ops: over the batch (or any later dim) and over the channels.

Importing this module registers them: `import fused_rect.sharding`. Sharded channels shard the bias and a slope per
channel alike; elsewhere their gradients are partial sums. RReLU in training takes replicated tensors alone: its
slopes follow the position in memory, so shards that share a seed would draw the same slopes."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import ops

Placements = list[Any]


def _parameter(spec: Any, dim: int | None) -> Any:
    """A (C,) parameter lies with dim 1; one slope for all channels, or an absent tensor, lies everywhere."""
    if spec is None:
        return None
    return Shard(0) if dim == 1 and spec.shape[0] > 1 else Replicate()


def _dims(input: Any, rectifier: str) -> range:
    return range(0 if rectifier.startswith("rrelu") else len(input.shape))


@register_sharding(ops.rectify)
def _rectify(input, bias, weight, seed, rectifier, lower, upper):  # type: ignore[no-untyped-def]
    def row(dim: int | None) -> tuple[Placements, Placements]:
        whole = Replicate() if dim is None else Shard(dim)
        seeds = None if seed is None else Replicate()
        return [whole], [whole, _parameter(bias, dim), _parameter(weight, dim), seeds, None, None, None]

    return [row(None), *(row(dim) for dim in _dims(input, rectifier))]


@register_sharding(ops.rectify_backward)
def _rectify_backward(grad, saved, bias, weight, seed, rectifier, lower, upper, need_bias, need_weight):  # type: ignore[no-untyped-def]
    def row(dim: int | None) -> tuple[Placements, Placements]:
        whole = Replicate() if dim is None else Shard(dim)
        slope = _parameter(weight, dim)
        if dim is None:
            sums: Placements = [Replicate(), Replicate()]
        elif dim == 1:
            sums = [Shard(0), Shard(0) if isinstance(slope, Shard) else Partial()]
        else:
            sums = [Partial(), Partial()]
        # An absent gradient is an empty tensor, the same everywhere.
        sums = [s if needed else Replicate() for s, needed in zip(sums, (need_bias, need_weight))]
        seeds = None if seed is None else Replicate()
        parameters = [_parameter(bias, dim), slope, seeds]
        return [whole, *sums], [whole, whole, *parameters, None, None, None, None, None]

    return [row(None), *(row(dim) for dim in _dims(saved, rectifier))]
