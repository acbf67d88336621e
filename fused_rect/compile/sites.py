"""Rectifiers in Dynamo's graphs: where they are, behind which map, and what forbids to compute the two together.

Dynamo's graphs hold functions in torch's many spellings (`torch.conv2d`, `F.leaky_relu`, `Tensor.relu_`, ...) and, as
calls of their own, whatever changes how the following ones run: gradients switched off, autocast entered, ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..fusion.twins import TWINS, Twin

MAPS: dict[Any, str] = {
    torch._C._nn.linear: "linear",
    F.linear: "linear",
    **{getattr(torch, name): name for name in ("conv1d", "conv2d", "conv3d")},
    **{getattr(F, name): name for name in ("conv1d", "conv2d", "conv3d")},
    **{getattr(torch, f"conv_transpose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)},
}
RANKS = {name: 0 if name == "linear" else int(name[-2]) for name in MAPS.values()}


@dataclass
class Found:
    """A rectifier of a graph."""

    node: fx.Node
    source: fx.Node  # whose value it rectifies
    map_node: fx.Node | None  # the source, where that is a convolution or linear map
    rectifier: str  # name of the rule; an RReLU in evaluation is a Leaky ReLU
    arguments: dict[str, Any]  # of the rectifier: numbers, or nodes for those that change from call to call
    in_place: bool
    obstacle: str | None  # why it must stay as it is written, whatever would be gained

    @property
    def linear_map(self) -> str:
        return "" if self.map_node is None else MAPS[self.map_node.target]

    @property
    def where(self) -> str:
        """The path of the map's module, or of the rectifier's; their names in the graph outside of modules."""
        node = self.map_node or self.node
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]).partition(".")[2] if stack else ""
        return path or node.name


def find(graph: fx.Graph) -> Iterator[Found]:
    """Every rectifier of ``graph``, in the order in which they run."""
    modes = _modes(graph)
    for node in list(graph.nodes):
        twin = _twin(node)
        given = _arguments(node, twin) if twin is not None else {}
        source = given.pop("input", None)
        if twin is None or not isinstance(source, fx.Node):
            continue
        name = twin.name
        behind = source.op == "call_function" and source.target in MAPS
        in_place = given.pop("inplace", False) is True
        training = given.pop("training", True)
        obstacle = _obstacle(node, source, training, given, behind, modes)
        if name == "rrelu" and training is False:
            name = "leaky_relu"
            if obstacle is None:
                given = {"negative_slope": (given["lower"] + given["upper"]) / 2}
        yield Found(node, source, source if behind else None, name, given, in_place, obstacle)


def _twin(node: fx.Node) -> Twin | None:
    function = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
    return TWINS.get(function) if node.op in ("call_function", "call_method") else None


def _arguments(node: fx.Node, twin: Twin) -> dict[str, Any]:
    """By name, with their defaults; none for a call that ours has no word for."""
    try:
        bound = inspect.signature(twin.call).bind(*node.args, **node.kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _modes(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """For each node how many changes of mode came before it, and how many function transforms are around it.

    Dynamo gives every call an example of its value, but for those that have none: they change the mode in which the
    next ones run (gradients, inference, autocast, determinism, hooks of saved tensors, transforms), however they are
    written in the model.
    """
    changes = transforms = 0
    modes = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and "example_value" not in node.meta:
            changes += 1
            name = getattr(node.target, "__name__", "")
            transforms += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
            transforms += (name == "_enter_dual_level") - (name == "_exit_dual_level")
        modes[node] = changes, transforms
    return modes


def _obstacle(
    node: fx.Node,
    source: fx.Node,
    training: Any,
    arguments: dict[str, Any],
    behind: bool,
    modes: dict[fx.Node, tuple[int, int]],
) -> str | None:
    before, after = source.meta.get("example_value"), node.meta.get("example_value")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return "its values are not known"
    if not after.dtype.is_floating_point:
        return f"{after.dtype} has no fused kernel"
    if before.dtype != after.dtype:
        return "autocast changes the dtype between the two"
    if modes[node][1]:
        return "it is inside a function transform (torch.func)"
    if not isinstance(training, bool):
        return "whether it is training is decided as the graph runs"
    if not training and any(isinstance(a, fx.Node) for a in arguments.values()):
        return "its slope in evaluation is decided as the graph runs"
    if behind:
        if len(source.users) > 1:
            return f"the convolution's output has {len(source.users)} users"
        if modes[source] != modes[node]:
            return "the mode (gradients, inference, autocast, ...) changes between the two"
    return _weight_obstacle(arguments, before, behind and RANKS[MAPS[source.target]] + 2) or (
        _order_obstacle(node, source, arguments) if behind else None
    )


def _weight_obstacle(arguments: dict[str, Any], value: torch.Tensor, dims: int) -> str | None:
    """PReLU's slopes go along dim 1: not the channels of an unbatched input or of a linear map's (N, T, features)."""
    if "weight" not in arguments:
        return None
    weight = arguments["weight"].meta.get("example_value") if isinstance(arguments["weight"], fx.Node) else None
    if not isinstance(weight, torch.Tensor):
        return "the shape of PReLU's slopes is not known"
    if dims and weight.numel() != 1 and value.dim() != dims:
        return "PReLU's slopes do not go along the channels"
    return None


def _order_obstacle(node: fx.Node, source: fx.Node, arguments: dict[str, Any]) -> str | None:
    """The rectifier's arguments are read where the convolution stands: they must be there, and stay the same."""
    nodes = [a for a in arguments.values() if isinstance(a, fx.Node)]
    between = source.next
    while between is not node:
        for argument in nodes:
            if between is argument:
                return "the rectifier's argument is computed after the convolution"
            if between in argument.users:
                return "the rectifier's argument is used between the convolution and the rectifier"
        between = between.next
    return None
