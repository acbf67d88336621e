"""The rewrite of a Dynamo graph: rectifiers become calls of :mod:`.calls` where :mod:`.placement` says so.

A map and its rectifier become one call in the map's place: what mutates its input later still does so later.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .. import backends, functional
from ..random import new_seed
from ..rules import RULES
from . import calls, placement
from .placement import INDUCTOR, OURS, Around, Choice, Placed, in_training
from .sites import MAPS, RANKS, Found, find


class How(NamedTuple):
    """What the user asks for."""

    all: bool = False  # every rectifier behind a map, whatever it moves
    templates: bool = False  # Inductor's templates of matrix products and convolutions take a rectifier as epilogue
    eager_random: bool = False  # the random numbers of eager mode: drawn one after the other, in eager's layout


ALL = How(all=True)
SITES = "fused_rect.sites"


def asked(mode: str | None, options: dict[str, Any] | None) -> tuple[How, dict[str, Any]]:
    """What is asked of the rewrite, and what of Inductor."""
    from torch._inductor import config, list_mode_options

    options = dict(options or {})
    sites = options.pop(SITES, "auto")
    if sites not in ("auto", "all"):
        raise ValueError(f"option {SITES!r} must be 'auto' or 'all', got {sites!r}")
    patches: dict[str, Any] = {**(list_mode_options(mode) if mode else {}), **options}

    def is_on(name: str) -> bool:
        return bool(patches.get(name, getattr(config, name)))

    templates = is_on("max_autotune") or is_on("max_autotune_gemm")
    return How(sites == "all", templates, is_on("fallback_random")), patches


@dataclass(frozen=True)
class Site:
    """A rectifier, and who computes it."""

    where: str
    linear_map: str  # that it is fused with; "" for none
    rectifier: str
    place: str
    reason: str
    elements: int | None = None  # None where the shape is dynamic
    # Bytes an element in a training step with an op of ours and under plain Inductor, by :func:`.placement.traffic`;
    # None where bytes did not decide.
    ours: float | None = None
    inductor: float | None = None

    @property
    def fused(self) -> bool:
        """Whether forward or backward is not Inductor's own."""
        return self.place != INDUCTOR

    @property
    def name(self) -> str:
        return f"{self.where}: {' + '.join(filter(None, (self.linear_map, self.rectifier)))}"

    @property
    def verdict(self) -> str:
        if self.ours is None or self.inductor is None:
            return f"{self.place}: {self.reason}"
        here, there = (self.ours, self.inductor) if self.fused else (self.inductor, self.ours)
        than = "Inductor's" if self.fused else "an op's"
        return f"{self.place}: {self.reason}; {here:g} bytes an element, {than} {there:g}"

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}"


def rewrite(graph: fx.Graph, how: How, channels_last: bool = False) -> list[Site]:
    """Rewrite ``graph`` in place and say what was done with each rectifier.

    channels_last: so will the convolutions of two dims lie in memory, whatever the graph says.
    """
    _hoist_numbers(graph)
    random = any(f.obstacle is None and _is_random(f) for f in find(graph))
    last = channels_last and not (random and how.eager_random)
    chosen = [(found, _choose(found, how, last)) for found in find(graph)]
    seeds = _Seeds(graph, how, [found for found, choice in chosen if choice.place != INDUCTOR and _is_random(found)])
    sites = []
    for found, choice in chosen:
        sites.append(_site(found, choice))
        if choice.place != INDUCTOR:
            backends.prepare(_value(found.node).device)
            # What the graph returns is copied to eager's layout before it is rectified in place.
            returned = any(user.op == "output" for user in found.node.users)
            _replace(graph, found, choice.place, seeds, last and not returned)
    return sites


def _hoist_numbers(graph: fx.Graph) -> None:
    """Dynamo passes a dynamic float as a tensor, and reads it where it is first used: after the map before it."""
    start = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.target == "item" and node.args[0].op == "placeholder" and node is not start:
            start.prepend(node)


def _is_random(found: Found) -> bool:
    return bool(RULES[found.rectifier].law)


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["example_value"]
    return value


# ---- the choice ----


