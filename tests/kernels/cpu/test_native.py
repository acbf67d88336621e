"""The C++ kernels against the eager path: every element bit for bit, sums within their rounding, each SIMD build."""

import ctypes
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fused_rect import reference
from fused_rect import rules as rectifiers
from fused_rect.backends import eager
from fused_rect.kernels import cpu
from fused_rect.kernels.cpu import build, launch

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason())

WIDTHS = ["DEFAULT", "AVX2", "AVX512"]
OWN = torch.backends.cpu.get_cpu_capability()
VARIANTS = WIDTHS[: WIDTHS.index(OWN) + 1] if OWN in WIDTHS else [OWN]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """The kernels as built for each instruction set up to the machine's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
        build._outcomes.cache_clear()
        launch._kernel.cache_clear()
        yield request.param
    build._outcomes.cache_clear()
    launch._kernel.cache_clear()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RULES = (
    ("relu", 0.0, 0.0),
    ("leaky_relu", 0.1, 0.1),
    ("leaky_relu", -0.5, -0.5),
    ("prelu", 0.0, 0.0),
    ("rrelu", 1 / 8, 1 / 3),
    ("rrelu", -0.5, 0.5),
    ("rrelu_divisor", 3.0, 8.0),
)
# Around zero, at the ends of float32, bfloat16 and float16, and where float16 rounds to infinity or to subnormals.
EDGES = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38, 65504.0, 65520.0, -65519.9, 6e-8, -2e-7)
# Planes and rows of every kind: tails of each vector width, several strips a plane, several rows a group, one element.
SHAPES = st.one_of(
    st.tuples(st.integers(1, 70)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(20, 60), st.integers(40, 70)),
    st.tuples(*[st.integers(1, 5)] * 5),
    st.sampled_from([(40, 2100), (2, 1030, 1, 1), (1, 1, 3000), (3, 2500, 1, 2)]),
)


def values(generator: torch.Generator, shape: tuple, order: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers and edge values in a dense tensor whose dims lie in memory as ``order`` says."""
    x = torch.randn([shape[d] for d in order], generator=generator)
    flat = x.view(-1)
    places = torch.randperm(flat.numel(), generator=generator)[: flat.numel() // 3][: len(EDGES)]
    flat[places] = torch.tensor(EDGES)[: len(places)]
    return x.permute([order.index(d) for d in range(len(shape))]).to(dtype)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as numbers, in the signs of zeros, and in where NaN is (whose payload is nobody's)."""
    nan = torch.isnan(a)
    same = torch.equal(nan, torch.isnan(b)) and torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0))
    return same and torch.equal(torch.signbit(a).masked_fill(nan, False), torch.signbit(b).masked_fill(nan, False))


def sum_is_right(got: torch.Tensor, terms: torch.Tensor) -> bool:
    """``got`` (C,) or (1,) sums ``terms`` over all other dims, within float32's rounding of it and one of its own."""
    dims = [d for d in range(terms.dim()) if d != 1] if got.numel() > 1 else list(range(terms.dim()))
    exact, size = terms.double().sum(dims), terms.double().abs().sum(dims)
    close = (got.double() - exact).abs() <= 1e-6 * size + torch.finfo(got.dtype).eps * exact.abs()
    overflows = ~(size <= 0.99 * torch.finfo(got.dtype).max)
    return bool((close | overflows).all())


@settings(max_examples=150)
@given(
    shape=SHAPES, order=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES), rule=st.sampled_from(RULES),
    has_bias=st.booleans(), per_channel=st.booleans(), wide=st.booleans(), seed=st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
