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

import fused_rect as fr
from fused_rect import reference
from fused_rect.backends import eager
from fused_rect.kernels import launch, rectify
from fused_rect.kernels import plan as planner
from fused_rect.rules import saves_output

pytestmark = pytest.mark.ptx

INTERPRETED = not isinstance(rectify.forward, triton.JITFunction)
# The interpreter truncates where it stores bfloat16, so only compiled code is held to the rounding.
DTYPES = [torch.float32, torch.float16, torch.float64] + ([] if INTERPRETED else [torch.bfloat16])
RULES = (
    ("relu", 0.0, 0.0),
    ("leaky_relu", 0.1, 0.1),
    ("leaky_relu", -0.5, -0.5),
    ("prelu", 0.0, 0.0),
    ("rrelu", 1 / 8, 1 / 3),
    ("rrelu", -0.5, 0.5),
    ("rrelu_divisor", 3.0, 8.0),
)
EDGES = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 6e-8, -6e-8, 65504.0, -65504.0)
MARGIN = 64


class Case:
    """Arguments of one call, its tensors in the middle of guarded storage, ``shift`` elements off 16-byte alignment."""

    def __init__(self, shape, order, dtype, rule, bias=True, per_channel=True, shift=0, edges=False, seed=0):
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        self.shape, self.order, self.dtype, self.shift = shape, order, dtype, shift
        self.rule, self.lower, self.upper = rule
        self.guarded = []
        channels = shape[1] if len(shape) > 1 else 1
        self.input = self.dense(edges)
        self.grad = self.dense(edges)
        self.bias = self.random(channels) if bias else None
        self.weight = self.random(channels if per_channel else 1) if self.rule == "prelu" else None
        self.seed = torch.tensor([seed * 0x9E3779B97F4A7C15 % 2**63]) if self.rule.startswith("rrelu") else None

    def __repr__(self):
        parameters = [name for name in ("bias", "weight") if getattr(self, name) is not None]
        return f"{self.shape} laid out as {self.order}, {self.dtype}, {self.shift} off, {self.rule}, {parameters}"

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def empty(self):
        """A dense tensor of the case's layout inside guards of NaN."""
        size = math.prod(self.shape)
        storage = torch.full((size + 2 * MARGIN + self.shift,), math.nan, dtype=self.dtype)
        first = MARGIN + self.shift
        self.guarded.append((storage, first, size))
        flat = storage[first : first + size]
        laid = flat.view([self.shape[d] for d in self.order])
        return laid.permute([self.order.index(d) for d in range(len(self.shape))])

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
        return self.bias, self.weight, self.seed, self.rule, self.lower, self.upper

    def forward(self, module, out=None):
        out = self.empty() if out is None else out
        module.forward(self.input, *self.parameters, out)
        return out

    def backward(self, module, saved, grad_input=None, need_bias=None):
        grad_input = self.empty() if grad_input is None else grad_input
        need_bias = self.bias is not None if need_bias is None else need_bias
        sums = module.backward(self.grad, saved, *self.parameters, grad_input, need_bias, self.weight is not None)
        return grad_input, *sums

    def saved(self, out):
        return out if saves_output(self.rule, self.lower) else self.input

    def slopes(self):
        law = "divisor" if self.rule == "rrelu_divisor" else "slope"
        return None if self.seed is None else reference.slopes(self.seed, self.input, self.lower, self.upper, law)

    def margins_survive(self):
        for storage, first, size in self.guarded:
            if not (storage[:first].isnan().all() and storage[first + size :].isnan().all()):
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
    st.tuples(st.integers(1, 2100)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20)),
    st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(*[st.integers(1, 5)] * 5),
    st.sampled_from([(2, 3, 40, 40), (1, 2, 67, 63), (40, 2, 4, 4), (1, 1, 1, 1), (300, 16), (17, 8, 4, 8)]),
)


@st.composite
def cases(draw, edges=False, dtypes=DTYPES):
    shape = draw(SHAPES)
    order = draw(st.permutations(range(len(shape))))
    rule = draw(st.sampled_from(RULES))
    return Case(
        shape, order, draw(st.sampled_from(dtypes)), rule, draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 3])), edges, draw(st.integers(0, 2**31)),
    )  # fmt: skip


