"""DTensor sharding rules of the ops: over the batch (or any later dim) and over the channels.

Importing this module registers them: `import fused_rect.sharding`. Sharded channels shard the bias and a slope per
channel alike; elsewhere their gradients are partial sums. RReLU in training takes replicated tensors alone: its
slopes follow the position in memory, so shards that share a seed would draw the same slopes. Under autograd a DTensor's
input is kept for backward, not its bits: those follow the memory of each shard.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import ops
from .rules import Need, Parameters, Rule

Placements = list[Any]


def _parameter(spec: Any, dim: int | None) -> Any:
    """A (C,) parameter lies with dim 1; one slope for all channels, or an absent tensor, lies everywhere."""
    if spec is None:
        return None
    return Shard(0) if dim == 1 and spec.shape[0] > 1 else Replicate()


def _dims(like: Any, rule: Rule) -> list[int | None]:
    """The dims that may be sharded, and None: replicated."""
    return [None] if rule.random else [None, *range(len(like.shape))]


def _whole(dim: int | None) -> Any:
    return Replicate() if dim is None else Shard(dim)


def _parameters(parameters: Parameters, dim: int | None) -> Placements:
    bias, weight, seed = parameters
    return [_parameter(bias, dim), _parameter(weight, dim), None if seed is None else Replicate()]


@register_sharding(ops.rectify)  # type: ignore[untyped-decorator]
@ops.packed(leading=1)
def _rectify(
    input: Any, parameters: Parameters, rule: Rule, bias_added: bool = False
) -> list[tuple[Placements, Placements]]:
    rest = [None] * len((*rule, bias_added))
    return [([_whole(dim)], [_whole(dim), *_parameters(parameters, dim), *rest]) for dim in _dims(input, rule)]


@register_sharding(ops.rectify_backward)  # type: ignore[untyped-decorator]
@ops.packed(leading=2, backward=True)
def _rectify_backward(
    grad: Any, kept: Any, parameters: Parameters, rule: Rule, need: Need, stride: Any = None
) -> list[tuple[Placements, Placements]]:
    rest = [None] * len((*rule, *need, stride))

    def row(dim: int | None) -> tuple[Placements, Placements]:
        own = _parameters(parameters, dim)
        if dim is None:
            sums: Placements = [Replicate(), Replicate()]
        elif dim == 1:
            sums = [Shard(0), Shard(0) if isinstance(own[1], Shard) else Partial()]
        else:
            sums = [Partial(), Partial()]
        # An absent gradient is an empty tensor, the same everywhere.
        sums = [s if needed else Replicate() for s, needed in zip(sums, (need.bias is not None, need.weight))]
        return [_whole(dim), *sums], [_whole(dim), _whole(dim), *own, *rest]

    return [row(dim) for dim in _dims(kept, rule)]
