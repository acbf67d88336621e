"""`fuse(model)`: an existing model's convolution + rectifier pairs run as one pass, in place; `unfuse` undoes it.

Nothing moves: every module keeps its place, its parameters and its hooks, so state_dict keys, optimizers made before,
`.to()`, `train()`, deepcopy and pickle go on as they were. Only the class of a module that *holds* a pair changes, to a
subclass whose forward calls the two together (:mod:`fused_rect.fusion.pairs`):

- a Sequential (or a subclass that keeps its forward) runs adjacent pairs as one, those across the borders of
  Sequentials inside it too;
- a module with its own forward gets that forward with `act(conv(x))`, written nested or in two statements, as one call
  (:mod:`fused_rect.fusion.source`). No tracing: branches, loops and attributes are read at each call, as before;
- a module that only loops over a ModuleList of them is traced, with guards (:mod:`fused_rect.fusion.traced`);
- an `fx.GraphModule`, such as `torch.fx.symbolic_trace` returns, has its graph rewritten (:mod:`.rewrite`).

Whether a pair may be fused is asked again at each call, so a hook that is added later is honoured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import pairs, source, traced
from .rewrite import Site, rewrite

_GRAPH = "_fused_rect_graph"
_TRACED = "_fused_rect_traced"


def fuse(model: nn.Module, *, fold_batchnorm: bool = False) -> nn.Module:
    """Fuse every convolution (or transposed convolution, or Linear) and rectifier of ``model`` in place; returns it.

    Handles shared rectifiers, `inplace=True`, weight_norm, spectral_norm and parametrizations. Pairs that cannot be
    fused safely are left; :func:`report` says which and why. fold_batchnorm: a BatchNorm in evaluation mode between the
    two, in a Sequential, is folded into the convolution at each call (its parameters stay as they are).
    """
    for module in list(model.modules()):
        if isinstance(module, torch.fx.GraphModule):
            _fuse_graph(module)
        elif any(site.fused for site in _sites(module, "", fold_batchnorm)):
            original: Any = _original(module)
            replacement = _fused_class(original, fold_batchnorm)
            if replacement is not None:
                module.__class__ = replacement
                if replacement.forward is traced.forward:
                    module.__dict__[_TRACED] = traced.Traced()
                    module.__dict__[_TRACED].fill(module, _original(module))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place: classes and graphs are again those that ``model`` came with."""
    for module in list(model.modules()):
        if _is_fused(module):
            module.__class__ = _original(module)
            module.__dict__.pop(_TRACED, None)
        elif _GRAPH in module.__dict__:
            module.graph = module.__dict__.pop(_GRAPH)
    return model


def report(model: nn.Module, *, fold_batchnorm: bool = False) -> list[Site]:
    """What :func:`fuse` does, or did, with each site of ``model``: its name, fused or not, and the reason if not."""
    found: list[Site] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            original = module.__dict__.get(_GRAPH, module.graph)
            scratch = torch.fx.Graph()
            scratch.graph_copy(original, {})
            found += rewrite(scratch, module)
        else:
            fold = fold_batchnorm or getattr(type(module), "_fused_rect_fold", False)
            found += _sites(module, name, fold)
    return found


def _is_fused(module: nn.Module) -> bool:
    return hasattr(type(module), "_fused_rect_original")


