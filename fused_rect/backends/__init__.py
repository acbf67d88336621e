"""Which implementation runs: triton, native (C++ on CPU tensors) or eager (ATen operations).

Each is a module with the same two functions, `forward` and `backward`; they give the same numbers, the random slopes
included, so the choice is about speed alone. `auto`: cuda and xpu tensors go to Triton, CPU tensors to the native
kernels where a compiler built them, everything else to eager.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import internals

NAMES = ("auto", "triton", "native", "eager")
_MODULES = {
    "triton": "fused_rect.kernels.launch",
    "native": "fused_rect.kernels.cpu",
    "eager": "fused_rect.backends.eager",
}


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return NAMES[NAMES.index(name)]  # the one object of this name, by which C++ knows it


_chosen = _checked(os.environ.get("FUSED_RECT_BACKEND") or "auto", "FUSED_RECT_BACKEND")  # the whole process's
OWN = "fused_rect_backend"  # a thread's own choice, in torch's thread-local state


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation for the fused calls of this thread inside the ``with`` block.

    ``name``: "triton", "native", "eager" or "auto". Triton on CPU tensors is allowed and goes to whatever Triton driver
    or interpreter is active (``TRITON_INTERPRET=1``). Raises ValueError for another name; a call that reaches an
    implementation that is not there raises RuntimeError and says what to install or set.

    It reaches as far as `torch.no_grad()`: it is thread-local, torch carries it to the threads that run a backward pass
    called inside the block, and a forked process (a DataLoader's worker) starts with what its parent thread had. Other
    threads and spawned processes start with FUSED_RECT_BACKEND.
    """
    name = _checked(name, "backend name")
    previous = _wanted()
    internals.stash_in_thread(OWN, name)
    try:
        yield
    finally:
        internals.stash_in_thread(OWN, previous)


def _wanted() -> str:
    return internals.get_in_thread(OWN) if internals.is_in_thread(OWN) else _chosen


def name(device: torch.device | str) -> str:
    """The implementation that serves tensors of ``device`` now: "triton", "native" or "eager"."""
    return _decide(_wanted(), torch.device(device).type)[0]


def why(device: torch.device | str) -> str:
    """One sentence: which implementation serves ``device`` now, and why."""
    chosen, reason = _decide(_wanted(), torch.device(device).type)
    return f"{chosen}: {reason}"


def resolve(device_type: str) -> ModuleType:
    """The module whose ``forward`` and ``backward`` serve tensors of ``device_type`` ("cpu", "cuda", ...)."""
    return _module(_wanted(), device_type)


def direct(like: Tensor) -> Any:
    """The ops on tensors like ``like`` without Python in between (`kernels.direct.Calls`); None where Python serves.

    Once they are there they know themselves what is chosen: behind large tensors, whose traffic empties the caches,
    asking for it here took 15 us.
    """
    if is_compiling():
        return None
    return _calls[like.is_cuda] or _first(like)


_calls = [None, None]  # of CPU tensors and of CUDA tensors, from the first call on that they serve


def _first(like: Tensor) -> Any:
    if not (like.is_cpu or like.is_cuda):
        return None
    _calls[like.is_cuda] = found = _direct(_wanted(), like.is_cuda)
    return found


def prepare(device: torch.device) -> None:
    """Have the ops on tensors of ``device`` called without Python from now on, where they can be: compiled graphs do.

    Raises RuntimeError where a forced implementation is not there.
    """
    if device.type in _DIRECT:
        _direct(_wanted(), device.type == "cuda")


def calls(device_type: str) -> str:
    """Which way calls on tensors of ``device_type`` ("cpu", "cuda", ...) take, and why, as a sentence."""
    chosen, _ = _decide(_wanted(), device_type)
    if chosen != _DIRECT.get(device_type):
        return f"Python: {chosen} serves {device_type} tensors"
    return str(importlib.import_module(_CALLS).why(device_type))


# Which implementation the calls in C++ are calls of.
_DIRECT = {"cpu": "native", "cuda": "triton"}
_CALLS = "fused_rect.kernels.direct"


@functools.cache
def _direct(wanted: str, on_gpu: bool) -> Any:
    device_type = "cuda" if on_gpu else "cpu"
    if _module(wanted, device_type).__name__ != _MODULES[_DIRECT[device_type]]:
        return None
    direct = importlib.import_module(_CALLS)
    calls = direct.calls(device_type)
    if calls is not None:
        auto, triton, native, _ = NAMES
        direct.register_ops(device_type, OWN, _chosen, auto, native, triton)
    return calls


def _forget() -> None:
    """For tests, which change what is there."""
    _module.cache_clear()
    _direct.cache_clear()
    _calls[:] = None, None


@functools.cache
def _module(wanted: str, device_type: str) -> ModuleType:
    chosen, _ = _decide(wanted, device_type)
    if wanted != "auto":
        _require(chosen, device_type)
    elif chosen == "eager" and device_type == "cpu":
        _warn_once()
    return importlib.import_module(_MODULES[chosen])


def _decide(wanted: str, device_type: str) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "forced by fused_rect.backend() or FUSED_RECT_BACKEND"
    if device_type in ("cuda", "xpu"):
        if _has_triton():
            return "triton", f"{device_type} tensors run Triton kernels"
        return "eager", "triton is not installed; `pip install triton` gives the fused kernels"
    if device_type == "cpu":
        available, reason = _native()
        return ("native" if available else "eager"), reason
    return "eager", f"there is no kernel for {device_type} tensors"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _native() -> tuple[bool, str]:
    cpu = importlib.import_module(_MODULES["native"])
    return cpu.available(), cpu.reason()


def _require(chosen: str, device_type: str) -> None:
    """RuntimeError where the forced implementation cannot serve ``device_type``."""
    if chosen == "triton":
        if not _has_triton():
            raise RuntimeError("backend 'triton' is forced but triton is not installed; `pip install triton`")
        if device_type not in ("cuda", "xpu", "cpu"):
            raise RuntimeError(f"backend 'triton' is forced but Triton cannot read {device_type} tensors")
    if chosen == "native":
        if device_type != "cpu":
            raise RuntimeError(f"backend 'native' is forced but serves CPU tensors only, got {device_type} tensors")
        available, reason = _native()
        if not available:
            raise RuntimeError(f"backend 'native' is forced but not available: {reason}")


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"fused_rect runs its slower eager path on CPU tensors: {_native()[1]}", stacklevel=2)
