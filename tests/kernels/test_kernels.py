"""The Triton kernels against the specification: the eager backend bit for bit in float32, float64 arithmetic elsewhere.

Every test launches through `kernels.launch`, under Triton's interpreter or, with a PTX machine as the active driver, as
compiled code. The tensors lie inside larger ones whose margins must survive, so that a stray access shows in both.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rectifying import RULES

import fused_rect as fr
from fused_rect import reference
from fused_rect.backends import eager
from fused_rect.kernels import launch, rectify
from fused_rect.kernels import plan as planner
from fused_rect.rules import LAWS, PRELU, Need, Norm, Parameters, Rule, leaky_relu, rrelu
from fused_rect.rules import RULES as TABLE

pytestmark = pytest.mark.ptx

INTERPRETED = not isinstance(rectify.rectify, triton.JITFunction)
# The interpreter truncates where it stores bfloat16, so only compiled code is held to the rounding.
DTYPES = [torch.float32, torch.float16, torch.float64] + ([] if INTERPRETED else [torch.bfloat16])
EDGES = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 6e-8, -6e-8, 65504.0, -65504.0)
MARGIN = 64
STALE = 0b10100101
NONE = Parameters()


class GuardedCall:
    """Arguments of one call, its tensors in the middle of guarded storage, ``shift`` elements off 16-byte alignment."""

    def __init__(self, shape, order, dtype, rule, bias=True, per_channel=True, shift=0, edges=False, seed=0):
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        self.shape, self.order, self.dtype, self.shift, self.rule = shape, order, dtype, shift, rule
        self.guarded = []
        channels = shape[1] if len(shape) > 1 else 1
        self.input = self.dense(edges)
        self.grad = self.dense(edges)
        self.bias = self.random(channels) if bias else None
        self.weight = self.random(channels if per_channel else 1) if rule.learned else None
        self.seed = torch.tensor([seed * 0x9E3779B97F4A7C15 % 2**63]) if rule.random else None

    def __repr__(self):
        parameters = [name for name in ("bias", "weight") if getattr(self, name) is not None]
        return f"{self.shape} laid out as {self.order}, {self.dtype}, {self.shift} off, {self.rule}, {parameters}"

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def guard(self, size, dtype, fill):
        """``size`` elements in a storage of ``fill``, filled with it."""
        storage = torch.full((size + 2 * MARGIN + self.shift,), fill, dtype=dtype)
        first = MARGIN + self.shift
        self.guarded.append((storage.clone(), storage, first, size))
        return storage[first : first + size]

    def empty(self):
        """A dense tensor of the call's layout inside guards of NaN."""
        flat = self.guard(math.prod(self.shape), self.dtype, math.nan)
        laid = flat.view([self.shape[d] for d in self.order])
        return laid.permute([self.order.index(d) for d in range(len(self.shape))])

    def bits(self):
        """Stale ones: bytes that every call has to overwrite."""
        return self.guard(-(-math.prod(self.shape) // 8), torch.uint8, STALE)

    def dense(self, edges=False):
        values = self.random(math.prod(self.shape))
        if edges:
            places = torch.randperm(values.numel(), generator=self.generator)[: values.numel() // 2][: len(EDGES)]
            values[places] = torch.tensor(EDGES).to(self.dtype)[: len(places)]
        return self.empty().copy_(
            values.view([self.shape[d] for d in self.order]).permute(
                [self.order.index(d) for d in range(len(self.shape))]
            )
        )

    @property
    def parameters(self):
        return Parameters(self.bias, self.weight, self.seed)

    def forward(self, module, out=None, bits=None):
        out = self.empty() if out is None else out
        module.forward(self.input, self.parameters, self.rule, out, bits)
        return out

    def backward(self, module, kept, grad_input=None, need_bias=None):
        grad_input = self.empty() if grad_input is None else grad_input
        need_bias = self.bias is not None if need_bias is None else need_bias
        parameters = self.parameters._replace(bias=None) if kept.dtype == torch.uint8 else self.parameters
        need = Need(self.dtype if need_bias else None, self.weight is not None)
        return grad_input, *module.backward(self.grad, kept, parameters, self.rule, grad_input, need)

    def keep(self):
        """Whatever backward can be given: forward's bits, unless the slope is learned, and its input."""
        if self.rule.keeps_input:
            return [self.input]
        bits = self.bits()
        self.forward(launch, bits=bits)
        return [bits, self.input]

    def negative(self):
        return reference.is_negative(reference.add_bias(self.input, self.bias), self.rule)

    def margins_survive(self):
        for before, after, first, size in self.guarded:
            for part in (slice(first), slice(first + size, None)):
                if not torch.equal(before[part].nan_to_num(), after[part].nan_to_num()):
                    return False
        return True


def same(a, b):
    """Equal in bits, but for the payload of NaN."""
    nan = a.isnan()
    zero = torch.zeros((), dtype=a.dtype)
    a, b, same_nan = torch.where(nan, zero, a), torch.where(b.isnan(), zero, b), torch.equal(nan, b.isnan())
    return same_nan and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def sums_to(got, terms):
    """``got`` sums ``terms`` (float32 at least) over all dims but 1, or over all, within float32's rounding."""
    keep = got.numel() > 1 and terms.dim() > 1
    dims = [d for d in range(terms.dim()) if not keep or d != 1]
    exact, size = terms.double().sum(dims).view(-1), terms.double().abs().sum(dims).view(-1)
    finite = torch.isfinite(size)
    unit = torch.finfo(got.dtype).eps
    small = 2e-14 if terms.dtype == torch.float64 else 1e-6
    close = (got.double().view(-1) - exact).abs() <= small * size + unit * exact.abs()
    overflows = exact.abs() > torch.finfo(got.dtype).max
    return bool((close | overflows)[finite].all()) and same(got.double().view(-1)[~finite], exact[~finite])


SHAPES = st.one_of(
    st.tuples(st.integers(1, 1500)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20)),
    st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(*[st.integers(1, 5)] * 5),
    st.sampled_from([(2, 3, 24, 24), (1, 2, 47, 43), (40, 2, 4, 4), (1, 1, 1, 1), (300, 16), (17, 8, 4, 8)]),
)


@st.composite
def calls(draw, edges=False, dtypes=DTYPES):
    shape = draw(SHAPES)
    order = draw(st.permutations(range(len(shape))))
    rule = draw(st.sampled_from(list(RULES.values())))
    return GuardedCall(
        shape, order, draw(st.sampled_from(dtypes)), rule, draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 3])), edges, draw(st.integers(0, 2**31)),
    )  # fmt: skip