@example((1, 2, 17, 1), 0, torch.float32, RULES[3], True, True, False, 0)
@example((40, 2100), 0, torch.bfloat16, RULES[3], True, True, True, 1)
def test_equals_eager(variant, shape, order, dtype, rule, has_bias, per_channel, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    dims = list(range(len(shape))) if order % 2 else torch.randperm(len(shape), generator=generator).tolist()
    x, grad = (values(generator, shape, dims, dtype) for _ in range(2))
    parameter_dtype = torch.float32 if wide and dtype in (torch.bfloat16, torch.float16) else dtype
    channels = shape[1] if len(shape) > 1 else 1
    bias = torch.randn(channels, generator=generator).to(parameter_dtype) if has_bias and len(shape) > 1 else None
    weight = torch.randn(channels if per_channel else 1, generator=generator).to(parameter_dtype)
    parameters = (bias, weight if rule[0] == "prelu" else None, torch.tensor([seed]), *rule)
    exact = dtype != torch.float64 or not rule[0].startswith("rrelu")  # float64 slopes: fma here, two roundings there

    out, expected = torch.empty_like(x), torch.empty_like(x)
    cpu.forward(x, *parameters, out)
    eager.forward(x, *parameters, expected)
    assert bits_equal(out, expected) if exact else torch.allclose(out, expected, 1e-14, 1e-15, True)
    in_place = x.clone()
    cpu.forward(in_place, *parameters, in_place)
    assert bits_equal(in_place, out)

    saved = out if rectifiers.saves_output(rule[0], rule[1]) else x
    grad_input, expected = torch.empty_like(x), torch.empty_like(x)
    need_weight = rule[0] == "prelu"
    sums = cpu.backward(grad, saved, *parameters, grad_input, True, need_weight)
    eager.backward(grad, saved, *parameters, expected, False, False)
    assert bits_equal(grad_input, expected) if exact else torch.allclose(grad_input, expected, 1e-14, 1e-15, True)
    alias = grad.clone()
    again = cpu.backward(alias, saved, *parameters, alias, True, need_weight)
    assert bits_equal(alias, grad_input) and bits_equal(sums[0], again[0])

    z = reference.add_bias(x, bias)
    wide_grad = grad if dtype == torch.float64 else grad.float()
    scaled = torch.empty_like(wide_grad)
    eager.backward(wide_grad, saved.to(scaled.dtype), *parameters, scaled, False, False)
    assert sums[0].dtype == parameter_dtype if bias is not None else sums[0].dtype == dtype
    assert sum_is_right(sums[0], scaled)
    if need_weight:
        assert bits_equal(sums[1], again[1]) and sums[1].shape == weight.shape
        assert sum_is_right(sums[1], torch.where(z > 0, 0, z * wide_grad))


@settings(max_examples=50)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    counter=st.sampled_from([0, 1, 2**30, 2**32 - 5, 2**40 + 3]),
    count=st.integers(1, 40),
)
def test_words_equal_the_reference(variant, seed, counter, count):
    got = torch.empty(4 * count, dtype=torch.int32)
    words = build.library().fused_rect_words
    words.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p]
    words(seed % 2**64, counter, count, got.data_ptr())
    assert torch.equal(got, reference.words(seed, 4 * counter, 4 * count))


@pytest.mark.parametrize("law", ["slope", "divisor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_within_one_ulp(variant, law, dtype):
    seed, lower, upper = torch.tensor([2**40 + 1]), *rectifiers.DEFAULT_BOUNDS[law]
    x = torch.full((3, 5, 1000), -1.0, dtype=dtype)
    cpu.forward(x, None, None, seed, "rrelu" if law == "slope" else "rrelu_divisor", lower, upper, x)
    expected = reference.slopes(seed, x, lower, upper, law)
    assert ((-x - expected).abs() <= torch.finfo(dtype).eps * expected).all()


@pytest.mark.parametrize("rule", [RULES[1], RULES[3], RULES[4]], ids=lambda r: r[0])
@pytest.mark.parametrize("shape", [(8, 24, 33, 31), (700, 300)])
def test_bits_do_not_depend_on_threads(variant, rule, shape):
    """The odd sizes cut the tensor into pieces of several lengths; 7 threads are more than this machine may have."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.rand(shape[1], generator=generator) if rule[0] == "prelu" else None
    bias, seed = torch.randn(shape[1], generator=generator), torch.tensor([5])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            out, grad_input = torch.empty_like(x), torch.empty_like(x)
            cpu.forward(x, bias, weight, seed, *rule, out)
            sums = cpu.backward(grad, out, bias, weight, seed, *rule, grad_input, True, weight is not None)
            results.append([t for t in (out, grad_input, *sums) if t is not None])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 3), (1, 2, 1031), (3, 2, 17)])
def test_lanes_past_the_end_reach_no_sum(variant, shape):
    """They would take the negative side, where an infinite slope makes 0 * inf of their absent gradient."""
    x, grad, bias = torch.full(shape, 10.0), torch.ones(shape), torch.full(shape[1:2], -0.5)
    weight = torch.full_like(bias, math.inf)
    sums = cpu.backward(grad, x, bias, weight, None, "prelu", 0.0, 0.0, torch.empty_like(x), True, True)
    assert torch.equal(sums[0], torch.full_like(bias, x.numel() / shape[1])) and not sums[1].any()


def test_neighbours_are_not_written(variant):
    """The ragged ends reach over whole vectors; what lies next to the tensors must stay."""
    for shape in [(3,), (2, 3, 5), (5, 7), (3, 2, 17), (1, 3, 1031)]:
        n = math.prod(shape)
        room = torch.full((n + 64,), 7.0)
        x, out = torch.randn(shape), room[32 : 32 + n].view(shape)
        channels = shape[1] if len(shape) > 1 else 1
        cpu.forward(x, None, torch.rand(channels), None, "prelu", 0.0, 0.0, out)
        cpu.backward(x, x, None, torch.rand(channels), None, "prelu", 0.0, 0.0, out, True, True)
        assert (room[:32] == 7).all() and (room[32 + n :] == 7).all()
