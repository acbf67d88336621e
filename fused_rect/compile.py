"""`torch.compile(model, backend="fused_rect")`: convolution + rectifier become the fused op, Inductor gets the rest.

`options={"fused_rect.sites": "all"}` fuses every site that can be fused; the default, "auto", leaves those to Inductor
that it runs as fast alone. All other options, and `mode`, reach Inductor unchanged.
`inductor_pass` does the same inside plain `backend="inductor"`; `explain` says what happens to each site.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx

from . import backends, ops
from .fusion.rewrite import Policy, Site, rewrite
from .rules import RULES

_VERSION = "fused_rect-rewrite-1"
_SITES = "fused_rect.sites"


def backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. ``mode`` and ``options`` are `torch.compile`'s."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _let_inductor_choose_layouts()
    options = dict(options or {})
    sites = rewrite_graph_module(gm, _policy(options.pop(_SITES, "auto")))
    patches = {**(list_mode_options(mode) if mode else {}), **options}
    if any(site.fused for site in sites) and _on_cpu(example_inputs):
        # Channels-last convolutions gain nothing in training there; copies to that layout and back cost 5 to 10 %.
        patches.setdefault("layout_optimization", False)
    compiled = cast(Callable[..., Any], compile_fx(gm, example_inputs, config_patches=patches or None))
    return _refusing_double_backward(compiled) if torch.is_grad_enabled() else compiled


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


def _mark(grad_inputs: tuple[Any, ...], _: Any) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled():  # no create_graph=True
        return None
    apply: Any = _FirstDerivative.apply
    return tuple(apply(g) if g is not None and g.requires_grad else g for g in grad_inputs)


def _refusing_double_backward(compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        outputs = compiled(*args)
        for node in {output.grad_fn for output in outputs if getattr(output, "grad_fn", None) is not None}:
            node.register_hook(_mark)
        return outputs

    return call


def _on_cpu(inputs: list[Any]) -> bool:
    return {i.device.type for i in inputs if isinstance(i, torch.Tensor)} <= {"cpu"}


@functools.cache
def _let_inductor_choose_layouts() -> None:
    """Inductor runs convolutions channels_last, and hands an op that it does not know copies in eager's layout.

    Ours take any layout, so copies are only made for random slopes: those follow the position in memory, as in eager.
    """
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    def constraint(node: fx.Node, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        random = any(a in RULES and RULES[a].law for a in args if isinstance(a, str))
        if random and node.target is not ops.rectify_backward:  # which is told forward's layout
            return cast(tuple[Any, Any], constrain_to_fx_strides(node, *args, **kwargs))
        return args, kwargs

    for op in (ops.rectify, ops.rectify_, ops.rectify_bits, ops.rectify_bits_, ops.rectify_backward):
        make_fallback(op, layout_constraint=constraint, warn=False)


def _policy(sites: str) -> Policy | None:
    if sites not in ("auto", "all"):
        raise ValueError(f"option {_SITES!r} must be 'auto' or 'all', got {sites!r}")
    return leave_to_inductor if sites == "auto" else None


def rewrite_graph_module(gm: fx.GraphModule, policy: Policy | None) -> list[Site]:
    """Rewrite ``gm`` and the graph modules inside it (checkpointed regions, branches)."""
    sites = []
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            sites += rewrite(module.graph, module, policy)
            module.recompile()
    return sites


def leave_to_inductor(rectifier: str, convolution: fx.Node) -> str | None:
    """Why a site is better left to Inductor, or None. Ratios: `fused-rect profile --workload chain --compile`."""
    value = convolution.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return None
    if not value.dtype.is_floating_point:
        return f"{value.dtype} has no fused kernel"
    if value.device.type != "cpu":
        return None
    if rectifier == "rrelu":  # random slopes
        native = backends.name("cpu") != "eager"
        return None if native else "there is no native CPU path here, and Inductor's RReLU is faster than the eager one"
    if not (value.requires_grad and torch.is_grad_enabled()):
        return "on the CPU Inductor's inference is as fast"
    if rectifier == "prelu":
        return "on the CPU Inductor's PReLU is as fast"
    # Inductor keeps a bool mask of ReLU and Leaky ReLU for backward, and writes it element by element: 0.9 and 0.6 of
    # our speed. We keep the output, as eager does.
    return None


def __getattr__(name: str) -> Any:
    """`inductor_pass` is made at first use: its base class lives in Inductor, which takes seconds to import."""
    if name != "inductor_pass":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class FuseRectifiers(CustomGraphPass):
        """For `torch._inductor.config.pre_grad_custom_pass`."""

        def __call__(self, graph: fx.Graph) -> None:
            rewrite(graph, graph.owning_module, leave_to_inductor)

        def uuid(self) -> str:
            # Part of Inductor's cache key: a cached graph compiled without the pass must not be served.
            return f"{_VERSION}-{backends.name('cpu')}"

    _let_inductor_choose_layouts()
    made = FuseRectifiers()
    globals()["inductor_pass"] = made
    return made


class Report(list[Site]):
    """The sites of a model; prints one line each."""

    @property
    def fused(self) -> list[Site]:
        return [site for site in self if site.fused]

    def __str__(self) -> str:
        head = f"{len(self.fused)} of {len(self)} sites fused"
        return "\n".join([head, *(f"  {site}" for site in self)])


def explain(model: Callable[..., Any], *inputs: Any, options: dict[str, Any] | None = None, **keywords: Any) -> Report:
    """Which sites `torch.compile(model, backend="fused_rect")` fuses for these inputs, and why the others are left.

    Traces the model as torch.compile would and runs it once, uncompiled. options: those of torch.compile.
    """
    policy = _policy((options or {}).get(_SITES, "auto"))
    report = Report()

    def record(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        report.extend(rewrite_graph_module(gm, policy))
        return gm.forward

    with _fresh_dynamo():
        torch.compile(model, backend=record)(*inputs, **keywords)
    return report


@contextlib.contextmanager
def _fresh_dynamo() -> Iterator[None]:
    """A model compiled before must be traced again, and what is traced here must not be kept."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
