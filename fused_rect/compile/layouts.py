"""Layouts under Inductor, which runs convolutions channels_last where it expects them to be faster so.

While a model is traced its tensors have eager's layouts; Inductor decides afterwards. Bits and random slopes follow one
layout in forward and backward, so the rewritten graph has to say which it will be: `channels_last` asks Inductor's own
rule before. Were its answer another later, the op would copy, and still be right.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, fx

from .. import ops
from .in_place import rectify_backward_
from .sites import MAPS, RANKS

# On CPUs Inductor always does, and copies the first convolution's input and the last one's output. With ours between
# the convolutions, of fewer than this many those copies cost more than all of them gain (docs/compile.md).
CONVOLUTIONS = 4


def too_few(graphs: list[fx.Graph]) -> bool:
    """Whether these are convolutions on a CPU, and too few to run channels_last."""
    found = _convolutions(graphs)
    return 0 < len(found) < CONVOLUTIONS and all(input.device.type == "cpu" for _, input, _ in found)


def _convolutions(graphs: list[fx.Graph]) -> list[tuple[fx.Node, Tensor, Tensor]]:
    """With their input and weight, where those are known."""
    found = []
    for node in (node for graph in graphs for node in graph.nodes):
        name = MAPS.get(node.target, "linear") if node.op == "call_function" else "linear"
        operands = [_value(a) for a in node.args[:2] if isinstance(a, fx.Node)] if RANKS[name] else []
        if len(operands) == 2 and all(value is not None for value in operands):
            found.append((node, *operands))
    return found


def channels_last(graphs: list[fx.Graph], patches: dict[str, Any]) -> bool:
    """Whether Inductor will run the convolutions of these training graphs channels_last. patches: of its config."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    asked = fx.Graph()
    for node, *values in _convolutions(graphs):
        operands = []
        for value in values:
            operands.append(asked.placeholder(f"operand_{len(asked.nodes)}"))
            operands[-1].meta["val"] = value
        groups = _groups(node)
        asked.call_function(torch.ops.aten.convolution.default, (*operands, None, [], [], [], False, [], groups))
    own = {
        name: value for name, value in patches.items() if name in ("layout_optimization", "force_layout_optimization")
    }
    with config.patch(own):
        return bool(GraphLowering.decide_layout_opt(cast(Any, SimpleNamespace(graph=asked)), is_inference=False))


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _groups(node: fx.Node) -> Any:
    return node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)  # of transposed ones too


@functools.cache
def let_inductor_choose() -> None:
    """Inductor hands an op that it does not know copies in eager's layout; ours take any that their bits follow.

    Where the layouts differ nevertheless, the copy is Inductor's, which can write its own results so at once.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import make_fallback

    leading: dict[Any, int] = {
        ops.rectify: 1,
        ops.rectify_bits: 1,
        ops.rectify_backward: 2,
    }  # tensors that have a layout

    def constraint(node: fx.Node, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        count = leading.get(node.target)
        if count is None:  # in place: no copy may be handed over
            return args, kwargs
        stride = args[-1] if isinstance(args[-1], (list, tuple)) else None
        if stride is None and count == 2:
            args[1].realize()
            stride = args[1].get_stride()
        if stride is not None:
            args = (cast(Any, ir.ExternKernel.require_exact_strides(args[0], stride)), *args[1:])
        return args, kwargs

    for op in (*leading, ops.rectify_, ops.rectify_bits_, rectify_backward_):
        make_fallback(op, layout_constraint=constraint, warn=False)
