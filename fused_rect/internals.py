"""Every private name of torch that the package builds on, under the name of what it tells, and in no other file.

Public torch has no word for these. A version of torch that lacks one fails in the test that names it
(tests/test_internals.py), and is mended here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, _prims_common
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules import module as _module
from torch.utils import _device
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# ---- who listens to calls of ops

transforms_active = torch._C._are_functorch_transforms_active  # a vmap, grad, jvp, ... of torch.func is under way
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many __torch_dispatch__ modes are active
function_modes = torch._C._len_torch_function_stack
profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def forward_ad_active() -> bool:
    """Whether a level of forward-mode AD is entered."""
    return torch.autograd.forward_ad._current_level >= 0


tracing_state = torch._C._get_tracing_state  # None unless torch.jit.trace is under way


def jit_tracing() -> bool:
    """Whether torch.jit.trace is under way."""
    return tracing_state() is not None


# ---- autograd


class SingleLevelFunction(_SingleLevelFunction):
    """An autograd.Function for one level of torch.func."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[int]:
        """Under which compiled autograd keeps what it compiled; torch has it on autograd.Function alone."""
        return (ctx._autograd_function_id,)


def function_of(node: Any) -> Any:
    """The autograd.Function that the graph's ``node`` is of, or None for one of torch's own."""
    return getattr(node, "_forward_cls", None)


single_level = enable_single_level_autograd_function  # lets such a Function be applied under torch.func
forward_ad_enabled = _set_fwd_grad_enabled
below_autograd = torch._C._AutoDispatchBelowAutograd  # a context in which ops skip their Autograd kernels


# ---- tensors

dispatch_keys = torch._C._dispatch_keys
overlaps = torch._C._overlaps  # type: ignore[attr-defined]  # whether two tensors share memory
is_wrapper = is_traceable_wrapper_subclass  # a tensor made of others, such as a DTensor


def is_dense(tensor: Tensor) -> bool:
    """Every element has its own place and no place between them is unused, in whatever order the dims lie."""
    return tensor.is_contiguous() or _non_overlapping_and_dense(tensor)


# With "or_false" (torch 2.11 and later), sizes that a compiler does not know yet are no error.
_DENSE = "is_non_overlapping_and_dense"
_non_overlapping_and_dense: Any = getattr(_prims_common, f"{_DENSE}_or_false", None) or getattr(_prims_common, _DENSE)
suggested_memory_format = _prims_common.suggest_memory_format


# ---- threads: objects that autograd's device threads see as the thread does that called backward


def _takes_a_reference() -> bool:
    """torch 2.9 drops a reference to what is stashed, when something else takes its place, that it never took."""
    token = object()
    before = sys.getrefcount(token)
    torch._C._stash_obj_in_tls("fused_rect_probe", token)
    taken = sys.getrefcount(token) > before
    if not taken:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(token))
    return taken


def _stash_with_a_reference(key: str, value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


stash_in_thread = torch._C._stash_obj_in_tls if _takes_a_reference() else _stash_with_a_reference
is_in_thread = torch._C._is_key_in_tls
get_in_thread = torch._C._get_obj_in_tls


DeviceContext = _device.DeviceContext  # the mode of `with torch.device(...)` and of the default device
without_subclasses: Any = torch._C.DisableTorchFunctionSubclass  # a context in which __torch_function__ is not asked


# ---- modules

# What runs between a call of a module and its forward.
MODULE_CALLS = (_module.Module.__call__, _module.Module._call_impl)


def hooks_on_all() -> bool:
    """Whether hooks of all modules are registered; they run before a module's own."""
    return bool(_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody's code runs beside the forward of ``module``."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or hooks_on_all()


# ---- Inductor


def in_memory(tensor: Tensor, stride: Sequence[Any]) -> Tensor:
    """The same tensor, which Inductor writes to memory with its dims in the order of ``stride``."""
    from torch._inductor import inductor_prims

    written: Tensor = inductor_prims.force_stride_order(tensor, stride)
    return written