# A failing case is small enough to read; shrinking it further under the interpreter takes minutes.
EXAMPLES = settings(max_examples=40 if INTERPRETED else 25, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@EXAMPLES
@given(cases(dtypes=[torch.float32]))
def test_float32_equals_eager_bit_for_bit(case):
    equals_eager(case)


def equals_eager(case):
    out = case.forward(launch)
    expected = torch.empty_like(case.input)
    case.forward(eager, expected)
    grad_input, grad_bias, grad_weight = case.backward(launch, case.saved(expected))
    expected_grad, expected_bias, expected_weight = case.backward(
        eager, case.saved(expected), torch.empty_like(case.input)
    )
    if case.rule == "rrelu_divisor":  # the kernel's division is within an ulp of the rounded one, not equal to it
        torch.testing.assert_close(out, expected, rtol=3e-7, atol=0)
        torch.testing.assert_close(grad_input, expected_grad, rtol=3e-7, atol=0)
    else:
        assert same(out, expected) and same(grad_input, expected_grad)
    assert case.margins_survive()
    assert (grad_bias is None) == (expected_bias is None) and (grad_weight is None) == (expected_weight is None)
    if grad_bias is not None:
        assert grad_bias.shape == case.bias.shape and sums_to(grad_bias, expected_grad)
    if grad_weight is not None:
        z = reference.add_bias(case.input, case.bias)
        assert grad_weight.shape == case.weight.shape
        assert sums_to(grad_weight, torch.where(z > 0, 0.0, case.grad * z))


@EXAMPLES
@given(cases(dtypes=[d for d in DTYPES if d != torch.float32]))
def test_other_dtypes_are_as_near_to_float64_as_their_rounding_allows(case):
    is_near_float64(case)


def is_near_float64(case):
    out = case.forward(launch)
    exact = {name: None if t is None else t.double() for name, t in vars(case).items() if name in ("bias", "weight")}
    slopes = case.slopes()
    y = reference.rectify(
        case.input.double(), exact["bias"], exact["weight"], None if slopes is None else slopes.double(),
        case.rule, case.lower, case.upper,
    )  # fmt: skip
    assert near(out, y)
    saved = case.saved(out)
    grad_input, grad_bias, grad_weight = case.backward(launch, saved)
    z = (
        case.input.double()
        if exact["bias"] is None
        else case.input.double() + reference.along_channels(exact["bias"], y)
    )
    slope = {"relu": 0.0, "leaky_relu": case.lower}.get(case.rule, slopes)
    if case.rule == "prelu":
        slope = reference.along_channels(exact["weight"], y)
    terms = torch.where(saved > 0 if saved is out else z > 0, case.grad.double(), case.grad.double() * slope)
    assert near(grad_input, terms)
    assert case.margins_survive()
    if grad_bias is not None:
        assert sums_to(grad_bias, terms if case.dtype == torch.float64 else terms.float())
    if grad_weight is not None:
        products = torch.where(z > 0, 0.0, case.grad.double() * z)
        assert sums_to(grad_weight, products if case.dtype == torch.float64 else products.float())


@pytest.fixture
def tiles_of_large_tensors(monkeypatch):
    """The planner as it is where programs are many."""
    caches = planner.plan, launch.forward_call, launch.backward_call
    monkeypatch.setattr(planner, "FEWEST", 1)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# Planes wider than a tile: the channel changes inside a vector, between two, in the last vector of several rows.
WIDE_PLANES = [((1, 3, 65, 67), "seam"), ((2, 2, 64, 65), "tile"), ((1, 4, 8193), "seam"), ((3, 2, 4097), "seam")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}{rule[1]:+.2g}")
@pytest.mark.parametrize(("shape", "lookup"), WIDE_PLANES)
def test_planes_wider_than_a_tile(shape, lookup, rule):
    size, inner = math.prod(shape), math.prod(shape[2:])
    for dtype in DTYPES:
        assert planner.plan(size, shape[1], inner, dtype.itemsize).lookup == lookup
        case = Case(shape, range(len(shape)), dtype, rule, shift=3 if dtype == torch.float64 else 0)
        (equals_eager if dtype == torch.float32 else is_near_float64)(case)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}{rule[1]:+.2g}")
@pytest.mark.parametrize("shape", [(1, 3, 65, 67), (2, 2, 91, 92), (9, 3, 33, 31), (9, 2, 40, 40), (9001,)])
def test_eight_vectors_a_thread(tiles_of_large_tensors, shape, rule):
    case = Case(shape, range(len(shape)), torch.float32, rule)
    equals_eager(case)


