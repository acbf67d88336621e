"""`torch.compile(model, backend="fused_rect")`: rectifiers become fused ops where that moves fewer bytes.

Inductor compiles all the rest, and those rectifiers that it fuses with what stands around them: see :mod:`.placement`.
`options={"fused_rect.sites": "all"}` makes every rectifier behind a map ours; the default is "auto". All other options,
and `mode`, reach Inductor unchanged. `inductor_pass` does the same inside plain `backend="inductor"`; `explain` says
what happens to each rectifier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from .. import internals
from ..rules import RULES
from . import layouts
from .rewrite import ALL, How, Site, asked, rewrite

__all__ = ["ALL", "How", "Report", "Site", "backend", "explain", "inductor_pass", "rewrite_graph_module"]


def backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. ``mode`` and ``options`` are `torch.compile`'s."""
    from torch._inductor.compile_fx import compile_fx

    how, patches = asked(mode, options)
    layouts.let_inductor_choose()
    sites = rewrite_graph_module(gm, how, patches)
    random = any(site.fused and RULES[site.rectifier].law for site in sites)
    if how.eager_random and random:  # random slopes follow the layout: eager's are those of eager's
        patches.setdefault("layout_optimization", False)
    compiled = cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=patches or None))
    return _refusing_double_backward(compiled) if torch.is_grad_enabled() else compiled


_REFUSES = "fused_rect_refuses_double_backward"


class _FirstDerivative(torch.autograd.Function):
    """The identity on a gradient of a compiled model; AOTAutograd's own message names no way out."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "torch.compile does not support double backward (a gradient penalty, a Hessian); run the model eagerly "
            "for it: fused_rect.fuse(model) keeps the fused ops, and they have every higher derivative"
        )


def _refusing_double_backward(compiled: Callable[..., Any]) -> Callable[..., Any]:
    seen = False

    # Not by functools.wraps: it would copy a mark of Dynamo's, by which Dynamo (torch 2.9) calls ``compiled`` instead.
    def call(*args: Any) -> Any:
        nonlocal seen
        outputs = compiled(*args)
        if not seen:  # once, since a hook on each call's nodes takes 20 us of a step
            for output in outputs:
                seen = _refuse(getattr(output, "grad_fn", None)) or seen
        return outputs

    return call


def _refuse(node: Any) -> bool:
    """Whether there was a Function of the compiler's behind ``node``, of an output or of a view that is one."""
    while node is not None and internals.function_of(node) is None:
        node = node.next_functions[0][0] if node.next_functions else None
    function = internals.function_of(node)
    if function is not None and not hasattr(function, _REFUSES):
        setattr(function, _REFUSES, True)
        backward = function.backward

        def refusing(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, *grads)
            if not torch.is_grad_enabled():  # no create_graph=True
                return found
            apply: Any = _FirstDerivative.apply
            return tuple(apply(g) if isinstance(g, torch.Tensor) and g.requires_grad else g for g in found)

        function.backward = staticmethod(refusing)
    return function is not None


def rewrite_graph_module(gm: fx.GraphModule, how: How, patches: dict[str, Any]) -> list[Site]:
    """Rewrite ``gm`` and the graph modules inside it: checkpointed regions, branches.

    patches: of Inductor's config, with what the rewritten graph wants of it afterwards.
    """
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    graphs = [module.graph for module in modules]
    few = {} if "layout_optimization" in patches or not layouts.too_few(graphs) else {"layout_optimization": False}
    last = layouts.channels_last(graphs, {**patches, **few})
    sites: list[Site] = []
    for module in modules:
        sites += rewrite(module.graph, how, channels_last=last)
        module.recompile()
    if any(site.fused for site in sites):
        patches.update(few)
    return sites


def __getattr__(name: str) -> Any:
    """`inductor_pass` lives in a module of its own: its base class is Inductor's, which takes seconds to import."""
    if name != "inductor_pass":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .graph_pass import inductor_pass

    return inductor_pass


class Report(list[Site]):
    """The rectifiers of a model; prints one line each."""

    @property
    def fused(self) -> list[Site]:
        """Those whose forward or backward is not Inductor's own."""
        return [site for site in self if site.fused]

    def __str__(self) -> str:
        width = max((len(site.name) for site in self), default=0)
        ours, plain = self.moved
        moved = f"; they move {_megabytes(ours)} a step, plain Inductor's {_megabytes(plain)}" if plain else ""
        head = f"{len(self.fused)} of {len(self)} rectifiers are ours{moved}"
        return "\n".join([head, *(f"  {site.name:{width}}  {site.verdict}" for site in self)])

    @property
    def moved(self) -> tuple[float, float]:
        """Bytes that the rectifiers' own reads and writes amount to in a training step, placed so and by Inductor."""
        here = plain = 0.0
        for site in self:
            if site.elements is not None and site.ours is not None and site.inductor is not None:
                here += site.elements * (site.ours if site.fused else site.inductor)
                plain += site.elements * site.inductor
        return here, plain


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> Report:
    """Who computes each rectifier under `torch.compile(model, backend="fused_rect")` for these inputs, and why.

    Traces the model as torch.compile would and runs it once, uncompiled. mode, options: those of torch.compile.
    """
    how, patches = asked(mode, options)
    report = Report()

    def record(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        report.extend(rewrite_graph_module(gm, how, patches))
        return gm.forward

    torch._dynamo.reset()  # a model compiled before must be traced again, and what is traced here must not be kept
    try:
        torch.compile(model, backend=record)(*inputs, **keywords)
    finally:
        torch._dynamo.reset()
    return report


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB"
