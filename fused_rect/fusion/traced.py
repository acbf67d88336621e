"""The forward of one module by tracing, for pairs its source does not spell out: `for layer in body: x = layer(x)`.

Only the module's own forward is traced; its children stay modules that are called. What tracing freezes is compared at
each call: a plain attribute that the forward reads, or the length of a child list, that has changed means the original
forward runs. A forward that branches, or reads `training`, is not traced.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .rewrite import Site, rewrite
from .source import owner_of

_BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Try, ast.With, ast.BoolOp, ast.Compare, ast.Assert, ast.Await, ast.Yield)
# What a model's code raises when its tensors are proxies: it cannot be traced, and stays as it is.
_UNTRACEABLE = (
    fx.proxy.TraceError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Traced:
    """A forward made for one module. Copies come empty and are traced at their first call: a graph is not pickled."""

    def __init__(self) -> None:
        self.function: Callable[..., Any] | None = None
        self.frozen: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Traced, ()

    def fill(self, module: nn.Module, original: type[nn.Module]) -> list[Site]:
        graph = _graph(module, original)
        if graph is None:
            return []
        sites = rewrite(graph, module)
        # The code as GraphModule compiles it; with the module itself as self, it calls the module's own children.
        self.function, self.frozen = type(fx.GraphModule(module, graph)).forward, _frozen(module, original)
        return sites

    def holds(self, module: nn.Module) -> bool:
        for name, value in self.frozen.items():
            now = getattr(module, name, None)
            if (len(now) if isinstance(now, nn.Module) else now) != value:  # type: ignore[arg-type]
                return False
        return True


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    traced = self._fused_rect_traced
    if traced.function is None and not torch.compiler.is_compiling():
        traced.fill(self, self._fused_rect_original)
    if traced.function is None or not traced.holds(self):
        return self._fused_rect_original.forward(self, *args, **kwargs)
    return traced.function(self, *args, **kwargs)


def _graph(module: nn.Module, original: type[nn.Module]) -> fx.Graph | None:
    reads = _reads(original)
    if reads is None or "training" in reads or not any(isinstance(m, nn.ModuleList) for m in module.children()):
        return None
    frozen = [getattr(module, name, None) for name in reads if not isinstance(getattr(module, name, None), nn.Module)]
    if not all(isinstance(value, (int, float, str, torch.Tensor, type(None))) or callable(value) for value in frozen):
        return None
    kept, module.__class__ = module.__class__, original
    try:
        return _Leaves().trace(module)
    except _UNTRACEABLE:
        return None
    finally:
        module.__class__ = kept


def _reads(original: type[nn.Module]) -> set[str] | None:
    """The attributes of the module that the forward reads; None where it branches or has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(original.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    if any(isinstance(node, _BRANCHES) for node in ast.walk(tree)):
        return None
    owner = owner_of(original.forward)
    return {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == owner
    }


def _frozen(module: nn.Module, original: type[nn.Module]) -> dict[str, Any]:
    frozen: dict[str, Any] = {}
    for name in _reads(original) or ():
        value = getattr(module, name)
        if isinstance(value, (nn.ModuleList, nn.Sequential)):
            frozen[name] = len(value)
        elif isinstance(value, (int, float, str, type(None))):
            frozen[name] = value
    return frozen


def sites(module: nn.Module, original: type[nn.Module]) -> list[Site]:
    graph = _graph(module, original)
    return [] if graph is None else rewrite(graph, module)
