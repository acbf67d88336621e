"""Leaves of `torch.fx.symbolic_trace`: ours decide by shape and dtype, which a Proxy does not have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.fx import Proxy

_F = TypeVar("_F", bound=Callable[..., Any])


def leaf(function: _F) -> _F:
    """``function`` as one call in a symbolic trace; elsewhere itself."""

    @functools.wraps(function)
    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            return input.tracer.create_proxy("call_function", call, (input, *args), kwargs)
        return function(input, *args, **kwargs)

    return cast(_F, call)


def leaf_module(module: nn.Module, input: Proxy, *args: Any) -> Any:
    """The call of ``module`` as one node of the trace that ``input`` belongs to."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), {})
