"""The rewrite as a pass of plain Inductor."""

from __future__ import annotations

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from .. import backends
from . import layouts, placement
from .rewrite import asked, rewrite

VERSION = "fused_rect-rewrite-4"


class FuseRectifiers(CustomGraphPass):
    """For `torch._inductor.config.pre_grad_custom_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor import config

        layouts.let_inductor_choose()
        how, _ = asked(None, None)
        patches = {"layout_optimization": config.layout_optimization}
        rewrite(graph, how, channels_last=layouts.channels_last([graph], patches))

    def uuid(self) -> str:
        # Part of Inductor's cache key: a cached graph compiled without the pass must not be served.
        return f"{VERSION}-{backends.name('cpu')}-{placement.MIN_ELEMENTS}"


inductor_pass = FuseRectifiers()