def near(got, exact):
    """The correctly rounded value of a float32 (float64) calculation, for 16-bit dtypes to the very neighbour."""
    if got.dtype == torch.float64:
        return torch.allclose(got, exact, rtol=1e-15, atol=1e-300)
    rounded = exact.to(got.dtype).double()
    # Next to a tie float32 may round to the other side: no farther off than the nearest value, but for float32's error.
    error, least = (got.double() - exact).abs(), (rounded - exact).abs()
    return bool((error <= least + 2e-7 * exact.abs() + 1e-30).all())


@EXAMPLES
@given(cases(edges=True, dtypes=[torch.float32]))
def test_edge_values_take_eagers_side(case):
    out = case.forward(launch)
    expected = case.forward(eager, torch.empty_like(case.input))
    saved = case.saved(expected)
    grad_input, grad_bias, grad_weight = case.backward(launch, saved)
    expected_grad, _, _ = case.backward(eager, saved, torch.empty_like(case.input))
    if case.rule == "rrelu_divisor":
        torch.testing.assert_close(out, expected, rtol=3e-7, atol=2e-45, equal_nan=True)
        torch.testing.assert_close(grad_input, expected_grad, rtol=3e-7, atol=2e-45, equal_nan=True)
    else:
        # torch.relu itself keeps or drops the sign of -0 as its vector and scalar loops have it.
        assert same(out + 0.0, expected + 0.0) if case.rule == "relu" else same(out, expected)
        assert same(grad_input, expected_grad)
    if grad_bias is not None:
        assert sums_to(grad_bias, expected_grad)
    if grad_weight is not None:
        z = reference.add_bias(case.input, case.bias)
        assert sums_to(grad_weight, torch.where(z > 0, 0.0, case.grad * z))


def test_edge_values_take_torchs_side():
    x = torch.tensor([*EDGES, 1.0, -1.0]).repeat(5).view(1, 5, -1)
    for rule, slope, twin in (
        ("relu", 0.0, F.relu),
        ("leaky_relu", 0.1, lambda z: F.leaky_relu(z, 0.1)),
        ("leaky_relu", -0.5, lambda z: F.leaky_relu(z, -0.5)),
    ):
        leaf = x.clone().requires_grad_()
        expected = twin(leaf)
        expected.backward(torch.ones_like(x))
        out, grad_input = torch.empty_like(x), torch.empty_like(x)
        launch.forward(x, None, None, None, rule, slope, slope, out)
        launch.backward(torch.ones_like(x), x, None, None, None, rule, slope, slope, grad_input, False, False)
        assert same(out + 0.0, expected.detach() + 0.0) and same(grad_input, leaf.grad), rule
    weight = torch.tensor([0.25, 0.0, -1.0, math.inf, math.nan])
    leaf, learned = x.clone().requires_grad_(), weight.clone().requires_grad_()
    F.prelu(leaf, learned).backward(torch.ones_like(x))
    out, grad_input = torch.empty_like(x), torch.empty_like(x)
    launch.forward(x, None, weight, None, "prelu", 0.0, 0.0, out)
    launch.backward(torch.ones_like(x), x, None, weight, None, "prelu", 0.0, 0.0, grad_input, False, False)
    assert same(out, F.prelu(x, weight)) and same(grad_input, leaf.grad)


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
            case = Case(shape, order, torch.float32, ("prelu", 0.0, 0.0))
            _, clean_bias, clean_weight = case.backward(launch, case.input)
            getattr(case, name)[2] = special
            _, grad_bias, grad_weight = case.backward(launch, case.input)
            others = torch.arange(5) != 2
            assert same(grad_bias[others], clean_bias[others]) and same(grad_weight[others], clean_weight[others])
            assert name == "bias" or same(grad_weight, clean_weight)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}{rule[1]:+.2g}")
def test_in_place_is_the_same(rule):
    case = Case((3, 6, 11, 5), (0, 2, 3, 1), torch.float32, rule)
    out = case.forward(launch)
    saved = case.saved(out).clone()
    grad_input, grad_bias, grad_weight = case.backward(launch, saved)
    again = case.backward(launch, saved, case.grad)
    assert again[0] is case.grad and same(case.grad, grad_input)
    assert (grad_bias is None or same(again[1], grad_bias)) and (grad_weight is None or same(again[2], grad_weight))
    case.forward(launch, case.input)
    assert same(case.input, out) and case.margins_survive()


