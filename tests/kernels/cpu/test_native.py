"""The C++ kernels against the eager path: every element bit for bit, sums within their rounding, each SIMD build."""

import contextlib
import ctypes
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rectifying import RULES

from fused_rect import reference
from fused_rect.backends import eager
from fused_rect.kernels import cpu
from fused_rect.kernels.cpu import build, launch
from fused_rect.rules import PRELU, RELU, Need, Norm, Parameters, Rule

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
# Around zero, at the ends of float32, bfloat16 and float16, and where float16 rounds to infinity or to subnormals.
EDGES = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38, 65504.0, 65520.0, -65519.9, 6e-8, -2e-7)
# Planes and rows of every kind: tails of each vector width, several pieces a plane and strips a row, bytes of the bits
# that planes, rows and strips share, several rows a group, one element.
SHAPES = st.one_of(
    st.tuples(st.integers(1, 70)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(20, 60), st.integers(40, 70)),
    st.tuples(*[st.integers(1, 5)] * 5),
    st.tuples(st.integers(3, 6), st.integers(1, 5), st.integers(4, 15), st.integers(4, 15)),
    st.sampled_from([(40, 2100), (2, 1030, 1, 1), (1, 1, 9000), (3, 2500, 1, 2), (70, 1027), (2, 3, 65, 67), (9, 601)]),
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
    ends = torch.finfo(got.dtype)
    close = (got.double() - exact).abs() <= 1e-6 * size + ends.eps * exact.abs() + ends.smallest_normal * ends.eps
    overflows = ~(size <= 0.99 * ends.max)
    return bool((close | overflows).all())


def poisoned_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits for ``x`` that hold stale ones, and the memory around them."""
    count = (x.numel() + 7) // 8
    room = torch.full((count + 64,), 0xA5, dtype=torch.uint8)
    return room[32 : 32 + count], room


@contextlib.contextmanager
def caches_of_one_byte():
    set_bytes = build.library().fused_rect_caches
    set_bytes.argtypes = [ctypes.c_int64]
    set_bytes(1)
    try:
        yield
    finally:
        set_bytes(2**40)


@settings(max_examples=150)
@given(
    shape=SHAPES, order=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(list(RULES.values())), has_bias=st.booleans(),
    per_channel=st.booleans(), wide=st.booleans(), seed=st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
@example((1, 2, 17, 1), 0, torch.float32, PRELU, True, True, False, 0)
@example((40, 2100), 0, torch.bfloat16, PRELU, True, True, True, 1)
@example((70, 1027), 1, torch.float32, RELU, True, True, True, 1)
@example((3, 5, 65, 67), 1, torch.float32, Rule("leaky_relu", 0.1, 0.1), True, True, True, 1)
@example((131, 64), 1, torch.float32, Rule("leaky_relu", 0.1, 0.1), True, True, True, 1)
@example((263, 96), 1, torch.float64, PRELU, True, True, True, 1)
@example((263, 64), 1, torch.float64, PRELU, True, True, True, 1)
@example((263, 64), 1, torch.bfloat16, RELU, True, True, True, 1)
@example((2, 3, 16, 20), 1, torch.float16, PRELU, True, True, True, 1)
@example((2, 3, 64, 66), 1, torch.float32, RELU, True, True, True, 1)
@example((263, 96), 1, torch.float32, RELU, True, True, True, 1)
def test_equals_eager(variant, shape, order, dtype, rule, has_bias, per_channel, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    dims = list(range(len(shape))) if order % 2 else torch.randperm(len(shape), generator=generator).tolist()
    x, grad = (values(generator, shape, dims, dtype) for _ in range(2))
    parameter_dtype = torch.float32 if wide and dtype in (torch.bfloat16, torch.float16) else dtype
    channels = shape[1] if len(shape) > 1 else 1
    bias = torch.randn(channels, generator=generator).to(parameter_dtype) if has_bias and len(shape) > 1 else None
    weight = torch.randn(channels if per_channel else 1, generator=generator).to(parameter_dtype)
    parameters = Parameters(bias, weight if rule.learned else None, torch.tensor([seed]) if rule.random else None)
    # float64 slopes: fma here, two roundings there
    same = close_64 if dtype == torch.float64 and rule.random else bits_equal

    out, expected, (bits, room) = torch.empty_like(x), torch.empty_like(x), poisoned_bits(x)
    cpu.forward(x, parameters, rule, out, bits)
    expected_bits = torch.empty_like(bits)
    eager.forward(x, parameters, rule, expected, expected_bits)
    assert same(out, expected) and torch.equal(bits, expected_bits)
    assert (room[:32] == 0xA5).all() and (room[-32:] == 0xA5).all()
    in_place, past_caches = x.clone(), torch.empty_like(x)
    cpu.forward(in_place, parameters, rule, in_place, None)
    assert bits_equal(in_place, out)
    with caches_of_one_byte():
        cpu.forward(x, parameters, rule, past_caches, None)
    assert bits_equal(past_caches, out)
    if len(shape) > 1 and not rule.random:
        mean, var, scale = (torch.randn(channels, generator=generator).to(parameter_dtype) for _ in range(3))
        norm = Norm(mean, var.abs(), scale if per_channel else None, 1e-5)
        eager.forward(x, parameters, rule, expected, None, norm)
        cpu.forward(in_place.copy_(x), parameters, rule, in_place, None, norm)
        assert bits_equal(in_place, expected)

    wide_grad = grad.to(reference.computed_in(dtype))
    scaled = torch.empty_like(wide_grad)
    eager.backward(wide_grad, x.to(scaled.dtype), parameters, rule, scaled, Need())
    for kept in (x,) if rule.learned else (bits, x):
        given = parameters if kept is x else parameters._replace(bias=None)
        grad_input, expected, need = torch.empty_like(x), torch.empty_like(x), Need(parameter_dtype, rule.learned)
        sums = cpu.backward(grad, kept, given, rule, grad_input, need)
        eager.backward(grad, kept, given, rule, expected, Need())
        assert same(grad_input, expected)
        alias = grad.clone()
        again = cpu.backward(alias, kept, given, rule, alias, need)
        assert bits_equal(alias, grad_input) and bits_equal(sums[0], again[0])
        assert cpu.backward(grad, kept, given, rule, alias, Need()) == (None, None) and bits_equal(alias, grad_input)
        assert sums[0].dtype == parameter_dtype and sum_is_right(sums[0], scaled)
    if rule.learned:
        assert bits_equal(sums[1], again[1]) and sums[1].shape == weight.shape
        z = reference.add_bias(x, bias)
        assert sum_is_right(sums[1], torch.where(z > 0, 0, z * wide_grad))


def close_64(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, 1e-14, 1e-15, True)


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


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.random], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_within_one_ulp(variant, rule, dtype):
    seed = torch.tensor([2**40 + 1])
    x = torch.full((3, 5, 1000), -1.0, dtype=dtype)
    expected = reference.slopes(seed, x, rule)
    cpu.forward(x, Parameters(seed=seed), rule, x, None)
    assert ((-x - expected).abs() <= torch.finfo(dtype).eps * max(abs(rule.lower), abs(rule.upper), 1)).all()


@pytest.mark.parametrize("name", ["leaky_relu", "prelu", "rrelu"])
@pytest.mark.parametrize("shape", [(8, 24, 33, 31), (700, 300), (67, 1027), (16, 63, 7, 7)])
def test_results_do_not_depend_on_threads(variant, name, shape):
    """The odd sizes cut the tensor and the bits' bytes into pieces of several lengths; 7 threads exceed the cores."""
    generator, rule = torch.Generator().manual_seed(0), RULES[name]
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    bias, weight = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator)
    parameters = Parameters(bias, weight if rule.learned else None, torch.tensor([5]) if rule.random else None)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            out, grad_input, (bits, _) = torch.empty_like(x), torch.empty_like(x), poisoned_bits(x)
            cpu.forward(x, parameters, rule, out, bits)
            kept, given = (x, parameters) if rule.learned else (bits, parameters._replace(bias=None))
            sums = cpu.backward(grad, kept, given, rule, grad_input, Need(torch.float32, rule.learned))
            results.append([t for t in (out, bits, grad_input, *sums) if t is not None])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(16, 64, 56, 56), (7, 3, 301, 33), (4, 5, 1023, 1), (999, 99, 1, 1), (9, 601, 1, 1)])
