"""The ops called without Python in between (direct.cpp), for CPU tensors and for CUDA tensors.

For a CUDA tensor, the first call of a kind asks here for its plan: what launch.py would launch, compiled, as numbers.
The argument list follows Triton's own record of the compiled kernel: its signature without constants, then pointers to
scratch memory, which differ by Triton's version, as many as the PTX declares more.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...internals import DeviceContext
from ...reference import computed_in
from ...rules import Need, Rule, numbers
from ..cpu import build

# As call.h numbers them; the bits and the seed besides.
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POINTERS = ("x", "grad", "out", "bits", "bias", "weight", "seed", "partials", "first", "second")  # as in cuda.h
NORM = ("mean", "var", "norm_weight")  # the kernel's last pointers, of which C++ knows nothing


class Calls(NamedTuple):
    """None, and rectify_'s False, say that Python is to serve; else it is the op's result, True or the layer's output.

    rectify, rectify_: ``(input, parameters, rule, bias_added)``
    layer: ``(input, linear_map.__dict__, map_adds_bias, parameters, rule)``, a module of torch's and the op on its
    output; the bias in ``parameters`` is not looked at
    """

    rectify: Any
    rectify_: Any
    layer: Any


def calls(device_type: str) -> Calls | None:
    """The ops for tensors of ``device_type`` ("cpu" or "cuda"), or None where Python serves them."""
    return None if isinstance(found := _calls(device_type), str) else found


def register_ops(device_type: str, own: str, *names: str) -> None:
    """Let the dispatcher call the ops of ``device_type`` without Python, where `calls` found that it can.

    For as long as a thread's own choice, kept by torch under ``own``, or else the process's, which is the first of
    ``names``, is one of the others: any implementation, that of CPU tensors, that of CUDA tensors.
    """
    objects = [ctypes.py_object] * len(names)
    register = _function("fused_rect_direct_ops", None, ctypes.c_int, ctypes.c_char_p, *objects)
    register(device_type == "cuda", own.encode(), *names)


def why(device_type: str) -> str:
    """Which way calls on tensors of ``device_type`` take, and why, as a sentence."""
    found = _calls(device_type)
    return f"Python, slower for small tensors: {found}" if isinstance(found, str) else f"C++, {_library()._name}"


def _calls(device_type: str) -> Calls | str:
    """What there is, or why there is nothing."""
    try:
        if device_type == "cpu":
            entry = ctypes.cast(build.library().fused_rect, ctypes.c_void_p)
            _function("fused_rect_direct_cpu", None, ctypes.c_void_p)(entry)
        elif found := _obstacle():
            return found
    except build.BuildError as error:
        return str(error)
    make = _function("fused_rect_direct", ctypes.py_object, *[ctypes.py_object] * 3)
    return Calls(*make(device_type == "cuda", DeviceContext, _numbers_of))


def _numbers_of(name: str, lower: float, upper: float) -> tuple[int, float, float]:
    return numbers(Rule(name, lower, upper))


def _obstacle() -> str:
    """Why there are no CUDA calls, or nothing."""
    if torch.version.hip or not torch.cuda.is_available():
        return "torch has no CUDA device here"
    import triton
    from triton import knobs

    from ..rectify import rectify
    from ..reduce import finish

    if not isinstance(rectify, triton.JITFunction):
        return "TRITON_INTERPRET is set"
    offer = _function("fused_rect_direct_cuda", ctypes.c_int, *[ctypes.py_object] * 3)
    if not offer(Host(), knobs.runtime, (rectify, finish)):
        return "libcuda.so.1 is not to be found"
    return ""


def _library() -> ctypes.CDLL:
    return build.library(build.DIRECT)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """One of direct.cpp, called with Python's lock held."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, _library()))


# ---- what C++ asks for ----


