"""The graph rewrite of the compile backend and the Inductor pass: map + rectifier become one call.

Dynamo's graphs hold functions: `torch.conv2d`, `F.leaky_relu`, `Tensor.relu_`, ...
The fused call takes the convolution's place in the graph: what mutates its input later still does so later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import functional

_LINEAR: dict[Any, str] = {
    torch._C._nn.linear: "linear",
    F.linear: "linear",
    **{getattr(torch, name): name for name in ("conv1d", "conv2d", "conv3d")},
    **{getattr(F, name): name for name in ("conv1d", "conv2d", "conv3d")},
    **{getattr(torch, f"conv_transpose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)},
}

_RECTIFIERS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu, torch._C._nn.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.prelu, torch.prelu, "prelu"), "prelu"),
    **dict.fromkeys((F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), "rrelu"),
}


@dataclass(frozen=True)
class Site:
    """One rectifier behind a linear map: fused, or left with the reason."""

    where: str
    linear_map: str
    rectifier: str
    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        verdict = "fused" if self.fused else f"left: {self.reason}"
        return f"{self.where or 'model'}: {self.linear_map} + {self.rectifier}: {verdict}"


Policy = Callable[[str, fx.Node], "str | None"]  # (rectifier, the node whose value it rectifies) -> why to leave it


def rewrite(graph: fx.Graph, owner: torch.nn.Module | None = None, policy: Policy | None = None) -> list[Site]:
    """Fuse every site of ``graph`` in place and say what was done with each.

    owner: the graph's module; modules that the graph calls are left as they are. policy: a reason to leave a site to
    the compiler behind us, or None; an RReLU in evaluation is a "leaky_relu" to it.
    """
    sites = []
    for node in list(graph.nodes):
        rectifier = _RECTIFIERS.get(node.target) if node.op in ("call_function", "call_method") else None
        if rectifier is None or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        producer = node.args[0]
        linear_map = _LINEAR.get(producer.target) if producer.op == "call_function" else None
        if linear_map is not None:
            reason = _obstacle(node, producer, rectifier) or (
                policy(_rule(node, rectifier), producer) if policy else None
            )
            if reason is None:
                _fuse(graph, producer, node, linear_map, rectifier)
            sites.append(Site(producer.name, linear_map, rectifier, reason is None, reason or ""))
        bare = rectifier == "rrelu" and node.op == "call_function" and not node._erased
        if bare and (policy is None or policy(_rule(node, rectifier), producer) is None):
            _replace_bare_rrelu(graph, node)
    return sites


def _obstacle(node: fx.Node, producer: fx.Node, rectifier: str) -> str | None:
    if len(producer.users) > 1:
        return f"the convolution's output has {len(producer.users)} users"
    return _shape_obstacle(node, producer, rectifier) or _argument_obstacle(node, producer, rectifier)


def _shape_obstacle(node: fx.Node, producer: fx.Node, rectifier: str) -> str | None:
    """PReLU's slopes go along dim 1: not the channels of an unbatched input or of a linear map's (N, T, features)."""
    slope = _argument(node, 1, "weight")
    if rectifier != "prelu" or not isinstance(slope, fx.Node):
        return None
    weight, value = slope.meta.get("example_value"), producer.meta.get("example_value")
    if weight is None or value is None:
        return "the shapes of PReLU's slope and input are not known"
    dims = {"linear": 2}.get(_LINEAR[producer.target]) or int(_LINEAR[producer.target][-2]) + 2
    return None if weight.numel() == 1 or value.dim() == dims else "PReLU's slopes do not go along the channels"


def _argument_obstacle(node: fx.Node, producer: fx.Node, rectifier: str) -> str | None:
    """The rectifier's arguments are read where the convolution stands: they must be there, and stay the same."""
    arguments = [a for a in _rectifier_arguments(node, rectifier).values() if isinstance(a, fx.Node)]
    for argument in arguments:
        if argument.target == "item" and argument.args[0].op == "placeholder":  # type: ignore[union-attr]
            producer.prepend(argument)  # how Dynamo passes a dynamic float
    between = producer.next
    while between is not node:
        for argument in arguments:
            if between is argument:
                return "the rectifier's argument is computed after the convolution"
            if between in argument.users:
                return "the rectifier's argument is used between the convolution and the rectifier"
        between = between.next
    return None


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _rectifier_arguments(node: fx.Node, rectifier: str) -> dict[str, Any]:
    """The rectifier's own arguments under the names of `fused_rect.functional`."""
    if rectifier == "leaky_relu":
        return {"negative_slope": _argument(node, 1, "negative_slope", 0.01)}
    if rectifier == "prelu":
        return {"slope": _argument(node, 1, "weight")}
    if rectifier == "rrelu":
        lower, upper = _argument(node, 1, "lower", 1 / 8), _argument(node, 2, "upper", 1 / 3)
        return {"lower": lower, "upper": upper, "training": _argument(node, 3, "training", False)}
    return {}


def _rule(node: fx.Node, rectifier: str) -> str:
    evaluating = rectifier == "rrelu" and node.op == "call_function" and _argument(node, 3, "training", False) is False
    return "leaky_relu" if evaluating else rectifier


def _fuse(graph: fx.Graph, producer: fx.Node, node: fx.Node, linear_map: str, rectifier: str) -> None:
    function = getattr(functional, f"{linear_map}_{rectifier}")
    kwargs = {**producer.kwargs, **_rectifier_arguments(node, rectifier)}
    with graph.inserting_before(producer):
        fused = graph.call_function(function, producer.args, kwargs)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
    graph.erase_node(producer)


def _replace_bare_rrelu(graph: fx.Graph, node: fx.Node) -> None:
    """RReLU on its own: torch's op in training has no lowering under Inductor, ours is an op like any other."""
    in_place = node.target in (F.rrelu_, torch.rrelu_) or bool(_argument(node, 4, "inplace", False))
    function = functional.bias_rrelu_ if in_place else functional.bias_rrelu
    with graph.inserting_before(node):
        new = graph.call_function(function, (node.args[0], None), _rectifier_arguments(node, "rrelu"))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
