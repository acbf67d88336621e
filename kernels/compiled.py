"""Triton's compiled kernels, kept by what Triton compiles for, and launched without its binder.

`kernel[grid](...)` binds, specializes and looks up its arguments at each launch (14 us). Here the compiled kernel is
found by the tensors' dtypes and alignment, and its launcher called as Triton (3.5 to 3.9) calls it. What else Triton
may do at a launch is left to it: the interpreter, targets that specialize on more, hooks of profilers and of others.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

_one_at_a_time = threading.Lock()  # a kernel that one thread loads looks loaded to another, and has no handle yet
ALIGNED = 16  # bytes: of an address that is a multiple, Triton makes wide accesses


class Launchable(NamedTuple):
    """A compiled kernel and all of its launch but for the tensors."""

    kernel: CompiledKernel
    grid: tuple[int, ...]  # x, y, z
    rest: tuple[Any, ...]
    device: int

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        kernel, stream = self.kernel, driver.active.get_current_stream(self.device)
        kernel.run(*self.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *tensors, *self.rest)


def launchable(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    rest: tuple[Any, ...],
    options: dict[str, Any],
    known: dict[Any, Launchable],
) -> Launchable | None:
    """What ``kernel[grid](*tensors, *rest, **options)`` would launch; None where that is to be left to Triton.

    ``known``: what has been found before, for this kernel, grid, ``rest`` and ``options``.
    """
    if not isinstance(kernel, triton.JITFunction) or hooked() or kernel.pre_run_hooks:
        return None
    device = driver.active.get_current_device()
    key = (device, *[None if t is None else (t.dtype, t.data_ptr() % ALIGNED == 0) for t in tensors])
    found = known.get(key)
    if found is None:
        found = _compile(kernel, grid, tensors, rest, options, device)
        if found is not None:
            known[key] = found
    return found


def hooked() -> bool:
    """Whether somebody is told of each launch, or changes how kernels are compiled: Proton, say."""
    runtime: Any = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of them, or one
            return True
    return getattr(runtime, "add_stages_inspection_hook", None) is not None


def _compile(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], rest: tuple[Any, ...], options: Any, device: int
) -> Launchable | None:
    # AMD's compiler specializes on the size of what a pointer points into too, Intel's may.
    if driver.active.get_current_target().backend != "cuda":
        return None
    with _one_at_a_time:
        found = kernel.warmup(*tensors, *rest, grid=grid, **options)
        if not isinstance(found, CompiledKernel):  # the compiler's hook refused, or it is compiled in the background
            return None
        found.run  # noqa: B018  loads it
    return Launchable(found, (*grid, 1, 1)[:3], rest, device)