@dataclass(frozen=True)
class Pointer:
    """What Triton's binder asks of a tensor."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else 1


class Host:
    """Known to C++ by these names."""

    def plan(
        self, device: int, shape: list[int], stride: list[int], type: int, there: int, aligned: int, bits: bool,
        bias_type: int, weight_type: int, weights: int, name: str, lower: float, upper: float, bias_sum: int,
        need_weight: bool,
    ) -> tuple[Any, ...] | None:  # fmt: skip
        """The launches of a call (direct.cpp's `prepare`), sums, partials of each, channels; None: Triton launches.

        ``there`` and ``aligned``: bits for x, grad, out, bias, weight, seed; types: indices of TYPES.
        """
        from .. import compiled, launch

        def pointer(place: int, dtype: torch.dtype) -> Pointer | None:
            return Pointer(dtype, bool(aligned >> place & 1)) if there >> place & 1 else None

        def new(dtype: torch.dtype | None) -> Pointer | None:
            return None if dtype is None else Pointer(dtype, True)

        dtype, rule = TYPES[type], Rule(name, lower, upper)
        need = Need(None if bias_sum < 0 else TYPES[bias_sum], need_weight)
        bias, weight = pointer(3, TYPES[bias_type]), pointer(4, TYPES[weight_type])
        call = launch.rectify_call(tuple(shape), tuple(stride), dtype, rule, bias is not None, weights, need)
        outputs = launch.outputs(dtype, need)
        compute = new(computed_in(dtype)) if outputs else None
        tensors = (
            pointer(0, dtype), pointer(1, dtype), pointer(2, dtype) or new(dtype), new(torch.uint8) if bits else None,
            bias, weight, pointer(5, torch.int64), compute, *[None] * len(NORM),
        )  # fmt: skip
        with torch.cuda.device(device):
            launches = [_numbers(call.launchable(tensors), (*POINTERS[:8], *NORM))]
            if outputs:
                first, second = (*map(new, outputs), None)[:2]
                finish = launch.finish_call(call.plan, len(outputs), computed_in(dtype))
                launches.append(_numbers(finish.launchable((compute, first, second)), POINTERS[7:]))
        if None in launches or compiled.hooked():
            return None
        return tuple(launches), len(outputs), call.numbers["stride"] if outputs else 0, call.plan.channels

    def stream(self, device: int, number: int) -> int:
        """CUDA's handle of this thread's stream, which torch numbers so."""
        current = torch.cuda.current_stream(device)
        if current.stream_id != number:
            raise RuntimeError(f"the current stream of device {device} is {current}, and not number {number}")
        return int(current.cuda_stream)


_kept: set[Any] = set()  # whose handles C++ has: a compiled kernel unloads its module when it goes


def _numbers(found: Any, pointers: tuple[str, ...]) -> tuple[Any, ...] | None:
    """A `Launchable` as cuda.h's `Launch`; None where a plain launch is not all there is to it."""
    if found is None:
        return None
    metadata, arguments = found.kernel.metadata, []
    if metadata.num_ctas != 1 or metadata.launch_pdl or metadata.launch_cooperative_grid:
        return None
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    values = (*pointers, *found.rest)
    for value, (_, type) in zip(values, found.kernel.src.signature.items(), strict=True):
        if type in ("i32", "i64"):
            arguments.append((-1, value))
        elif type != "constexpr":
            arguments.append((POINTERS.index(value), 0))
    scratch = _declared(found.kernel) - len(arguments)
    if not 0 <= scratch <= 2:
        return None
    _kept.add(found.kernel)
    warps = metadata.num_warps * metadata.warp_size
    return int(found.kernel.function), *found.grid, warps, metadata.shared, (*arguments, *[(-1, 0)] * scratch)


def _declared(kernel: Any) -> int:
    """How many parameters the compiled kernel takes, by its PTX."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", kernel.asm["ptx"], re.S) if "ptx" in kernel.asm else None
    return -1 if entry is None else entry[1].count(".param")
