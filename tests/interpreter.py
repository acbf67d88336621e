"""What our tests mend of Triton's interpreter before 3.9, so that they test the kernels and not the interpreter."""

import ctypes
import ctypes.util
import functools

import numpy as np


def mend():
    """`tl.fma` rounds once, and a scalar, which is an array of one element, counts as numpy 2.4 and later want it.

    Nothing changes where there is no Triton, or where its interpreter does both by itself.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.InterpreterBuilder
    if not hasattr(interpreter._interpreter, "fma_fp32"):  # 3.9's
        builder.create_fma = _create_fma
    if not hasattr(interpreter._patch_lang_tensor, "__wrapped__"):
        interpreter._patch_lang_tensor = _counting(interpreter._patch_lang_tensor)


def _create_fma(self, x, y, z):
    return type(z)(fma(x.data, y.data, z.data), z.dtype.scalar)


def fma(x, y, z):
    """x * y + z of float32 or float64 arrays, rounded once: C's fma, an element at a time."""
    rounded = np.frompyfunc(_function(z.dtype.name), 3, 1)(*np.broadcast_arrays(x, y, z))
    return np.asarray(rounded, dtype=z.dtype)


@functools.cache
def _function(dtype):
    name, number = {"float32": ("fmaf", ctypes.c_float), "float64": ("fma", ctypes.c_double)}[dtype]
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.argtypes, function.restype = [number] * 3, number
    return function


def _counting(patch):
    """``patch``, which gives tensors their methods for a launch, with the count as Triton 3.7 and later take it."""

    @functools.wraps(patch)
    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patched