def _choose(found: Found, how: How, channels_last: bool) -> Choice:
    if found.obstacle is not None:
        return Choice(INDUCTOR, found.obstacle)
    if how.all and found.map_node is not None:
        return Choice(OURS, "every site was asked for")
    value = _value(found.node)
    cpu = value.device.type == "cpu"
    if _is_random(found) and (not value.requires_grad or how.all):
        return _random(cpu)
    if not value.requires_grad:
        return Choice(INDUCTOR, "no gradient is wanted, and Inductor's inference moves as little")
    if how.templates and found.map_node is not None and not (_is_random(found) or "transpose" in found.linear_map):
        return Choice(INDUCTOR, f"the template of the {found.linear_map} takes it as its epilogue")
    if not cpu:
        return in_training(_around(found, channels_last))
    return _random(cpu) if _is_random(found) else _on_cpu(found)


def _on_cpu(found: Found) -> Choice:
    """By traffic, but where the clock says otherwise."""
    if found.rectifier == "prelu":
        return Choice(INDUCTOR, "on the CPU Inductor's PReLU is as fast")
    if found.rectifier == "relu" and any(user.op != "output" for user in found.node.users):
        return Choice(INDUCTOR, "on the CPU Inductor's ReLU is as fast where its output is kept anyway")
    elements = _value(found.node).numel()
    if isinstance(elements, int) and elements < placement.MIN_ELEMENTS:
        return Choice(INDUCTOR, f"it has fewer than {placement.MIN_ELEMENTS} elements")
    # Whatever the convolutions' layout: Inductor rectifies as it copies to an output's, one element after the other.
    choice = in_training(_around(found, channels_last=False))
    return choice if found.map_node is not None else choice._replace(place=INDUCTOR)


def _random(cpu: bool) -> Choice:
    if cpu and backends.name("cpu") == "eager":
        return Choice(INDUCTOR, "there is no native CPU path here, and Inductor's RReLU is faster than the eager one")
    return Choice(OURS, "Inductor would write the noise to memory")


def _around(found: Found, channels_last: bool) -> Around:
    value = _value(found.node)
    relaid = channels_last and value.dim() == 4  # an output of the graph is written in eager's layout
    opaque = sum(_is_opaque(user, found.node, relaid) for user in found.node.users)
    return Around(
        found.rectifier,
        value.element_size(),
        _adds_bias(found, value),
        opaque,
        len(found.node.users) - opaque,
        _gradient_is_ready(found.node, relaid),
        found.map_node is not None or found.source.op == "placeholder",
        _bias(found) is not None,
        _stages(found, relaid),
        _elements(value),
        next((_name(user) for user in found.node.users if not _is_opaque(user, found.node, relaid)), ""),
        value.device.type != "cpu",
    )


def _stages(found: Found, relaid: bool) -> int:
    """Kernels in which Inductor sums the gradient of the map's bias, but the one that makes it if that sums too.

    By its reduction_split_factor; of channels that are neighbours in memory it sums nothing on the way.
    """
    bias, elements = _bias(found), _elements(_value(found.node))
    if bias is None or elements is None:
        return 0
    each = elements // _value(bias).numel()
    if RANKS[found.linear_map] and not relaid and _value(found.node).is_contiguous():
        return int(each > 8192)
    return 2 if each > 128 else 0


def _elements(value: torch.Tensor) -> int | None:
    """The elements of a GPU's tensor, if they are known."""
    count = value.numel()
    return count if isinstance(count, int) and value.device.type != "cpu" else None


def _name(node: fx.Node) -> str:
    return "result" if node.op == "output" else str(getattr(node.target, "__name__", node.target))


_PRODUCTS = (torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, "matmul", "bmm", "mm")
_SUMS = (torch.add, "add", "add_", operator.add, operator.iadd)


def _is_opaque(user: fx.Node, value: fx.Node, relaid: bool) -> bool:
    """Whether ``user`` reads ``value`` once, from memory, and hands its gradient back in memory."""
    if user.op == "output":
        return not relaid
    known = user.target in MAPS if user.op == "call_function" else False
    return (known or user.target in _PRODUCTS) and list(user.args).count(value) == 1 and user.args[0] is value