def test_the_sum_of_a_constant_keeps_its_digits(variant, shape, last):
    """Whatever the vectors' length: float32 would round a constant the same way at each addition."""
    layout = torch.channels_last if last else torch.contiguous_format
    bits = torch.zeros((math.prod(shape) + 7) // 8, dtype=torch.uint8)
    for value in (1.1, 0.3, 1 / 3, 7.7e-3, 1.9999):
        grad = torch.full(shape, value).contiguous(memory_format=layout)
        sums, _ = cpu.backward(grad, bits, Parameters(), RELU, torch.empty_like(grad), Need(torch.float32))
        exact = grad.flatten()[0].double() * (grad.numel() // shape[1])
        assert ((sums.double() - exact).abs() <= 4e-7 * exact).all()


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 3), (1, 2, 1031), (3, 2, 17), (9, 2, 300)])
def test_lanes_past_the_end_reach_no_sum(variant, shape):
    """They would take the negative side, where an infinite slope makes 0 * inf of their absent gradient."""
    x, grad, bias = torch.full(shape, 10.0), torch.ones(shape), torch.full(shape[1:2], -0.5)
    parameters = Parameters(bias, torch.full_like(bias, math.inf))
    sums = cpu.backward(grad, x, parameters, PRELU, torch.empty_like(x), Need(torch.float32, True))
    assert torch.equal(sums[0], torch.full_like(bias, x.numel() / shape[1])) and not sums[1].any()