def test_an_infinite_slope_reaches_no_sum_of_positive_elements():
    """Rows and tiles are ragged here: lanes without an element share the channel of the last ones."""
    case = Case((3, 5, 7), (0, 1, 2), torch.float32, ("prelu", 0.0, 0.0))
    case.input.abs_().add_(10)
    case.weight.fill_(math.inf)
    grad_input, grad_bias, grad_weight = case.backward(launch, case.input)
    assert torch.equal(grad_input, case.grad) and not grad_weight.any()
    torch.testing.assert_close(grad_bias, case.grad.sum((0, 2)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_one_slope_for_many_channels(order, bias):
    case = Case((3, 5, 70), order, torch.float32, ("prelu", 0.0, 0.0), bias, per_channel=False)
    _, _, grad_weight = case.backward(launch, case.input)
    z = reference.add_bias(case.input, case.bias)
    assert grad_weight.shape == (1,) and sums_to(grad_weight, torch.where(z > 0, 0.0, case.grad * z))


@pytest.mark.parametrize("rule", ["leaky_relu", "prelu", "rrelu"])
def test_minus_zero_keeps_its_sign(rule):
    case = Case((2, 3, 11), (0, 1, 2), torch.float32, (rule, 0.125, 0.25))
    case.bias, case.weight = None, None if case.weight is None else case.weight.abs()
    case.input.fill_(-0.0)
    assert case.forward(launch).signbit().all()


def test_sums_repeat_bit_for_bit():
    case = Case((8, 7, 13, 5), (0, 1, 2, 3), torch.float32, ("prelu", 0.0, 0.0))
    first = case.backward(launch, case.input)
    Case((3, 9, 4), (0, 1, 2), torch.float32, ("prelu", 0.0, 0.0)).backward(launch, torch.randn(3, 9, 4))
    second = case.backward(launch, case.input)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", ["slope", "divisor"])
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
        out = torch.empty_like(x)
        op, bounds = ("rrelu", (0.125, 0.375)) if law == "slope" else ("rrelu_divisor", (3.0, 8.0))
        launch.forward(x, None, None, seed, op, *bounds, out)
        expected = reference.flat_slopes(int(seed), x.numel(), *bounds, law, dtype, x.device)
        got = -out.permute(order).reshape(-1)
        if law == "slope":
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=0)


@pytest.mark.parametrize("bounds", [(2.0**-126, 2.0**-124), (2.0**124, 2.0**126), (2.0**-126, 2.0**126)])
def test_divisors_at_the_ends_of_their_range(bounds):
    x, out, seed = torch.full((1031,), -1.0), torch.empty(1031), torch.tensor([42])
    launch.forward(x, None, None, seed, "rrelu_divisor", *bounds, out)
    expected = reference.flat_slopes(42, 1031, *bounds, "divisor", torch.float32, x.device)
    torch.testing.assert_close(-out, expected, rtol=2e-7, atol=0)


def test_seed_is_read_from_memory_and_matters():
    x = -torch.ones(64)
    first, second = torch.empty(64), torch.empty(64)
    seed = torch.tensor([5])
    launch.forward(x, None, None, seed, "rrelu", 0.0, 1.0, first)
    seed.fill_(6)
    launch.forward(x, None, None, seed, "rrelu", 0.0, 1.0, second)
    assert (first != second).sum() > 60


@pytest.mark.parametrize("need_bias", [False, True])
def test_only_what_is_needed_is_summed(need_bias):
    case = Case((2, 3, 5), (0, 1, 2), torch.float32, ("leaky_relu", 0.1, 0.1))
    _, grad_bias, grad_weight = case.backward(launch, case.input, need_bias=need_bias)
    assert (grad_bias is not None) == need_bias and grad_weight is None


def test_parameters_of_another_dtype():
    """Autocast: a 16-bit convolution output beside float32 parameters; the sums come back in theirs."""
    case = Case((2, 5, 6, 6), (0, 1, 2, 3), torch.float16, ("prelu", 0.0, 0.0))
    case.bias, case.weight = torch.randn(5), torch.randn(5)
    out = case.forward(launch)
    z = case.input.float() + case.bias.view(-1, 1, 1)
    assert near(out, torch.where(z > 0, z, z * case.weight.view(-1, 1, 1)).double())
    _, grad_bias, grad_weight = case.backward(launch, case.input)
    assert grad_bias.dtype == grad_weight.dtype == torch.float32
    assert sums_to(grad_weight, torch.where(z > 0, 0.0, case.grad.float() * z))


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