def _gradient_is_ready(value: fx.Node, relaid: bool) -> bool:
    """Whether one opaque reader has it: of ``value``, or of a sum that ``value`` is a part of."""
    if len(value.users) != 1:
        return False
    (user,) = value.users
    if _is_opaque(user, value, relaid):
        return True
    part = user.target in _SUMS and user.args.count(value) == 1 and "alpha" not in user.kwargs
    return part and _value(user).shape == _value(value).shape and _gradient_is_ready(user, relaid)


def _gradient_is_along(value: fx.Node) -> bool:
    """Whether no reader's gradient has its elements in another order: pooled, shuffled, sliced."""

    def keeps_shape(user: fx.Node) -> bool:
        of = user.meta.get("example_value")
        return user.op == "output" or (isinstance(of, torch.Tensor) and of.shape == _value(value).shape)

    return all(_is_opaque(user, value, relaid=False) or keeps_shape(user) for user in value.users)


def _is_fresh(value: fx.Node) -> bool:
    """Whether the gradient of ``value`` is the result of one convolution's or matrix product's backward, read by us."""
    return len(value.users) == 1 and all(_is_opaque(user, value, relaid=True) for user in value.users)


def _bias(found: Found) -> Any:
    """The bias of the map before the rectifier, if there are both."""
    if found.map_node is None:
        return None
    args, kwargs = found.map_node.args, found.map_node.kwargs
    return args[2] if len(args) > 2 else kwargs.get("bias")


def _adds_bias(found: Found, value: torch.Tensor) -> bool:
    return _bias(found) is not None and not functional.map_adds_bias(RANKS[found.linear_map], value.device)


def _site(found: Found, choice: Choice) -> Site:
    value = found.node.meta.get("example_value")
    elements = value.numel() if isinstance(value, torch.Tensor) else None
    known = elements if isinstance(elements, int) else None
    return Site(found.where, found.linear_map, found.rectifier, choice.place, choice.reason, known, *choice[2:])


# ---- what is put in place ----


class _Seeds:
    """The seeds of a graph's random rectifiers: one draw at its start, or, as in eager mode, each before its use."""

    def __init__(self, graph: fx.Graph, how: How, random: list[Found]) -> None:
        self.graph = graph
        self.drawn: dict[torch.device, fx.Node] = {}
        self.used: dict[torch.device, int] = {}
        if how.eager_random:
            return
        devices = [_value(found.node).device for found in random]
        start = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(start):
            for device in dict.fromkeys(devices):
                self.drawn[device] = _kept(graph.call_function(calls.new_seeds, (devices.count(device), device)))
                self.used[device] = 0

    def next(self, found: Found) -> fx.Node:
        """The seed of a rectifier, as a node before the insertion point."""
        device = _value(found.node).device
        if device not in self.drawn:
            return _kept(self.graph.call_function(new_seed, (device,)))
        self.used[device] += 1
        return self.graph.call_function(calls.seed_of, (self.drawn[device], self.used[device] - 1))


def _kept(seed: fx.Node) -> fx.Node:
    """Never drawn again in backward, under any memory budget: torch's partitioner takes randint for repeatable."""
    seed.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return seed


def _replace(graph: fx.Graph, found: Found, place: str, seeds: _Seeds, channels_last: bool) -> None:
    where = found.map_node or found.node
    with graph.inserting_before(where):
        seed = seeds.next(found) if _is_random(found) else None
        placed = Placed(place, _is_fresh(found.node), _gradient_is_along(found.node))
        own = (found.rectifier, found.arguments, seed, placed)
        if found.map_node is not None:
            call = (found.linear_map, found.map_node.args, dict(found.map_node.kwargs), *own, channels_last)
            new = graph.call_function(calls.behind_map, call)
        else:
            new = graph.call_function(calls.bare, (found.source, *own, found.in_place))
    new.meta = dict(found.node.meta)
    found.node.replace_all_uses_with(new)
    graph.erase_node(found.node)
    if found.map_node is not None:
        graph.erase_node(found.map_node)
