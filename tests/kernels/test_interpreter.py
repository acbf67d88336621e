"""What the kernels' tests rest on: Triton's interpreter, mended where needed, rounds an fma once, and counts."""

from fractions import Fraction

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import assume, given
from hypothesis import strategies as st

from fused_rect.kernels import rectify

pytestmark = pytest.mark.skipif(isinstance(rectify.rectify, triton.JITFunction), reason="tests of the interpreter")


@triton.jit
def fused(x, y, z, out):
    tl.store(out, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


@triton.jit
def count(n, out, STEP: tl.constexpr):
    total = tl.load(out)
    for i in range(0, n * 2, STEP):
        total += i
    tl.store(out, total)


def nearest(value, exact):
    """Whether no neighbour of ``value`` is nearer to ``exact``, which is a tie only where ``value`` is even."""
    below, above = (np.nextafter(value, value.dtype.type(side)) for side in (-np.inf, np.inf))
    off = abs(Fraction(float(value)) - exact)
    others = [abs(Fraction(float(other)) - exact) for other in (below, above) if np.isfinite(other)]
    even = value.view(f"i{value.itemsize}") % 2 == 0
    return all(off < other or (off == other and even) for other in others)


@pytest.mark.parametrize("dtype, width", [(np.float32, 32), (np.float64, 64)])
def test_an_fma_rounds_once(dtype, width):
    floats = st.floats(-1e6, 1e6, width=width, allow_subnormal=False).map(dtype)

    @given(floats, floats, floats, st.integers(-2, 2), st.booleans())
    def each(x, y, z, off, cancel):
        if cancel:  # what is left of the product is what its own rounding would have taken
            z = -(x * y) * (1 + off * np.finfo(dtype).eps)
        out = torch.zeros(1, dtype=torch.from_numpy(np.zeros(1, dtype)).dtype)
        fused[(1,)](*(torch.tensor([number.item()], dtype=out.dtype) for number in (x, y, dtype(z))), out)
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(dtype(z)))
        assume(exact == 0 or abs(exact) > 1e-30)
        assert nearest(out.numpy()[0], exact)

    each()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_mended_fma_knows_infinities_nan_and_the_halves_that_two_roundings_miss(dtype):
    one, tiny = dtype(1), np.finfo(dtype).eps
    x = np.array([np.inf, np.nan, 0, 1 + tiny, 1 + tiny], dtype)
    y = np.array([1, 1, np.inf, 1 - tiny, 1 + tiny], dtype)
    z = np.array([-np.inf, 1, 1, -1, -1 - 2 * tiny], dtype)
    expected = np.array([np.nan, np.nan, np.nan, -tiny * tiny, tiny * tiny], dtype)
    np.testing.assert_array_equal(interpreter.fma(x, y, z), expected)
    assert interpreter.fma(x, y, one).dtype == dtype


def test_a_scalar_counts():
    out = torch.zeros(1, dtype=torch.int32)
    count[(1,)](3, out, STEP=2)
    assert out.item() == 0 + 2 + 4