# A failing call is small enough to read; shrinking it further takes minutes under the interpreter, which does about ten
# programs a second.
EXAMPLES = settings(max_examples=15 if INTERPRETED else 25, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@EXAMPLES
@given(calls(dtypes=[torch.float32]))
def test_float32_equals_eager_bit_for_bit(call):
    equals_eager(call)


@pytest.fixture
def nans_of_either_sign(monkeypatch):
    """Lanes that add the same NaNs in another order keep another sign; the PTX machine takes that for a race."""
    machine = sys.modules.get("ptxgpu.machine")
    if machine is not None:
        monkeypatch.setattr(machine.config, "check_races", False)


@EXAMPLES
@given(calls(edges=True, dtypes=[torch.float32]))
def test_edge_values_take_eagers_side(nans_of_either_sign, call):
    equals_eager(call)


def equals_eager(call):
    out, expected = call.forward(launch), call.forward(eager, torch.empty_like(call.input))
    if call.rule.slope == "zero":
        # torch.relu itself keeps or drops the sign of -0 as its vector and scalar loops have it.
        out, expected = out + 0.0, expected + 0.0
    # The kernel's division is within an ulp of the rounded one, not equal to it.
    equal = near_float32 if call.rule.slope == "drawn divisor" else same
    assert equal(out, expected)
    z = reference.add_bias(call.input, call.bias)
    for kept in call.keep():
        if kept.dtype == torch.uint8:
            assert torch.equal(kept, reference.pack_bits(call.negative()))
        grad_input, grad_bias, grad_weight = call.backward(launch, kept)
        expected_grad, expected_bias, expected_weight = call.backward(eager, kept, torch.empty_like(call.input))
        assert equal(grad_input, expected_grad)
        assert (grad_bias is None) == (expected_bias is None) and (grad_weight is None) == (expected_weight is None)
        if grad_bias is not None:
            assert grad_bias.shape == call.bias.shape and sums_to(grad_bias, expected_grad)
        if grad_weight is not None:
            assert grad_weight.shape == call.weight.shape
            assert sums_to(grad_weight, torch.where(z > 0, 0.0, call.grad * z))
    assert call.margins_survive()


def near_float32(a, b):
    return torch.allclose(a, b, rtol=3e-7, atol=2e-45, equal_nan=True)


@EXAMPLES
@given(calls(dtypes=[d for d in DTYPES if d != torch.float32]))
def test_other_dtypes_are_as_near_to_float64_as_their_rounding_allows(call):
    is_near_float64(call)


@EXAMPLES
@given(calls(edges=True, dtypes=[d for d in DTYPES if d != torch.float32]))
def test_bits_of_other_dtypes_are_eagers(call):
    if call.rule.keeps_input:
        return
    bits = call.bits()
    assert same(call.forward(launch, bits=bits), call.forward(launch))
    assert torch.equal(bits, reference.pack_bits(call.negative())) and call.margins_survive()


def is_near_float64(call):
    wide = [None if t is None else t.double() for t in (call.input, call.bias, call.weight)]
    x, parameters = wide[0], Parameters(*wide[1:])
    slopes = None if call.seed is None else reference.slopes(call.seed, call.input, call.rule).double()
    assert near(call.forward(launch), reference.rectify(x, parameters, call.rule, slopes))
    z = reference.add_bias(x, parameters.bias)
    slope = reference.slope(z, parameters, call.rule) if slopes is None else slopes
    for kept in call.keep():
        grad_input, grad_bias, grad_weight = call.backward(launch, kept)
        # As the kernels sum: 16-bit dtypes in float32.
        terms = torch.where(call.negative(), call.grad.double() * slope, call.grad.double())
        assert near(grad_input, terms)
        if grad_bias is not None:
            assert sums_to(grad_bias, terms.to(reference.computed_in(call.dtype)))
        if grad_weight is not None:
            products = torch.where(z > 0, 0.0, call.grad.double() * z)
            assert sums_to(grad_weight, products.to(reference.computed_in(call.dtype)))
    assert call.margins_survive()


@st.composite
def norms(draw):
    """A call in evaluation, and a BatchNorm before its bias, of the input's dtype or float32 beside 16 bits."""
    call = draw(calls(edges=draw(st.booleans())).filter(lambda call: len(call.shape) > 1 and not call.rule.random))
    wide = torch.float32 if draw(st.booleans()) and call.dtype != torch.float64 else call.dtype
    mean, var, weight = (call.random(call.shape[1]).to(wide) for _ in range(3))
    return call, Norm(mean, var.abs(), weight if draw(st.booleans()) else None, draw(st.sampled_from([0.1, 1e-5])))


@EXAMPLES
@given(norms())
def test_a_norm_before_the_bias(call_and_norm):
    is_normalized(*call_and_norm)


def is_normalized(call, norm):
    """As near to float64 as the roundings of scale, shift and their sum, and that of the result, allow."""
    call.guarded.clear()
    out = call.empty()
    launch.forward(call.input, call.parameters, call.rule, out, None, norm)
    x, bias, weight, *statistics = (
        None if t is None else t.double() for t in (call.input, call.bias, call.weight, *norm[:3])
    )
    norm = Norm(*statistics, norm.eps)
    z = reference.normalize(x, norm, bias)
    exact = reference.rectify(z, Parameters(weight=weight), call.rule)
    scale = reference.normalize(torch.ones_like(x), norm._replace(mean=torch.zeros_like(norm.mean)), None)
    shift = reference.normalize(torch.zeros_like(x), norm, None).abs() + (0 if bias is None else bias.abs().max())
    slope = reference.slope(z, Parameters(weight=weight), call.rule)
    error = torch.finfo(reference.computed_in(call.dtype)).eps * ((x * scale).abs() + 2 * shift) * 4
    error = error * (1 + torch.as_tensor(slope).abs()) + exact.abs() * torch.finfo(call.dtype).eps
    finite = error.isfinite() & (exact.abs() <= torch.finfo(call.dtype).max / 2)
    tiny = torch.finfo(call.dtype).tiny
    assert ((out.double() - exact).abs() <= error + tiny)[finite].all()
    assert torch.equal(out.isnan(), exact.isnan()) and call.margins_survive()


@pytest.mark.parametrize("rule", [Rule.default("relu"), PRELU], ids=lambda rule: rule.name)
@pytest.mark.parametrize("shape", [(1, 3, 65, 67), (2, 2, 64, 65), (3, 2, 4097), (5, 16, 8, 8), (40, 9)])
def test_a_norm_in_every_look_up(shape, rule):
    call = GuardedCall(shape, range(len(shape)), torch.float32, rule)
    is_normalized(call, Norm(*(call.random(shape[1]).abs() for _ in range(3)), 1e-5))


@pytest.fixture
def tiles_of_large_tensors(monkeypatch):
    """The planner as it is where programs are many."""
    caches = planner.plan, launch._known_call
    monkeypatch.setattr(planner, "ENOUGH_PROGRAMS", 1)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# Planes wider than a tile: the channel changes inside a vector, between two, in the last vector of several rows.
WIDE_PLANES = [((1, 3, 65, 67), "seam"), ((2, 2, 64, 65), "plane"), ((1, 4, 8193), "seam"), ((3, 2, 4097), "seam")]


def half(cases, names):
    """Each case with each rule, every other pair in the long sweep: what a tile is does not depend on the rule, and the
    interpreter takes half a minute for some."""
    return [
        pytest.param(*case, Rule.default(name), marks=[pytest.mark.exhaustive] * ((c + r) % 2), id=f"{case[0]}-{name}")
        for c, case in enumerate(cases)
        for r, name in enumerate(names)
    ]


@pytest.mark.parametrize(("shape", "lookup", "rule"), half(WIDE_PLANES, TABLE))
def test_planes_wider_than_a_tile(shape, lookup, rule):
    size, inner = math.prod(shape), math.prod(shape[2:])
    dtypes = [torch.float32] if INTERPRETED and rule.slope != "learned" else DTYPES
    for dtype in dtypes:
        assert planner.plan(size, shape[1], inner, dtype.itemsize).lookup == lookup
        call = GuardedCall(shape, range(len(shape)), dtype, rule, shift=3 if dtype == torch.float64 else 0)
        (equals_eager if dtype == torch.float32 else is_near_float64)(call)


TILES = [((1, 3, 65, 67),), ((2, 2, 91, 92),), ((9, 3, 33, 31),), ((9, 2, 24, 40),), ((9001,),)]


@pytest.mark.parametrize(("shape", "rule"), half(TILES, ("rrelu", "prelu")))
def test_tiles_of_eight_steps(tiles_of_large_tensors, shape, rule):
    equals_eager(GuardedCall(shape, range(len(shape)), torch.float32, rule))


def near(got, exact):
    """The correctly rounded value of a float32 (float64) calculation, for 16-bit dtypes to the very neighbour."""
    if got.dtype == torch.float64:
        return torch.allclose(got, exact, rtol=1e-15, atol=1e-300)
    rounded = exact.to(got.dtype).double()
    # Next to a tie float32 may round to the other side: no farther off than the nearest value, but for float32's error.
    error, least = (got.double() - exact).abs(), (rounded - exact).abs()
    return bool((error <= least + 2e-7 * exact.abs() + 1e-30).all())


def rectified(x, rule, parameters=NONE, bits=None):
    out = torch.empty_like(x)
    launch.forward(x, parameters, rule, out, bits)
    return out


def test_edge_values_take_torchs_side():
    x = torch.tensor([*EDGES, 1.0, -1.0]).repeat(5).view(1, 5, -1)
    bits, ones = torch.empty(-(-x.numel() // 8), dtype=torch.uint8), torch.ones_like(x)
    for rule, twin in (
        (Rule.default("relu"), F.relu),
        (leaky_relu(0.1), lambda z: F.leaky_relu(z, 0.1)),
        (leaky_relu(-0.5), lambda z: F.leaky_relu(z, -0.5)),
    ):
        leaf = x.clone().requires_grad_()
        expected = twin(leaf)
        expected.backward(ones)
        assert same(rectified(x, rule, bits=bits) + 0.0, expected.detach() + 0.0), rule
        for kept in (x, bits):
            grad_input = torch.empty_like(x)
            launch.backward(ones, kept, Parameters(), rule, grad_input, Need())
            assert same(grad_input, leaf.grad), rule
    weight = torch.tensor([0.25, 0.0, -1.0, math.inf, math.nan])
    leaf, learned = x.clone().requires_grad_(), weight.clone().requires_grad_()
    F.prelu(leaf, learned).backward(ones)
    grad_input = torch.empty_like(x)
    launch.backward(ones, x, Parameters(weight=weight), PRELU, grad_input, Need())
    assert same(rectified(x, PRELU, Parameters(weight=weight)), F.prelu(x, weight)) and same(grad_input, leaf.grad)


@pytest.mark.parametrize("special", [math.inf, math.nan, -math.inf])
def test_one_channels_infinity_is_its_own(special):
    """Neither the lanes beyond the last row nor a vector shared by two channels carry it to another sum."""
    for shape, order in (
        ((3, 5, 7), (0, 1, 2)),
        ((3, 5, 7), (0, 2, 1)),
        ((2, 5, 8, 8), (0, 1, 2, 3)),
        ((1, 5, 2049), (0, 1, 2)),
        ((33, 5), (0, 1)),
    ):
        for name in ("weight", "bias"):
            call = GuardedCall(shape, order, torch.float32, PRELU)
            _, clean_bias, clean_weight = call.backward(launch, call.input)
            getattr(call, name)[2] = special
            _, grad_bias, grad_weight = call.backward(launch, call.input)
            others = torch.arange(5) != 2
            assert same(grad_bias[others], clean_bias[others]) and same(grad_weight[others], clean_weight[others])
            assert name == "bias" or same(grad_weight, clean_weight)


@pytest.mark.parametrize("rule", [Rule.default(name) for name in TABLE], ids=list(TABLE))
def test_in_place_is_the_same(rule):
    call = GuardedCall((3, 6, 11, 5), (0, 2, 3, 1), torch.float32, rule)
    out, kept = call.forward(launch), call.keep()
    for what in kept:
        grad_input, grad_bias, grad_weight = call.backward(launch, what)
        grad = call.grad.clone()
        again = call.backward(launch, what, call.grad)
        assert again[0] is call.grad and same(call.grad, grad_input)
        assert (grad_bias is None or same(again[1], grad_bias)) and (grad_weight is None or same(again[2], grad_weight))
        call.grad.copy_(grad)
    bits = None if rule.keeps_input else call.bits()
    call.forward(launch, call.input, bits)
    assert same(call.input, out) and call.margins_survive()
    assert bits is None or torch.equal(bits, kept[0])


def test_an_infinite_slope_reaches_no_sum_of_positive_elements():
    """Rows and tiles are ragged here: lanes without an element share the channel of the last ones."""
    call = GuardedCall((3, 5, 7), (0, 1, 2), torch.float32, PRELU)
    call.input.abs_().add_(10)
    call.weight.fill_(math.inf)
    grad_input, grad_bias, grad_weight = call.backward(launch, call.input)
    assert torch.equal(grad_input, call.grad) and not grad_weight.any()
    torch.testing.assert_close(grad_bias, call.grad.sum((0, 2)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_one_slope_for_many_channels(order, bias):
    call = GuardedCall((3, 5, 70), order, torch.float32, PRELU, bias, per_channel=False)
    _, _, grad_weight = call.backward(launch, call.input)
    z = reference.add_bias(call.input, call.bias)
    assert grad_weight.shape == (1,) and sums_to(grad_weight, torch.where(z > 0, 0.0, call.grad * z))


@pytest.mark.parametrize("rule", [leaky_relu(0.125), PRELU, Rule.default("rrelu")])
def test_minus_zero_keeps_its_sign(rule):
    call = GuardedCall((2, 3, 11), (0, 1, 2), torch.float32, rule)
    call.bias, call.weight = None, None if call.weight is None else call.weight.abs()
    call.input.fill_(-0.0)
    assert call.forward(launch).signbit().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_follow_the_memory(dtype):
    """Bit i % 8 of byte i // 8 for position i, whatever the dims' order; the last byte's unused bits are 0."""
    for shape, order in (((2, 3, 5, 7), (0, 2, 3, 1)), ((3, 100, 4), (2, 0, 1)), ((1031,), (0,)), ((5,), (0,))):
        call = GuardedCall(shape, order, dtype, leaky_relu(0.1), bias=False)
        bits = call.bits()
        call.forward(launch, bits=bits)
        negative = (call.input.permute(order).flatten() <= 0).tolist()
        bytes_ = [sum(side << j for j, side in enumerate(negative[i : i + 8])) for i in range(0, len(negative), 8)]
        assert bits.tolist() == bytes_


def test_bits_alone_decide_the_side():
    """Backward reads no input: stale bits, or another layout's, would show."""
    call = GuardedCall((3, 5, 67), (0, 2, 1), torch.float32, leaky_relu(0.25))
    sides = torch.rand(call.input.shape).permute(0, 2, 1).contiguous().permute(0, 2, 1) < 0.5
    grad_input, _, _ = call.backward(launch, reference.pack_bits(sides))
    assert same(grad_input, torch.where(sides, call.grad * 0.25, call.grad))


def test_sums_repeat_bit_for_bit():
    call = GuardedCall((8, 7, 13, 5), (0, 1, 2, 3), torch.float32, PRELU)
    first = call.backward(launch, call.input)
    GuardedCall((3, 9, 4), (0, 1, 2), torch.float32, PRELU).backward(launch, torch.randn(3, 9, 4))
    second = call.backward(launch, call.input)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS)
def test_slopes_are_the_rules_whatever_the_layout(dtype, law):
    """-slope is what an input of -1 becomes; position in memory counts, not the index."""
    seed = torch.tensor([-987654321])
    for shape, order in (
        ((2, 3, 5, 7), (0, 1, 2, 3)),
        ((2, 3, 5, 7), (0, 2, 3, 1)),
        ((3, 100, 4), (2, 0, 1)),
        ((1031,), (0,)),
    ):
        laid = torch.full([shape[d] for d in order], -1.0, dtype=dtype)
        x = laid.permute([order.index(d) for d in range(len(shape))])
        # In float64 the reference's sum is an fma's only where the product needs no rounding.
        rule = rrelu(*((0.125, 0.375) if law == "slope" else (3.0, 8.0)), law)
        got = -rectified(x, rule, Parameters(seed=seed)).permute(order).reshape(-1)
        expected = reference.flat_slopes(int(seed), x.numel(), rule, dtype, x.device)
        if rule.slope == "drawn":
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=0)


@pytest.mark.parametrize("bounds", [(2.0**-126, 2.0**-124), (2.0**124, 2.0**126), (2.0**-126, 2.0**126)])
def test_divisors_at_the_ends_of_their_range(bounds):
    rule = rrelu(*bounds, "divisor")
    out = rectified(torch.full((1031,), -1.0), rule, Parameters(seed=torch.tensor([42])))
    expected = reference.flat_slopes(42, 1031, rule, torch.float32, out.device)
    torch.testing.assert_close(-out, expected, rtol=2e-7, atol=0)


def test_seed_is_read_from_memory_and_matters():
    x, seed, rule = -torch.ones(64), torch.tensor([5]), rrelu(0.0, 1.0, "slope")
    first = rectified(x, rule, Parameters(seed=seed))
    seed.fill_(6)
    second = rectified(x, rule, Parameters(seed=seed))
    assert (first != second).sum() > 60


@pytest.mark.parametrize("need_bias", [False, True])
def test_only_what_is_needed_is_summed(need_bias):
    call = GuardedCall((2, 3, 5), (0, 1, 2), torch.float32, leaky_relu(0.1))
    _, grad_bias, grad_weight = call.backward(launch, call.input, need_bias=need_bias)
    assert (grad_bias is not None) == need_bias and grad_weight is None


def test_parameters_of_another_dtype():
    """Autocast: a 16-bit convolution output beside float32 parameters; the sums come back in theirs."""
    call = GuardedCall((2, 5, 6, 6), (0, 1, 2, 3), torch.float16, PRELU)
    call.bias, call.weight = torch.randn(5), torch.randn(5)
    out = call.forward(launch)
    z = call.input.float() + call.bias.view(-1, 1, 1)
    assert near(out, torch.where(z > 0, z, z * call.weight.view(-1, 1, 1)).double())
    need = Need(torch.float32, True)
    sums = launch.backward(call.grad, call.input, call.parameters, PRELU, call.empty(), need)
    assert sums[0].dtype == sums[1].dtype == torch.float32
    assert sums_to(sums[1], torch.where(z > 0, 0.0, call.grad.float() * z))


def train(backend):
    torch.manual_seed(0)
    layers = [
        fr.nn.ConvReLU2d(2, 5, 3, padding=1),
        fr.nn.ConvLeakyReLU2d(5, 4, 3, negative_slope=0.2),
        fr.nn.ConvPReLU2d(4, 3, 1, num_parameters=3),
        fr.nn.ConvRReLU2d(3, 2, 3),
    ]
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), fr.nn.LinearReLU(32, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    x = torch.randn(3, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    losses = []
    with fr.backend(backend):
        for _ in range(3):
            optimizer.zero_grad()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in net.parameters()]


def test_a_network_trains_to_the_same_weights():
    losses, parameters = train("triton")
    expected_losses, expected_parameters = train("eager")
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for got, expected in zip(parameters, expected_parameters):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


NO_DRIVER = """
import torch, fused_rect as fr
with fr.backend("triton"):
    try:
        fr.functional.bias_relu(torch.ones(2, 3), None)
    except RuntimeError as error:
        print(error)
"""


def test_forced_triton_without_a_driver_says_what_to_set():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", NO_DRIVER], capture_output=True, text=True, env=environment, check=True
    )
    assert "TRITON_INTERPRET=1" in done.stdout and "CPU tensors" in done.stdout