def _original(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_fused_rect_original", type(module))


# ---- graph modules ----


def _fuse_graph(module: torch.fx.GraphModule) -> None:
    if _GRAPH in module.__dict__:
        return
    before = torch.fx.Graph(module.graph.owning_module)
    output = before.graph_copy(module.graph, {})
    before.output(output)
    if any(site.fused for site in rewrite(module.graph, module)):
        module.__dict__[_GRAPH] = before
        module.recompile()


# ---- modules ----


@functools.lru_cache(maxsize=512)
def _fused_class(original: Any, fold: bool) -> Any:
    """A subclass of ``original`` with the fused forward, under the same name; None where there is no such forward."""
    if original.forward is nn.Sequential.forward:
        forward = _folding_sequential_forward if fold else _sequential_forward
    else:
        rewritten = source.rewritten(original.forward)
        if rewritten is None:
            return None
        forward = rewritten.function if rewritten.places else traced.forward
    namespace = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_fused_rect_original": original,
        "_fused_rect_fold": fold,
    }
    return type(original)(original.__name__, (original,), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickled and copied by the original class, which the other side can import, and fused again there."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _blank, (self._fused_rect_original, self._fused_rect_fold), state


def _blank(original: Any, fold: bool) -> nn.Module:
    blank: nn.Module = original.__new__(_fused_class(original, fold) or original)
    return blank


def _sites(module: nn.Module, name: str, fold: bool) -> list[Site]:
    if isinstance(module, torch.jit.ScriptModule):
        return _scripted(module, name)
    original = _original(module)
    if original.forward is nn.Sequential.forward:
        found = list(_sequential_sites(module, name, fold))
    elif original.__module__.startswith(("torch.nn.", "torch.ao.", "fused_rect.")):
        return []
    else:
        rewritten = source.rewritten(original.forward)
        if rewritten is None:
            return _unseen(module, name, "the source of its forward cannot be read")
        found = [site for place in rewritten.places for site in source.sites(module, name, place)]
        if not rewritten.places:
            found = [replace(s, where=f"{name}.{s.where}".lstrip(".")) for s in traced.sites(module, original)]
        found = found or _unseen(module, name, _NOT_ADJACENT)
    obstacle = _class_obstacle(module, original)
    return found if obstacle is None else [Site(s.where, s.linear_map, s.rectifier, False, obstacle) for s in found]


def _class_obstacle(module: nn.Module, original: type[nn.Module]) -> str | None:
    if "forward" in module.__dict__:
        return "forward was replaced on the instance"
    if any("__slots__" in vars(c) for c in original.__mro__[:-1]):
        return "the class has __slots__"
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return "the class pickles itself in its own way"
    return None


_NOT_ADJACENT = (
    "its forward does not call the one on the other's result where nothing else reads that result (a helper method, "
    "a name read twice, or a loop that cannot be traced); torch.compile's backend sees through helpers and loops"
)


def _unseen(module: nn.Module, name: str, reason: str) -> list[Site]:
    """A forward in which no pair was found although the module holds both kinds: they are named as one site, left."""
    linear = [k for k, m in module.named_children() if pairs.linear_map_name(m)]
    rectifiers = [k for k, m in module.named_children() if pairs.rectifier_name(m)]
    return [Site(name, "/".join(linear), "/".join(rectifiers), False, reason)] if linear and rectifiers else []


def _scripted(module: torch.jit.ScriptModule, name: str) -> list[Site]:
    kinds = [str(getattr(m, "original_name", "")) for m in module.children()]
    linear = [k for k in kinds if k.startswith(("Conv", "Linear"))]
    rectifiers = [k for k in kinds if k in ("ReLU", "LeakyReLU", "PReLU", "RReLU")]
    reason = "a TorchScript module has its code compiled in; fuse the model before torch.jit.script"
    return [Site(name, "/".join(linear), "/".join(rectifiers), False, reason)] if linear and rectifiers else []


def _sequential_sites(module: nn.Module, name: str, fold: bool) -> Iterator[Site]:
    children = _steps(module)
    at = 0
    while at + 1 < len(children):
        taken, _ = _taken([m for _, m in children[at : at + 3]], fold)
        key, linear_map = children[at]
        kind = pairs.linear_map_name(linear_map)
        last_key, last = children[at + taken - 1 if taken > 1 else at + 1]
        rectifier = pairs.rectifier_name(last)
        if "." in key and key.partition(".")[0] == last_key.partition(".")[0]:
            pass  # within one Sequential inside, which names it itself
        elif kind and rectifier:
            reason = pairs.obstacle(last, linear_map)
            yield Site(f"{name}.{key}".lstrip("."), kind, rectifier, reason is None, reason or "")
        elif kind and len(children) > at + 2 and pairs.is_norm(last) and pairs.rectifier_name(children[at + 2][1]):
            reason = "a BatchNorm stands between; fuse(model, fold_batchnorm=True) folds it in evaluation mode"
            yield Site(f"{name}.{key}".lstrip("."), kind, str(pairs.rectifier_name(children[at + 2][1])), False, reason)
        at += taken


def _taken(window: list[nn.Module], fold: bool) -> tuple[int, nn.Module | None]:
    """How many modules at the head of ``window`` run as one (1 when none), and the BatchNorm among them."""
    if pairs.linear_map_name(window[0]) is None:
        return 1, None
    if len(window) > 1 and pairs.rectifier_name(window[1]):
        return 2, None
    if fold and len(window) > 2 and pairs.is_norm(window[1]) and pairs.rectifier_name(window[2]):
        return 3, window[1]
    return 1, None


def _steps(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What a Sequential runs, by name; Sequentials inside it that nothing watches are their own steps."""
    found: list[tuple[str, nn.Module]] = []
    for key, child in module._modules.items():
        assert child is not None
        if _is_plain_sequential(child):
            found += [(f"{key}.{inner}", m) for inner, m in _steps(child)]
        else:
            found.append((key, child))
    return found


def _is_plain_sequential(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Sequential) and _original(module).forward is nn.Sequential.forward
    return plain and "forward" not in module.__dict__ and not pairs.is_watched(module)


def _run(self: nn.Sequential, input: Any, fold: bool) -> Any:
    modules = list(self) if pairs.globally_hooked() else [m for _, m in _steps(self)]
    at = 0
    while at < len(modules):
        taken, norm = _taken(modules[at : at + 3], fold)
        if taken == 1:
            input = modules[at](input)
        elif norm is None:
            input = pairs.call_pair(modules[at + 1], modules[at], input)
        else:
            input = pairs.call_normalized(modules[at + 2], norm, modules[at], input)
        at += taken
    return input


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    return _run(self, input, fold=False)


def _folding_sequential_forward(self: nn.Sequential, input: Any) -> Any:
    return _run(self, input, fold=True)