def test_neighbours_are_not_written(variant):
    """The ragged ends reach over whole vectors; what lies next to the tensors must stay."""
    for shape in [(3,), (2, 3, 5), (5, 7), (3, 2, 17), (1, 3, 1031), (9, 700)]:
        n = math.prod(shape)
        room = torch.full((n + 64,), 7.0)
        x, out = torch.randn(shape), room[32 : 32 + n].view(shape)
        parameters = Parameters(weight=torch.rand(shape[1] if len(shape) > 1 else 1))
        cpu.forward(x, parameters, PRELU, out, None)
        cpu.backward(x, x, parameters, PRELU, out, Need(torch.float32, True))
        assert (room[:32] == 7).all() and (room[32 + n :] == 7).all()


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_no_memory_is_an_error_and_the_sums_of_one_row_take_one(room):
    """(1, C) makes sums of C parts: beside C numbers half as many fit or do not, and twice C are never asked for."""
    code = f"""
import resource, torch
from fused_rect.kernels import cpu
from fused_rect.rules import RELU, Need, Parameters
torch.set_num_threads(1)
C = 2**24
grad, bits = torch.ones(1, C), torch.zeros(C // 8, dtype=torch.uint8)
cpu.backward(grad[:, :8], bits[:1], Parameters(), RELU, torch.empty(1, 8), Need(torch.float32))
grad_bias = torch.empty(C)
torch.Tensor.new_empty = lambda *args, **kwargs: grad_bias
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int({room} * 4 * C),) * 2)
try:
    cpu.backward(grad, bits, Parameters(), RELU, grad, Need(torch.float32))
    print("done", bool((grad_bias == 1).all()))
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "done True" if room > 1 else "no memory for the sums of a rectifier on a tensor of shape (1, 16777216)"
    assert done.stdout.strip() == expected, done.stderr
